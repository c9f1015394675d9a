"""Clocks, spreads and memory: how a measurement is taken on whatever device it runs."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
import transformers

import corelora

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of measurements in milliseconds, and where the middle 80 % of them lie."""

    ms: float
    p10: float
    p90: float
    n: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """The spread of at least one measurement, in milliseconds."""
        row = sorted(times)
        tenth = len(row) // 10
        return cls(statistics.median(row), row[tenth], row[-1 - tenth], len(row))

    def rounded(self) -> dict[str, float]:
        """As plain numbers, to the microsecond below 10 ms and to a hundredth of a millisecond above."""
        digits = 3 if self.ms < 10 else 2
        return {k: v if k == "n" else round(v, digits) for k, v in asdict(self).items()}


class Device:
    """A device's clock and memory: CUDA events and the allocator on a GPU, the process's clock on a CPU."""

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
        if not self.is_gpu:
            began = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - began)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

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
        """Give back what nobody holds."""
        gc.collect()
        if self.is_gpu:
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
