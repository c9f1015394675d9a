"""Replies of a language model, batched by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
        text: without special tokens, up to the first stop text.
        finished: whether the model stopped by itself; False where the reply was cut.
    """

    text: str
    finished: bool


@dataclass(frozen=True)
class Writing:
    """How replies are written.

    Attributes:
        max_new_tokens: a reply is cut after so many tokens.
        stops: texts that end a reply; they are not part of it.
        temperature: of drawn replies; 0 is greedy.
        special_tokens: the tokenizer puts its begin token before a prompt (a chat template has it already).
    """

    max_new_tokens: int = 64
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    special_tokens: bool = False


def chat_prompt(tokenizer: Any, question: str) -> str:
    """The question as one user turn in the model's own chat template, ready for the reply."""
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


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
    writing = Writing(max_new_tokens)
    with tqdm(total=len(prompts), desc=desc, unit="question") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            made = write_batch(model, tokenizer, [prompts[n] for n in chosen], writing)
            for n, reply in zip(chosen, made, strict=True):
                out[n] = reply
            bar.update(len(chosen))
    model.train(training)
    return out


@torch.no_grad()
def write_batch(model: Any, tokenizer: Any, prompts: Sequence[str], writing: Writing) -> list[Reply]:
    """The replies to prompts that are written together; the prompts are padded on the left, where generation needs it.

    Args:
        model: a causal language model with `generate`, in evaluation mode.
        tokenizer: its tokenizer, with a padding token.
        prompts: whole texts.
        writing: lengths, stops, temperature.
    """
    batch = tokenizer(
        list(prompts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=writing.special_tokens,
        return_token_type_ids=False,
    ).to(next(model.parameters()).device)
    options: dict[str, Any] = {"do_sample": False}
    if writing.temperature:
        options = {"do_sample": True, "temperature": writing.temperature, "top_p": 1.0, "top_k": 0}
    if writing.stops:
        options |= {"stop_strings": list(writing.stops), "tokenizer": tokenizer}
    ends = end_tokens(model.generation_config, tokenizer)
    made = model.generate(
        **batch,
        max_new_tokens=writing.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    rows = made[:, batch["input_ids"].shape[1] :]
    return [cut_reply(tokenizer, ids, ends, writing.stops) for ids in rows.tolist()]


def end_tokens(generation: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: the tokenizer's, and those that the model's own settings name.

    Args:
        generation: the model's GenerationConfig.
        tokenizer: its tokenizer.
    """
    own = generation.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({n for n in (*own, tokenizer.eos_token_id) if n is not None})


def cut_reply(tokenizer: Any, ids: Sequence[int], ends: Sequence[int], stops: Sequence[str]) -> Reply:
    """A reply from the tokens that a model wrote: up to the first end token or stop text, without space around it.

    Args:
        tokenizer: the model's.
        ids: new tokens, what comes after an end token included.
        ends: tokens that end a reply.
        stops: texts that end a reply.
    """
    first = min((ids.index(e) for e in ends if e in ids), default=None)
    text = tokenizer.decode(ids[:first], skip_special_tokens=True)
    found = [n for n in (text.find(s) for s in stops) if n >= 0]
    return Reply((text[: min(found)] if found else text).strip(), first is not None or bool(found))
