"""Greedy replies from a chat model, batched by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm


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
    max_new_tokens: int = 48,
    batch_size: int = 40,
    desc: str = "answering",
) -> list[str]:
    """Greedy replies in the order of the questions.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokenizer.
        questions: one user turn each.
        max_new_tokens: a reply is cut after so many tokens.
        batch_size: questions of like length are answered together.
        desc: label of the progress bar.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    prompts = [chat_prompt(tokenizer, q) for q in questions]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    out = [""] * len(prompts)
    tokenizer.padding_side = "left"
    with tqdm(total=len(prompts), desc=desc, unit="question") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer([prompts[n] for n in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
            batch = batch.to(device)
            made = model.generate(  # type: ignore[operator]
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for n, text in zip(chosen, texts, strict=True):
                out[n] = text.strip()
            bar.update(len(chosen))
    model.train(training)
    return out
