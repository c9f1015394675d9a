"""Statistics that starts read, collected in the run from its own training batches, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from corelora.data.cache import is_made, key_of, made_once
from corelora.errors import CoreLoraError
from corelora.gradients import GradientStats, collect_gradients
from corelora.recipe.schema import StatsPart
from corelora.stats import InputStats, collect_stats
from corelora.storage import gathered
from corelora.train.methods import WantedStats
from corelora.train.processes import on_main
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
    first, names = _first(rows, part), _names(targets)
    key = key_of("stats", _fingerprint(model), _content(rows, first), len(first), part.batch_size, names)

    def make(folder: Path) -> None:
        batches = list(_batches(first, part.batch_size, collate))
        collect_stats(model, batches, names).save(folder / FILE)

    if is_deepspeed_zero3_enabled() and on_main(lambda: not is_made("stats", key)):
        with gathered_in_turn(model):  # by all processes together, and then written by one
            collected = collect_stats(model, list(_batches(first, part.batch_size, collate)), names)
        return InputStats.load(made_once("stats", key, lambda folder: collected.save(folder / FILE)) / FILE)
    return InputStats.load(made_once("stats", key, make) / FILE)


def run_gradients(model: nn.Module, rows: Rows, collate: Any, part: StatsPart, wanted: WantedStats) -> GradientStats:
    """Triplets of a model's mean gradients on the first training rows; read from the cache where they are there.

    Args:
        model: without an adapter, where it computes, giving a loss for a batch.
        rows: tokenised training rows, in the run's order.
        collate: rows to a batch.
        part: how many batches, and rows a batch.
        wanted: of which layers, and how many triplets.

    Raises:
        CoreLoraError: there is no row, no layer matches, or ZeRO-3 shares the model out.
    """
    if is_deepspeed_zero3_enabled():
        raise CoreLoraError(
            "stats: under ZeRO-3 no gradients can be collected before training, for the weights are shared out. "
            "Collect them with corelora.collect_gradients in a process of their own, save them, and give "
            "method.stats the file."
        )
    first, names = _first(rows, part), _names(wanted.targets)
    about = [_content(rows, first), len(first), part.batch_size, names, wanted.rank, wanted.seed]

    def make(folder: Path) -> None:
        batches = list(_batches(first, part.batch_size, collate))
        collect_gradients(model, batches, wanted.rank, names, seed=wanted.seed).save(folder / FILE)

    return GradientStats.load(made_once("stats", key_of("gradients", _fingerprint(model), about), make) / FILE)


def _first(rows: Rows, part: StatsPart) -> list[dict[str, Any]]:
    count = min(part.batches * part.batch_size, len(rows.dataset))
    if count == 0:
        raise CoreLoraError("stats: there is no training row to collect statistics from")
    return [rows.dataset[n] for n in range(count)]


def _names(targets: Any) -> list[str] | None:
    return sorted(targets) if isinstance(targets, (list, set, tuple)) else None


def _content(rows: Rows, first: list[dict[str, Any]]) -> Any:
    """What names the rows."""
    return rows.fingerprint or [row["input_ids"] for row in first]


@contextmanager
def gathered_in_turn(model: nn.Module) -> Iterator[None]:
    """Let a model that ZeRO-3 has shared out, and no engine runs yet, compute: each module is gathered for its pass.

    Without ZeRO-3 nothing happens.

    Args:
        model: all processes run it on the same batches.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    open_ones: list[AbstractContextManager[None]] = []

    def before(module: nn.Module, args: Any) -> None:
        context = gathered(module)
        context.__enter__()
        open_ones.append(context)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        open_ones.pop().__exit__(None, None, None)

    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    handles = [m.register_forward_pre_hook(before) for m in owners] + [m.register_forward_hook(after) for m in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(rows: list[dict[str, Any]], size: int, collate: Any) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), size):
        yield collate(rows[start : start + size])


@torch.no_grad()
def _fingerprint(model: nn.Module) -> list[Any]:
    """Names, shapes and a few entries of every parameter."""
    found = []
    for path, module in model.named_modules():
        with gathered(module):
            found += [[f"{path}.{n}", *_print(p)] for n, p in module.named_parameters(recurse=False)]
    return found


def _print(parameter: nn.Parameter) -> tuple[list[int], list[float]]:
    flat = parameter.detach().reshape(-1)
    # In float64: float32 has no whole numbers of its own above 2^24, and would name a place behind the last one.
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLED, flat.numel()), dtype=torch.float64).long()
    places = places.to(flat.device)
    return list(parameter.shape), flat[places].double().tolist()
