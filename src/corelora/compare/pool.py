"""Several runs at a time: as many as fit on each GPU by an estimate of their memory, or as many as the user says."""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from joblib import cpu_count
from tqdm.auto import tqdm

from corelora.compare.standing import FAILED, LOG, write_failed
from corelora.compare.work import Place, Work, child

POLL = 0.2  # seconds
MORE = 1.5  # times what was expected of each run, once one had too little memory beside others
PRELOADED = ["corelora.train.run", "corelora.evaluate.run", "corelora.evaluate.subject"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Work and the memory that it is expected to take, in bytes; None: it runs alone on its device."""

    work: Work
    memory: float | None


@dataclass(kw_only=True)
class Device:
    """A GPU, or the CPU, and what runs on it.

    Attributes:
        number: of the GPU; None for the CPU.
        free: bytes that runs may take together.
        most: runs at a time, whatever fits.
    """

    number: int | None
    free: float
    most: int
    running: list[Running] = field(default_factory=list)

    def has_room(self, task: Task, margin: float = 1.0) -> bool:
        """Whether a task can begin here now.

        Args:
            task: what would run.
            margin: over what is expected of each run.
        """
        if not self.running:
            return True
        if len(self.running) >= self.most:
            return False
        taken = [task.memory, *(r.task.memory for r in self.running)]
        return all(t is not None for t in taken) and margin * sum(t or 0.0 for t in taken) <= self.free


@dataclass(kw_only=True)
class Running:
    """A process at work."""

    task: Task
    process: Any
    alive: Connection  # our end; closing it ends the process
    neighbours: bool = False  # others ran beside it at some time
    margin: float = 1.0  # over what was expected of each run when it began


def process_context() -> Any:
    """How processes begin: a server that has imported everything once forks them; where there is none, each imports."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        # Imports must not wake CUDA: forks could not use it.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        context.set_forkserver_preload(PRELOADED)
    return context


def threads_of(runs: int) -> int:
    """CPU threads that each of some runs may take.

    No more together than the container may use, whatever the machine has: threads that wait for one another's cores
    make a run dozens of times slower. And no more each than torch takes here, which OMP_NUM_THREADS can say.

    Args:
        runs: at a time.
    """
    return max(1, min(torch.get_num_threads(), cpu_count() // runs))


class Pool:
    """Works through tasks on devices.

    Args:
        devices: where.
        say: takes one line for each run that ended.
        until: no run begins after this moment of `time.monotonic()`; those that run are finished.
    """

    def __init__(self, devices: Sequence[Device], say: Callable[[Task], None], until: float = math.inf) -> None:
        self.devices, self.say, self.until = list(devices), say, until
        self.margin = 1.0  # over what is expected of each run
        self.threads = threads_of(sum(d.most for d in self.devices))
        self.context = process_context()

    def run(self, tasks: Sequence[Task], more: Callable[[], Sequence[Task]] = tuple) -> None:
        """Make all runs; one that fails is written down, and the others go on.

        An interruption ends the running processes; what they had saved is gone on from the next time.

        Args:
            tasks: the runs to begin with.
            more: asked when runs have ended: what follows from them.
        """
        waiting = list(tasks)
        with tqdm(total=len(waiting), desc="study", unit="run", dynamic_ncols=True) as bar:
            try:
                while (waiting and time.monotonic() < self.until) or any(d.running for d in self.devices):
                    self._fill(waiting)
                    new = more() if self._collect(waiting, bar) else ()
                    waiting[:0] = new  # first: so that what was begun becomes whole
                    bar.total = (bar.total or 0) + len(new)
                    time.sleep(POLL)
            finally:
                self._end_all()

    def _collect(self, waiting: list[Task], bar: Any) -> bool:
        """Take out what has ended; what had too little memory beside others goes back into the queue.

        Returns:
            Whether a run is over.
        """
        over = False
        for ended in self._ended():
            if self._again(ended):
                waiting.append(ended.task)
            else:
                over = True
                bar.update()
                self.say(ended.task)
        return over

    def _fill(self, waiting: list[Task]) -> None:
        for device in self.devices if time.monotonic() < self.until else ():
            while task := next((t for t in waiting if device.has_room(t, self.margin)), None):
                waiting.remove(task)
                self._start(device, task)

    def _start(self, device: Device, task: Task) -> None:
        theirs, ours = self.context.Pipe(duplex=False)
        place = Place(device=device.number, threads=self.threads)
        process = self.context.Process(target=child, args=(task.work, place, theirs))
        process.start()
        theirs.close()
        for other in device.running:
            other.neighbours = True
        beside = bool(device.running)
        device.running.append(Running(task=task, process=process, alive=ours, neighbours=beside, margin=self.margin))

    def _ended(self) -> list[Running]:
        ended = [(d, r) for d in self.devices for r in d.running if not r.process.is_alive()]
        for device, running in ended:
            device.running.remove(running)
            running.process.join()
            running.alive.close()
            self._write_down(running)
        return [r for _, r in ended]

    @staticmethod
    def _write_down(running: Running) -> None:
        """A process that was killed could not say so itself."""
        folder, code = running.task.work.folder, running.process.exitcode
        if code and not (folder / FAILED).is_file():
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            what = f"signal {-code}" if code < 0 else f"exit code {code}"
            # The system ends what takes too much memory with this signal.
            kind = "memory" if code == -9 else "other"
            write_failed(folder, f"its process ended with {what}; see {folder / LOG}", kind, now)

    def _again(self, ended: Running) -> bool:
        """Whether a run is tried again: one that had too little memory beside others, with fewer of them.

        From then on each run counts for more; at last none fits beside another, and one that fails alone has failed.
        """
        path = ended.task.work.folder / FAILED
        if not ended.neighbours or not path.is_file() or '"kind": "memory"' not in path.read_text(encoding="utf-8"):
            return False
        path.unlink()
        if ended.margin == self.margin:  # else others that began with it have said so already
            self.margin *= MORE
            tqdm.write("memory was short: fewer runs at a time from here on", file=sys.stderr)
        return True

    def _end_all(self) -> None:
        for device in self.devices:
            for running in device.running:
                running.process.terminate()
                running.process.join()
                running.alive.close()
            device.running.clear()
