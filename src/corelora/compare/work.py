"""One run of a study in a process of its own: train, evaluate, measure; what fails is written down.

A process a run, because whatever one leaves behind (memory, compiled code, switches, a crash) must not reach the next.
"""

from __future__ import annotations

import datetime
import os
import shutil
import sys
import threading
import traceback
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

from corelora.compare.known import forget_known
from corelora.compare.standing import FAILED, LOG, UPDATES, write_failed
from corelora.compare.study import Finalists
from corelora.errors import CoreLoraError
from corelora.evaluate.suites import load_suite
from corelora.recipe import Recipe
from corelora.train.out_of_memory import is_out_of_memory

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process does.

    Attributes:
        recipe: the run's.
        folder: the run's.
        finals: of a finalist: what each group that chose it wants evaluated and measured afterwards.
        keep_models: keep the weights of fully fine-tuned models, which are as large as the model each.
    """

    recipe: Recipe
    folder: Path
    finals: tuple[Finalists, ...] = ()
    keep_models: bool = False

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to do."""
        return (self.folder / "results.json").is_file() and not self.wants_weights

    def left_suites(self, final: Finalists) -> list[str]:
        """Suites, by name or path as the study has them, without a result file under the protocol that it wants."""
        made = {p.stem for p in (self.folder / "eval").glob("*.json")}
        return [suite for suite in final.suites if _result_name(suite, final.protocol) not in made]

    @property
    def wants_weights(self) -> bool:
        """Whether something is still to be done with the run's weights."""
        return self.left_updates or any(self.left_suites(final) for final in self.finals)

    @property
    def left_updates(self) -> bool:
        """Whether updates are still to be measured."""
        return any(final.updates for final in self.finals) and not (self.folder / UPDATES).is_file()


@cache
def _result_name(suite: str, protocol: str | None) -> str:
    """What an evaluation's file is called: a suite that is given by its path has a name of its own."""
    loaded = load_suite(suite)
    return f"{loaded.name}-{loaded.protocol(protocol)[0]}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process runs: a GPU's number, or None, and how many CPU threads it may take."""

    device: int | None
    threads: int


def child(work: Work, place: Place, alive: Connection) -> None:
    """The process's main function; its exit code says how it went.

    Args:
        work: what is done.
        place: where.
        alive: nothing is ever sent on it; it closes when the study's process ends, however that happens.
    """
    work.folder.mkdir(parents=True, exist_ok=True)
    if work.wants_weights or not (work.folder / "results.json").is_file():
        forget_known(work.folder)
    _log_to(work.folder / LOG)
    _end_with(alive)
    if place.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(place.device)
    (work.folder / FAILED).unlink(missing_ok=True)
    try:
        _do(work, place.threads)
    except Exception as error:
        traceback.print_exc()
        ours = isinstance(error, CoreLoraError)  # its advice begins with these words
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        kind = "memory" if is_out_of_memory(error) or (ours and OUT_OF_MEMORY in text) else "other"
        write_failed(work.folder, text, kind, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
        sys.exit(1)


def tidy_trained(root: Path) -> None:
    """Remove the checkpoints of runs with results: a process can be killed between the two.

    Args:
        root: the study's folder.
    """
    for results in root.glob("runs/*/results.json"):
        _tidy(results.parent)


def _tidy(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def drop_model(folder: Path) -> None:
    """Remove a run's fully fine-tuned model, if it has one.

    Args:
        folder: the run's.
    """
    shutil.rmtree(folder / "model", ignore_errors=True)


def _do(work: Work, threads: int) -> None:
    # Here: the study's own process never needs them, and a GPU must be chosen before they look for one.
    import torch

    from corelora.train.run import train

    torch.set_num_threads(threads)
    if not (work.folder / "results.json").is_file():
        train(work.recipe, work.folder)
        _tidy(work.folder)
    if work.left_updates:
        from corelora.compare.updates import measure_updates

        measure_updates(work.folder)
    for final in work.finals:
        if left := work.left_suites(final):
            _evaluate(work, final, left)
    if not work.keep_models:
        drop_model(work.folder)


def _evaluate(work: Work, final: Finalists, names: list[str]) -> None:
    from corelora.evaluate.job import Settings
    from corelora.evaluate.run import evaluate
    from corelora.evaluate.subject import find_subject
    from corelora.evaluate.suites import load_suite, with_data

    settings = Settings(limit=final.limit)
    suites = with_data([load_suite(name) for name in names], final.data)
    evaluate(find_subject(str(work.folder)), suites, final.protocol, settings)


def _log_to(path: Path) -> None:
    """Everything that the process prints, by whatever library, goes to a file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _end_with(alive: Connection) -> None:
    """Leave at once when the study's process is gone: nobody would see what comes, or start the next run."""

    def wait() -> None:
        try:
            alive.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _visible(device: int) -> str:
    """The name of a GPU among those that this process may use."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[device] if names else str(device)
