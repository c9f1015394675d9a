"""Variants of one piece of work on a GPU, timed in turns: what else the machine does meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

TURNS, CALLS = 6, 10


def in_turns(variants: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds of one call of each variant, the median of six turns of ten calls."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(TURNS + 1):
        for name, work in variants.items():
            took = _timed(work)
            times[name] += [took] if turn else []  # the first turn chooses kernels
    return {name: round(median(values), 1) for name, values in times.items()}


def _timed(work: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / CALLS * 1000
