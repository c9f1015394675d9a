"""Input statistics for activation-aware starts, collected in the run from its own training batches, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from corelora.data.cache import key_of, made_once
from corelora.errors import CoreLoraError
from corelora.recipe.schema import StatsPart
from corelora.stats import InputStats, collect_stats
from corelora.train.tasks import Rows

FILE = "stats.safetensors"
SAMPLED = 8  # entries of each weight that tell one model from another


def run_stats(model: nn.Module, rows: Rows, collate: Any, part: StatsPart, targets: Any) -> InputStats:
    """Statistics of a model's inputs on the first training rows; read from the cache where they were collected before.

    Args:
        model: without an adapter, where it computes.
        rows: tokenised training rows, in the run's order.
        collate: rows to a batch.
        part: how many batches, and rows a batch.
        targets: `target_modules` of the method, or None for all layers that can be adapted.

    Raises:
        CoreLoraError: there is no row, or no layer matches.
    """
    count = min(part.batches * part.batch_size, len(rows.dataset))
    if count == 0:
        raise CoreLoraError("stats: there is no training row to collect input statistics from")
    first = [rows.dataset[n] for n in range(count)]
    names = sorted(targets) if isinstance(targets, (list, set, tuple)) else None
    content = rows.fingerprint or [row["input_ids"] for row in first]
    key = key_of("stats", _fingerprint(model), content, count, part.batch_size, names)

    def make(folder: Path) -> None:
        batches = list(_batches(first, part.batch_size, collate))
        collect_stats(model, batches, names).save(folder / FILE)

    return InputStats.load(made_once("stats", key, make) / FILE)


def _batches(rows: list[dict[str, Any]], size: int, collate: Any) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), size):
        yield collate(rows[start : start + size])


@torch.no_grad()
def _fingerprint(model: nn.Module) -> list[Any]:
    """Names, shapes and a few entries of every parameter."""
    found = []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(SAMPLED, flat.numel())).long().to(flat.device)
        found.append([name, list(parameter.shape), flat[places].double().tolist()])
    return found
