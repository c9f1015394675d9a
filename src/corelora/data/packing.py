"""Several rows in one sequence, each with its own positions, and a check that none of them sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Features, List, Value
from torch import Tensor, nn

from corelora.data.cache import key_of, made_once
from corelora.data.collate import ReplyCollator

PACKED = Features({name: List(Value("int32")) for name in ("input_ids", "labels", "position_ids")})


def packed(dataset: datasets.Dataset, max_length: int, key: str) -> tuple[datasets.Dataset, str]:
    """Rows put together into sequences of at most max_length tokens (best fit, within each 1,000 rows), cached.

    Args:
        dataset: `input_ids` and `labels`, no row longer than max_length.
        max_length: tokens of a sequence at most.
        key: fingerprint of the rows in their order.

    Returns:
        The sequences, with `position_ids` that begin at 0 with each row, and their fingerprint.
    """
    key = key_of(key, "packed", max_length)
    folder = made_once("packed", key, lambda out: _pack(dataset, max_length, out))
    return datasets.load_from_disk(str(folder / "data")), key


def _pack(dataset: datasets.Dataset, max_length: int, out: Path) -> None:
    from trl import pack_dataset  # takes seconds to import, and few runs need it

    def settings(name: str) -> dict[str, Any]:
        return {"cache_file_name": str(out / f"{name}.arrow"), "new_fingerprint": f"{out.name.strip('.')}-{name}"}

    made = pack_dataset(dataset, max_length, strategy="bfd", map_kwargs={**settings("packed"), "desc": "packing"})
    made = made.map(_positions, remove_columns=["seq_lengths"], features=PACKED, desc="positions", **settings("made"))
    made.save_to_disk(str(out / "data"))
    for file in out.glob("*.arrow"):
        file.unlink()


def _positions(sequence: dict[str, Any]) -> dict[str, list[int]]:
    return {"position_ids": [n for length in sequence["seq_lengths"] for n in range(length)]}


@torch.no_grad()
def border_problem(model: nn.Module, collator: ReplyCollator, vocabulary: int = 100) -> str | None:
    """Whether a row of a packed sequence can see the row before it: tried on the model itself, in two small passes.

    What a row's logits are must not change when the row before it is another one. That decides for every
    architecture and attention implementation, and for a batch of several sequences.

    Args:
        model: a causal language model, as it will be trained.
        collator: the one that will make the batches.
        vocabulary: token ids up to this one are used.

    Returns:
        None, or what is wrong and what to do, in one sentence.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [(7, 9), (5, 6)]
    second = [torch.randint(1, vocabulary, (b,), generator=generator).tolist() for _, b in lengths]
    training = model.training
    model.eval()
    try:
        results = []
        for _ in range(2):
            first = [torch.randint(1, vocabulary, (a,), generator=generator).tolist() for a, _ in lengths]
            results.append(_second_logits(model, collator, first, second))
    except TypeError as error:
        return f"data.packing: this model does not take position_ids, which packing needs ({error}); set it to false"
    finally:
        model.train(training)
    # Equal to the bit where nothing is seen: masked products are exact zeros. Kernels may still differ in order.
    difference = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    size = max(float(a.abs().max()) for a in results[0])
    if difference <= 1e-3 * size:
        return None
    return (
        "data.packing: rows packed into one sequence see each other in this model, with its attention implementation "
        "and cache settings (a cache must be off); set data.packing to false, or model.attention to sdpa"
    )


def _second_logits(
    model: nn.Module, collator: ReplyCollator, first: list[list[int]], second: list[list[int]]
) -> list[Tensor]:
    """Logits [t, vocabulary] of the second row of each sequence."""
    sequences = [
        {"input_ids": a + b, "labels": a + b, "position_ids": [*range(len(a)), *range(len(b))]}
        for a, b in zip(first, second, strict=True)
    ]
    batch = {name: values.to(next(model.parameters()).device) for name, values in collator(sequences).items()}
    ids = batch["input_ids"].flatten()
    logits = model(**batch).logits.float().flatten(0, 1)
    width = 0 if collator.flatten else batch["input_ids"].shape[1]
    found, at = [], 0
    for n, (a, b) in enumerate(zip(first, second, strict=True)):
        begin = (n * width if width else at) + len(a)
        assert ids[begin : begin + len(b)].tolist() == b
        found.append(logits[begin : begin + len(b)])
        at += len(a) + len(b)
    return found
