"""Where a study's runs can be made, and what each takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from joblib import cpu_count
from tqdm.auto import tqdm

from corelora.compare.pool import Device, process_context
from corelora.compare.work import Work
from corelora.errors import CoreLoraError
from corelora.plan_memory import GIB
from corelora.recipe import Recipe
from corelora.recipe.tree import as_data
from corelora.train.memory import room, step_memory
from corelora.train.out_of_memory import is_out_of_memory
from corelora.train.tasks import TASKS

CONTEXT = 0.8 * GIB  # of a CUDA process itself, with the libraries that it loads
MARGIN = 1.15  # over the estimate: tests, fragments
CORES = 2  # of the CPU, for each run on a GPU


class Memory:
    """What runs are expected to take, estimated once for all rates and seeds of a setting, by several processes.

    Args:
        devices: where the runs will be.
        jobs: runs at a time on each device, if the user says so.
    """

    def __init__(self, devices: Sequence[Device], jobs: int | None) -> None:
        self.on_cpu = devices[0].number is None
        self.share = min(d.free for d in devices) / jobs if jobs else None
        self.known: dict[str, float | None] = {}

    def of(self, works: Sequence[Work]) -> list[float | None]:
        """Bytes that each run is expected to take on a GPU; on a CPU 0, where the user says how many run.

        Where the user says how many run at a time, no run counts for more than an even share: estimates are of the
        longest rows and can be twice what is taken. What can't be estimated (pictures) is such a share, too; where the
        user says nothing it is None, and the run is alone.

        Args:
            works: the runs.
        """
        if self.on_cpu:
            return [0.0] * len(works)
        keys = [without_rates(work.recipe) for work in works]
        new = {key: work.recipe for key, work in zip(keys, works, strict=True) if key not in self.known}
        if new:
            count = min(len(new), cpu_count())
            with ProcessPoolExecutor(count, mp_context=process_context()) as pool:
                made = pool.map(estimate, new.values())
                bar = tqdm(made, total=len(new), desc="memory", unit="setting", delay=2, leave=False)
                self.known |= dict(zip(new, bar, strict=True))
        return [self._at_most_a_share(self.known[key]) for key in keys]

    def _at_most_a_share(self, taken: float | None) -> float | None:
        given = [value for value in (taken, self.share) if value is not None]
        return min(given, default=None)


def estimate(recipe: Recipe) -> float | None:
    """Bytes of one run on a GPU with its process, or None where that can't be known."""
    try:
        config = TASKS[recipe.task].load_config(recipe)
        return MARGIN * step_memory(recipe, config, "cuda").peak + CONTEXT
    except CoreLoraError:
        return None  # the run itself will say what is wrong, if anything is


def find_devices(jobs: int | None) -> list[Device]:
    """Every GPU that there is, else the CPU.

    Args:
        jobs: runs at a time on each; None: on a GPU as many as fit and the cores feed, one on a CPU.
    """
    if not torch.cuda.is_available():
        return [Device(number=None, free=float("inf"), most=jobs or 1)]
    count = torch.cuda.device_count()
    most = jobs or max(1, cpu_count() // (CORES * count))
    return [Device(number=n, free=_room_of(n), most=most) for n in range(count)]


def without_rates(recipe: Recipe) -> str:
    """A recipe's text without what changes neither its memory nor whether it can be run."""
    data = as_data(dataclasses.replace(recipe, about="", output=None))
    data["optim"]["lr"] = data["loop"]["seed"] = None
    return json.dumps(data, sort_keys=True)


def _room_of(device: int) -> float:
    try:
        with torch.cuda.device(device):
            return float(room("cuda"))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CoreLoraError(f"GPU {device} is full: other processes hold all of its memory") from None
