"""Greedy replies from a chat model, batched by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
        text: without special tokens.
        finished: whether the model stopped by itself; False where the reply was cut.
    """

    text: str
    finished: bool


def chat_prompt(tokenizer: Any, question: str) -> str:
    """The question as one user turn in the model's own chat template, ready for the reply."""
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


@torch.no_grad()
def replies(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    desc: str = "answering",
) -> list[Reply]:
    """Greedy replies in the order of the questions.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokenizer.
        questions: one user turn each.
        max_new_tokens: a reply is cut after so many tokens.
        batch_size: questions of like length are answered together. On a CPU more than 16 gain nothing: the cache of
            keys and values, copied at every token, then costs more than the weights.
        desc: label of the progress bar.
    """
    training = model.training
    model.eval()
    prompts = [chat_prompt(tokenizer, q) for q in questions]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    out = [Reply("", False)] * len(prompts)
    with tqdm(total=len(prompts), desc=desc, unit="question") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            made = _generate(model, tokenizer, [prompts[n] for n in chosen], max_new_tokens)
            for n, ids in zip(chosen, made, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                out[n] = Reply(text, tokenizer.eos_token_id in ids.tolist())
            bar.update(len(chosen))
    model.train(training)
    return out


def _generate(model: nn.Module, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> Tensor:
    """New token ids [batch, up to max_new_tokens]; the prompts are padded on the left, where generation needs it."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = batch.to(next(model.parameters()).device)
    made = model.generate(  # type: ignore[operator]
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return made[:, batch["input_ids"].shape[1] :]
