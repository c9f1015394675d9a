"""Where the run in a folder stands: not begun, cut off after some step, or finished; and whether it is the same run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from corelora.errors import CoreLoraError
from corelora.recipe import Recipe, read_tree
from corelora.recipe.tree import as_data
from corelora.train.checkpoints import Checkpoint, newest_checkpoint, newest_whole, restore_metrics
from corelora.train.disk import disk_errors
from corelora.train.folder import RunFolder, versions
from corelora.train.lock import locked
from corelora.train.methods import is_whole
from corelora.train.processes import on_main
from corelora.train.progress import read_metrics
from corelora.train.story import say

# What may differ when a run goes on: nothing here touches an update. (`test_every` is no such key: each test draws a
# seed for its order of rows from the generator that dropout draws from.)
HARMLESS = (
    "about",
    "output",
    "data.workers",
    "loop.keep",
    "loop.log_every",
    "loop.report_to",
    "loop.save_every",
    "loop.test_batch_size",
)
NUMERICS = ("torch", "transformers", "peft", "accelerate", "corelora", "device", "threads")


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes:
        results: of a finished run.
        checkpoint: where an unfinished one goes on.
        seconds: that it has trained, up to there.
    """

    results: dict[str, Any] | None = None
    checkpoint: Checkpoint | None = None
    seconds: float = 0.0

    def check_same(self, about: Mapping[str, Any]) -> None:
        """Compare what a run has in common with its beginning.

        Args:
            about: as it is now: number of processes, fingerprint of the rows.

        Raises:
            CoreLoraError: something is different, so that the order of the rows would be.
        """
        before = self.checkpoint.about if self.checkpoint else {}
        changed = [f"{k} was {before[k]}, is {about[k]}" for k in about if k in before and before[k] != about[k]]
        if changed and self.checkpoint:
            raise CoreLoraError(
                f"{self.checkpoint.path} can't be gone on from: {'; '.join(changed)}. Set it back, or give another "
                "--output"
            )


@contextmanager
def held(folder: RunFolder, recipe: Recipe) -> Iterator[Standing]:
    """Hold a run folder while its run is made, and say where that stands; the same on all processes.

    Raises:
        CoreLoraError: another process holds it, it can't be written, or it holds a run of another recipe; while it is
            held, a disk that is full or refuses.
    """
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(locked(folder.root)))
        stack.enter_context(disk_errors(folder.root, lambda: newest_checkpoint(folder.checkpoints)))
        yield on_main(lambda: look(folder, recipe))


def look(folder: RunFolder, recipe: Recipe) -> Standing:
    """Where the run in a folder stands. An unfinished one has its metrics cut back to where it goes on.

    Raises:
        CoreLoraError: the folder holds another run, or something that is no run.
    """
    finished = is_finished(folder, recipe)
    checkpoint = None if finished else newest_whole(folder.checkpoints, say)
    raise_if_another(folder, recipe, begun=finished or checkpoint is not None)
    if finished:
        return Standing(results=json.loads(folder.results.read_text(encoding="utf-8")))
    restore_metrics(checkpoint, folder.metrics)
    if checkpoint is None:
        return Standing()
    rows = read_metrics(folder.metrics)
    say(f"going on after step {checkpoint.step}, from {checkpoint.path}")
    for line in _drift(folder):
        say(line)
    return Standing(checkpoint=checkpoint, seconds=rows[-1]["seconds"] if rows else 0.0)


def is_finished(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether a run has ended in this folder."""
    return folder.results.is_file() and folder.weights(is_whole(recipe.method)).is_dir()


def raise_if_another(folder: RunFolder, recipe: Recipe, begun: bool) -> None:
    """Refuse a folder with another run, or with something that is no run.

    Args:
        folder: of the run, which need not exist.
        recipe: the run's.
        begun: there are results or a checkpoint to go on from; else a run is begun anew, of whatever recipe.

    Raises:
        CoreLoraError: says what is in it.
    """
    if folder.recipe.is_file() and not folder.versions.is_file():
        raise CoreLoraError(f"{folder.recipe} was not written by a run, which would replace it: give another --output")
    if not folder.recipe.is_file() and (foreign := [p for p in folder.made_in_training if p.exists()]):
        raise CoreLoraError(
            f"{folder.root} holds no recipe.yaml, so no run wrote its {', '.join(p.name for p in foreign)}, which this "
            "one would replace: give another --output"
        )
    if begun:
        _check_recipe(folder, recipe)


def changed_keys(before: Recipe, now: Recipe) -> list[str]:
    """The keys of two recipes that differ and matter, each with both values."""
    old, new = _flat(as_data(before)), _flat(as_data(now))
    keys = sorted(k for k in old | new if k not in HARMLESS)
    return [f"{k} was {_shown(old, k)}, is {_shown(new, k)}" for k in keys if old.get(k) != new.get(k)]


def _check_recipe(folder: RunFolder, recipe: Recipe) -> None:
    before, problems = read_tree(Recipe, yaml.safe_load(folder.recipe.read_text(encoding="utf-8")))
    if before is None:
        raise CoreLoraError(f"{folder.recipe} is of another version of corelora ({problems[0]}): give another --output")
    changed = changed_keys(before, recipe)
    if changed:
        raise CoreLoraError(
            f"{folder.root} holds a run of another recipe: {'; '.join(changed)}. Give another --output, or set "
            f"{'these keys' if len(changed) > 1 else 'this key'} back"
        )


def _drift(folder: RunFolder) -> list[str]:
    """What the figures depend on and is not as it was when the run began."""
    before, now = json.loads(folder.versions.read_text(encoding="utf-8")), versions()
    changed = [f"{k} {before[k]} -> {now.get(k)}" for k in NUMERICS if k in before and before[k] != now.get(k)]
    return [f"changed since it began, so it goes on but not bit for bit: {', '.join(changed)}"] if changed else []


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}" if path else key).items()}


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not given"
