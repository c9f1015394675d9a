"""Clocks, spreads and memory: how a measurement is taken on whatever device it runs."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import peft
import torch
import transformers

import corelora

GIB = 2**30
Emit = Callable[[dict[str, Any]], None]  # takes one line of results as soon as it is known


class Bench(Protocol):
    """What all benches have in common.

    Attributes:
        left_out: why something that was asked for is not measured, by its name.
    """

    left_out: dict[str, str]

    def describe(self) -> dict[str, Any]:
        """What was asked for and on which machine: the first line of a file of results."""

    def run(self, emit: Emit) -> list[dict[str, Any]]:
        """Measure everything: `emit` takes each visit as soon as it is over, the results are returned."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of measurements, and where the middle 80 % of them lie."""

    median: float
    p10: float
    p90: float
    n: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """The spread of at least one measurement."""
        row = sorted(times)
        tenth = len(row) // 10
        return cls(statistics.median(row), row[tenth], row[-1 - tenth], len(row))

    def as_milliseconds(self) -> dict[str, float]:
        """As plain numbers: to the microsecond below 10 ms, to a hundredth of a millisecond above."""
        digits = 3 if self.median < 10 else 2
        numbers = {"ms": self.median, "p10": self.p10, "p90": self.p90}
        return {**{k: round(v, digits) for k, v in numbers.items()}, "n": self.n}


class Device:
    """A device's clock and memory: CUDA events and the allocator on a GPU, a clock on a CPU."""

    def __init__(self, name: str | None = None) -> None:
        self.kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
        self.is_gpu = self.kind == "cuda"

    @property
    def title(self) -> str:
        """The GPU's name, or the CPU's kind and how many threads PyTorch uses."""
        if self.is_gpu:
            return torch.cuda.get_device_name()
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"

    def time(self, work: Callable[[], Any]) -> float:
        """Milliseconds that `work` takes on the device, launches included."""
        return self.times(work, 1)[0]

    def times(self, work: Callable[[], Any], count: int) -> list[float]:
        """Milliseconds of each of several runs of `work`, one after the other.

        On a GPU nothing waits for it in between: the host may be ahead, as it is in a training loop, and what counts is
        the time from the end of one run to the end of the next.

        Args:
            work: measured.
            count: how often.
        """
        if not self.is_gpu:
            return [_clocked(work) for _ in range(count)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        self.settle()
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        self.settle()
        return [before.elapsed_time(after) for before, after in pairwise(marks)]

    def wall(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds on the host's clock until the device is done, what `work` gave)."""
        self.settle()
        began = time.perf_counter()
        result = work()
        self.settle()
        return time.perf_counter() - began, result

    def settle(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def start_peak(self) -> None:
        """Begin to watch the largest allocation."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """The largest allocation since `start_peak`, in GiB; None on a CPU, whose allocator doesn't tell."""
        return torch.cuda.max_memory_allocated() / GIB if self.is_gpu else None

    def tidy(self) -> None:
        """Give back GPU memory that nobody holds; a CPU's is returned by itself."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """The device and the versions that a result depends on."""
        versions = {
            "corelora": corelora.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        }
        return {"device": self.title, "versions": versions}


def _clocked(work: Callable[[], Any]) -> float:
    """Milliseconds on a CPU; with one thread the process's own, without what others do on the machine meanwhile."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    return 1000 * (clock() - began)
