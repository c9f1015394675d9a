"""Conversations to token ids, with the loss on replies and their stop tokens only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Features, List, Value

from corelora.data.cache import key_of, made_once
from corelora.data.collate import IGNORED
from corelora.data.encoded import Encoded, load, save, source_of, tokenised
from corelora.data.forms import FORMS, Form
from corelora.data.packing import packed
from corelora.data.prompts import PROMPTS, Piece, Prompt
from corelora.data.sources import NAMED, Rows, read_rows
from corelora.errors import CoreLoraError, raise_all
from corelora.recipe.schema import DataPart

TOKENS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
_MADE = Features({**TOKENS, "length": Value("int32"), "trained": Value("int32"), "problem": Value("string")})
ADVICE = " Raise data.max_length, or set data.long_prompts: leave_out."


def encode_replies(part: DataPart, which: str, tokenizer: Any, seed: int = 0) -> Encoded:
    """Tokenised rows of one source of a recipe, from the cache where it has them.

    The rows of `train` are shuffled with the seed where the recipe says so, and packed where it says so; those of
    `test` are neither.

    Args:
        part: the recipe's `data`.
        which: "train" or "test".
        tokenizer: the model's.
        seed: of the order of the rows.

    Returns:
        Columns `input_ids`, `labels` (-100: not trained) and, where rows are packed, `position_ids`.

    Raises:
        CoreLoraError: bad rows (see `read_rows`), a prompt that does not fit tokenizer or rows, prompts that leave no
            room for a reply.
    """
    encoder = _Encoder(FORMS[part.form], PROMPTS[part.prompt], tokenizer, part.max_length)
    rows = read_rows(source_of(part, which), encoder.form.columns, part.columns)
    key = key_of(rows.fingerprint, part.form, part.prompt, tokenizer_key(tokenizer), part.max_length, part.long_prompts)
    folder = made_once("tokens", key, lambda out: _encode(part, rows, encoder, out))
    made = load(folder, key, seed if which == "train" and part.shuffle else None)
    if which == "test" or not part.packing:
        return made
    dataset, key = packed(made.dataset, part.max_length, made.fingerprint)
    return Encoded(dataset, {**made.counts, "sequences": len(dataset)}, made.named, key)


def tokenizer_key(tokenizer: Any) -> str:
    """Fingerprint of everything in a tokenizer that decides on token ids."""
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        parts |= {"truncation": None, "padding": None}  # left there by whoever called it last
    else:
        parts = sorted(tokenizer.get_vocab().items())
    return key_of(
        type(tokenizer).__name__, parts, tokenizer.chat_template, begin_tokens(tokenizer), tokenizer.eos_token
    )


def begin_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text, such as BOS; found by asking, as no setting says it for all models."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [n for n in range(len(whole)) if whole[n : n + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


@dataclass(frozen=True)
class _Encoder:
    """Rows to token ids; what `datasets` calls with a batch, maybe in another process."""

    form: Form
    prompt: Prompt
    tokenizer: Any
    max_length: int

    def __post_init__(self) -> None:
        problem = self.prompt.tokenizer_problem(self.tokenizer)
        raise_all([problem] if problem else [], "data.prompt")

    @cached_property
    def begin(self) -> list[int]:
        """What comes before every text."""
        return begin_tokens(self.tokenizer)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        count = len(next(iter(batch.values())))
        made = [self._pieces({name: values[n] for name, values in batch.items()}) for n in range(count)]
        grown = [["".join(p.text for p in pieces[: n + 1]) for n in range(len(pieces))] for pieces, _ in made]
        ids = iter(self._ids([text for texts in grown for text in texts]))
        rows = [self._row(pieces, [next(ids) for _ in pieces], problem) for pieces, problem in made]
        return {name: [row[name] for row in rows] for name in _MADE}

    def _pieces(self, row: Mapping[str, Any]) -> tuple[list[Piece], str | None]:
        messages = self.form.read(row)
        problem = self.prompt.problem(messages)
        if problem:
            return [], problem
        try:
            return self.prompt.pieces(messages, self.tokenizer), None
        except CoreLoraError as error:
            return [], str(error)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _row(self, pieces: Sequence[Piece], grown: Sequence[list[int]], problem: str | None) -> dict[str, Any]:
        """One row; `grown[n]` are the ids of the first n + 1 pieces' text.

        A border between prompt and reply must be one between tokens, as it is when the model writes the reply. Where
        the text of both gives the prompt's own ids and more, it is. Where letters of both sides melt into one token,
        the reply is tokenised apart.
        """
        ids: list[int] = []
        labels: list[int] = []
        for piece, whole in zip(pieces, grown, strict=True):
            new = whole[len(ids) :] if whole[: len(ids)] == ids else self._ids([piece.text])[0]
            ids, labels = ids + new, labels + (new if piece.trained else [IGNORED] * len(new))
        if self.prompt.special_tokens:
            ids, labels = self.begin + ids, [IGNORED] * len(self.begin) + labels
        if not self.prompt.ends:
            ids, labels = [*ids, self.tokenizer.eos_token_id], [*labels, self.tokenizer.eos_token_id]
        cut = labels[: self.max_length]
        return {
            "input_ids": ids[: self.max_length],
            "labels": cut,
            "length": len(ids),
            "trained": sum(label != IGNORED for label in cut),
            "problem": problem,
        }


def _encode(part: DataPart, rows: Rows, encoder: _Encoder, out: Path) -> None:
    """Tokenise all rows into a folder: the tokens and what was counted."""
    made = tokenised(rows, encoder, _MADE, part.workers, out)
    _stop(rows, [(n, text) for n, text in enumerate(made["problem"][:]) if text], "data.prompt")
    longest, lengths, trained = part.max_length, made["length"][:], made["trained"][:]
    kept = [n for n, count in enumerate(trained) if count]
    named = {
        "truncated": [n for n in kept if lengths[n] > longest],
        "left_out": [n for n, count in enumerate(trained) if not count],
    }
    if part.long_prompts == "error" or not kept:
        text = f"the prompt fills max_length ({longest}), nothing is left to train"
        _stop(rows, [(n, text) for n in named["left_out"]], "data.max_length", ADVICE)
    counts = {
        "rows": len(kept),
        "truncated": len(named["truncated"]),
        "truncated_share": len(named["truncated"]) / len(kept),
        "left_out": len(named["left_out"]),
        "tokens": sum(min(lengths[n], longest) for n in kept),
        "trained_tokens": sum(trained),
    }
    save(made.select_columns(list(TOKENS)).select(kept), rows, counts, named, out)


def _stop(rows: Rows, problems: list[tuple[int, str]], where: str, advice: str = "") -> None:
    """Raise what is wrong with rows, the first of them by file and line."""
    if problems:
        lines = "\n".join(f"  - {rows.where(n)}: {text}" for n, text in problems[:NAMED])
        rest = f"\n  - and {len(problems) - NAMED:,} more" if len(problems) > NAMED else ""
        raise CoreLoraError(
            f"{where}: {len(problems):,} of {len(rows):,} rows cannot be trained.{advice}\n{lines}{rest}"
        )
