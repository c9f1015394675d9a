"""Tiny models and adapters that the PEFT tests share. Everything comes from configs; nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import corelora
from corelora.tuner_layer import CoreLoraLayer

METHODS = corelora.list_methods()
VOCAB = 48
SAFE_SPREAD = 1e-3  # an adapter that was trained must move the logits by more than this


def ids(rows: int = 2, length: int = 7, seed: int = 3) -> Tensor:
    """Token ids [rows, length]."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@cache
def _llama(tied: bool, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.8 / width**0.5,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def llama(tied: bool = False, width: int = 16) -> LlamaForCausalLM:
    """A Llama of two layers, always the same; weights large enough that an adapter's effect stands out."""
    return copy.deepcopy(_llama(tied, width))


def bert() -> BertForSequenceClassification:
    """A BERT classifier of one layer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=2,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config).eval()


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of one layer, whose linear layers are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


class ConvNet(nn.Module):
    """Plain, 1x1 and grouped convolutions and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, groups=3)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 3, h, w] to [n, 2]."""
        x = self.grouped(torch.relu(self.point(torch.relu(self.plain(x)))))
        return self.head(x.mean((2, 3)))


def convnet() -> ConvNet:
    """The conv net, always the same."""
    torch.manual_seed(0)
    return ConvNet().eval()


def config(method: str, **changes) -> corelora.CoreLoraConfig:
    """A config that any method accepts on the tiny Llama; AwSVD takes its scaling from the weights."""
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "stats": "weight"} | changes
    return corelora.CoreLoraConfig(method=method, **settings)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A language model's loss on ids x, which are their own labels."""
    return model(input_ids=x, labels=x).loss


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int = 2, lr: float = 2e-2) -> list[float]:
    """Some steps of Adam on whatever requires a gradient; the loss before each."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return losses


def trained(method: str, base: nn.Module | None = None, **changes) -> nn.Module:
    """A PEFT model with an adapter that has learned a little, in eval mode."""
    base = llama() if base is None else base
    torch.manual_seed(1)
    model = get_peft_model(base, config(method, **changes))
    train(model, lambda: loss_of(model, ids()))
    return model.eval()


def logits(model: nn.Module, x: Tensor | None = None, **kwargs) -> Tensor:
    """The logits without a graph."""
    with torch.no_grad():
        return model(input_ids=ids() if x is None else x, **kwargs).logits


def layers(model: nn.Module) -> list[CoreLoraLayer]:
    """All adapted layers."""
    return [m for m in model.modules() if isinstance(m, CoreLoraLayer)]
