"""Tokenised rows: made by a function of a batch, kept on disk, with what was counted on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Features

from corelora.data.cache import key_of
from corelora.data.sources import NAMED, Rows
from corelora.errors import CoreLoraError
from corelora.recipe.schema import DataPart, SourcePart


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows.

    Attributes:
        dataset: columns as the function that made them says.
        counts: rows; truncated (rows that were cut at max_length) and truncated_share, a part of 1; left_out (rows
            whose prompt alone fills max_length); tokens; trained_tokens (of replies); sequences (as many as rows, or
            fewer where packed).
        named: where the first of the truncated rows, and of those left out, are from.
        fingerprint: names the content, for what is computed from it.
    """

    dataset: datasets.Dataset
    counts: Mapping[str, Any]
    named: Mapping[str, list[str]]
    fingerprint: str

    def summary(self) -> str:
        """What was read, what was cut and what was left out, in one to three lines."""
        c = self.counts
        trained = f", {c['trained_tokens']:,} of them trained" if "trained_tokens" in c else ""
        packing = f", packed into {c['sequences']:,} sequences" if c["sequences"] != c["rows"] else ""
        lines = [f"{c['rows']:,} rows, {c['tokens']:,} tokens{trained}{packing}"]
        if c["truncated"]:
            where = _first(self.named["truncated"], c["truncated"])
            lines.append(f"{c['truncated']:,} rows ({c['truncated_share']:.2%}) are cut at max_length: {where}")
        if c["left_out"]:
            where = _first(self.named["left_out"], c["left_out"])
            lines.append(f"{c['left_out']:,} rows are left out, their prompts alone fill max_length: {where}")
        return "\n".join(lines)


def _first(named: Sequence[str], count: int) -> str:
    return ", ".join(named) + (f" and {count - len(named):,} more" if count > len(named) else "")


def source_of(part: DataPart, which: str) -> SourcePart:
    """`data.train` or `data.test`.

    Raises:
        CoreLoraError: the recipe has no test rows.
    """
    source = {"train": part.train, "test": part.test}[which]
    if source is None:
        raise CoreLoraError(f"the recipe has no data.{which}")
    return source


def tokenised(rows: Rows, encode: Callable[..., Any], schema: Features, workers: int, out: Path) -> datasets.Dataset:
    """All rows through a function of a batch, in `workers` processes, kept in a folder until `save`.

    Args:
        rows: what to encode.
        encode: a batch of columns -> a batch of the schema's columns.
        schema: types of the columns made.
        workers: processes.
        out: the folder that is being made.
    """
    return rows.dataset.map(
        encode,
        batched=True,
        remove_columns=rows.dataset.column_names,
        features=schema,
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(out / "made.arrow"),
        new_fingerprint=out.name.strip("."),  # else the tokenizer would be pickled to hash it
        desc="tokenising",
    )


def save(
    made: datasets.Dataset, rows: Rows, counts: Mapping[str, Any], named: Mapping[str, list[int]], out: Path
) -> None:
    """Put finished rows and what was counted into a folder; `named` are numbers of rows."""
    where = {name: [rows.where(n) for n in numbers[:NAMED]] for name, numbers in named.items()}
    (out / "counts.json").write_text(json.dumps({"counts": counts, "named": where}))
    made.save_to_disk(str(out / "data"))
    for file in out.glob("made*.arrow"):
        file.unlink()


def load(folder: Path, key: str, shuffle_seed: int | None) -> Encoded:
    """What `save` kept, in the order that a seed gives, or as it was read for None."""
    report = json.loads((folder / "counts.json").read_text())
    dataset = datasets.load_from_disk(str(folder / "data"))
    if shuffle_seed is not None:
        dataset, key = dataset.shuffle(seed=shuffle_seed, keep_in_memory=True), key_of(key, "shuffled", shuffle_seed)
    return Encoded(dataset, {**report["counts"], "sequences": len(dataset)}, report["named"], key)
