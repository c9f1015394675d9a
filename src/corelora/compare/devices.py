"""Where a study's runs can be made, and what each takes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

import torch

from corelora.compare.pool import Device
from corelora.compare.work import Work
from corelora.errors import CoreLoraError
from corelora.plan_memory import GIB
from corelora.recipe import Recipe
from corelora.recipe.tree import as_data
from corelora.train.memory import room, step_memory
from corelora.train.tasks import TASKS

CONTEXT = 0.8 * GIB  # of a CUDA process itself, with the libraries that it loads
MARGIN = 1.15  # over the estimate: tests, fragments
CORES = 2  # of the CPU, for each run on a GPU


class Memory:
    """Estimates of what runs take, made once for all rates and seeds of a setting.

    Args:
        devices: where they will run.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self.kind = "cpu" if devices[0].number is None else "cuda"
        self.known: dict[str, float | None] = {}

    def of(self, work: Work) -> float | None:
        """Bytes of a run on a GPU, None where it can't be known; on a CPU 0, where the user says how many run."""
        if self.kind == "cpu":
            return 0.0
        key = without_rates(work.recipe)
        if key not in self.known:
            self.known[key] = self._estimate(work)
        return self.known[key]

    def _estimate(self, work: Work) -> float | None:
        try:
            config = TASKS[work.recipe.task].load_config(work.recipe)
            return MARGIN * step_memory(work.recipe, config, self.kind).peak + CONTEXT
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
    most = jobs or max(1, (os.cpu_count() or 1) // (CORES * count))
    return [Device(number=n, free=_room_of(n), most=most) for n in range(count)]


def without_rates(recipe: Recipe) -> str:
    """A recipe's text without what changes neither its memory nor whether it can be run."""
    data = as_data(dataclasses.replace(recipe, about="", output=None))
    data["optim"]["lr"] = data["loop"]["seed"] = None
    return json.dumps(data, sort_keys=True)


def _room_of(device: int) -> float:
    with torch.cuda.device(device):
        return float(room("cuda"))
