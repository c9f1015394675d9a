"""Checkpoints that are whole or not there: staged, written through to the disk, listed with sizes and hashes, renamed.

A run's folder `checkpoints/` holds `checkpoint-STEP` folders. Each is what transformers' Trainer saves, and
  manifest.json    every file with its size and SHA-256, the step, and what the run must have in common to go on
  metrics.jsonl    the run's metrics up to this step
  running_R.json   the loss of process R that is summed but not logged yet
A checkpoint is trusted only where every file is as its manifest says.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from corelora.errors import CoreLoraError
from corelora.fold import settle
from corelora.train.disk import raise_if_full

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
STAGING = ".unfinished"
PREFIX = "checkpoint-"
CHUNK = 1 << 22  # bytes read at once


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps made.
        about: what the run wrote about itself into the manifest.
    """

    path: Path
    step: int
    about: Mapping[str, Any] = field(default_factory=dict)


def newest_whole(root: Path, tell: Callable[[str], None] = print) -> Checkpoint | None:
    """The checkpoint with the most steps whose files are all as they were written.

    Args:
        root: the folder of checkpoints; it need not exist.
        tell: gets one line for each newer one that is passed over, with the reason.
    """
    for path in reversed(_listed(root)):
        try:
            return read_checkpoint(path)
        except CoreLoraError as error:
            tell(f"passed over: {error}")
    return None


def newest_checkpoint(root: Path) -> Path | None:
    """The checkpoint with the most steps that has a manifest, its files not looked at; None where there is none."""
    listed = [p for p in _listed(root) if (p / MANIFEST).is_file()]
    return listed[-1] if listed else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Compare every file with the manifest.

    Raises:
        CoreLoraError: the manifest is missing or cut, or a file is missing, of another size or of other content.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, step, about = manifest["files"], int(manifest["step"]), manifest["about"]
    except FileNotFoundError:
        raise CoreLoraError(f"{path} has no {MANIFEST}: it was not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CoreLoraError(f"{path / MANIFEST} can't be read ({error})") from None
    for name, expected in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size is None:
            raise CoreLoraError(f"{path} lacks its file {name}")
        if size != expected["bytes"]:
            raise CoreLoraError(f"{path / name} has {size} bytes, was written with {expected['bytes']}")
    for name, digest in _digests(path, files, "checking the checkpoint"):
        if digest != files[name]["sha256"]:
            raise CoreLoraError(f"{path / name} is not what was written: its SHA-256 differs")
    return Checkpoint(path, step, about)


def seal(folder: Path, step: int, about: Mapping[str, Any]) -> None:
    """Write every file below `folder` through to the disk, and then the manifest that lists them.

    Args:
        folder: a complete checkpoint under a temporary name.
        step: optimizer steps made.
        about: kept in the manifest; JSON.
    """
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    for name in files:
        _sync(folder / name)
    listed = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in _digests(folder, files, "sealing the checkpoint")
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"step": step, "about": dict(about), "files": listed}, file, indent=1)
    _sync(folder / MANIFEST)
    for directory in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _sync(directory)


def publish(staged: Path, final: Path) -> None:
    """Give a sealed checkpoint its name. What has that name is a broken one of a run that went back behind it."""
    if final.exists():
        shutil.rmtree(final)
    os.rename(staged, final)
    _sync(final.parent)


def prune(root: Path, newest: Path, keep: int | None) -> None:
    """Delete what a new checkpoint makes superfluous; called once that one is whole and has its name.

    Args:
        root: the folder of checkpoints.
        newest: the new one. Those with more steps are of a way that the run has left: it passed over them.
        keep: how many stay, `newest` among them; all where None.
    """
    listed = _listed(root)
    upto = listed.index(newest) + 1
    old = listed[: max(upto - keep, 0)] if keep else []
    for path in old + listed[upto:]:
        shutil.rmtree(path)


def restore_metrics(checkpoint: Checkpoint | None, metrics: Path) -> None:
    """Cut metrics.jsonl back to what it was at the checkpoint; without one the file begins anew."""
    if checkpoint is None:
        metrics.unlink(missing_ok=True)
        return
    kept = checkpoint.path / METRICS
    temporary = metrics.with_name(f".{metrics.name}.tmp")
    temporary.write_bytes(kept.read_bytes() if kept.is_file() else b"")
    os.replace(temporary, metrics)


@dataclass
class Running:
    """The training loss as it is summed: Trainer forgets its own between two processes.

    Attributes:
        loss: sum over the steps since the last log, of this process; float32, on its device.
        steps: of the run at the last log.
        total: sum over all logged steps, mean of the processes.
    """

    loss: Tensor | None = None
    steps: int = 0
    total: float = 0.0

    def add(self, loss: Tensor) -> None:
        """One more forward pass; bfloat16 would not hold the sum of many."""
        new = loss.detach().float()
        self.loss = new if self.loss is None else self.loss + new

    def as_data(self) -> dict[str, float | int]:
        """JSON holds a float32 exactly."""
        return {"loss": float(self.loss) if self.loss is not None else 0.0, "steps": self.steps, "total": self.total}


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints appear whole or not at all, and whose logged losses go on where a run was cut.

    Args:
        metrics: the run's metrics.jsonl, of which each checkpoint keeps a copy.
        about: what a run that goes on must have in common with this one; JSON, kept in the manifest.
        **options: Trainer's own. `args.output_dir` is the folder of checkpoints, `args.save_total_limit` how many
            of them stay.
    """

    def __init__(self, *, metrics: Path | None = None, about: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.metrics_path, self.about = metrics, dict(about or {})
        self.running = Running()
        self._staging: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return Path(str(self.args.output_dir))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As Trainer's, from a folder that `newest_whole` found.

        From a checkpoint of the last step nothing is trained, only loaded.
        """
        if isinstance(resume_from_checkpoint, str):
            self._load_running(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except _NothingLeft:
            self.is_in_train = False
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            loss = self._train_loss()
            return TrainOutput(self.state.global_step, loss, {"train_loss": loss})

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As Trainer's, the loss kept in `running`."""
        if self.state.global_step >= self.state.max_steps:  # Trainer makes one step before it asks
            raise _NothingLeft
        loss = self.passes(model, inputs, num_items_in_batch)
        self.running.add(loss)
        return loss

    def passes(self, model: nn.Module, inputs: Any, items: Any) -> Tensor:
        """Forward and backward pass of one batch: Trainer's training step, which nothing of ours is part of."""
        return super().training_step(model, inputs, items)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the losses of the whole run in place of those since this process began."""
        if "loss" in logs:
            loss, steps = self._mean_over_processes(), self.state.global_step - self.running.steps
            logs["loss"] = loss / steps
            self.running = Running(None, self.state.global_step, self.running.total + loss)
        if "train_loss" in logs:
            logs["train_loss"] = self._train_loss()
        super().log(logs, start_time)

    def _train_loss(self) -> float:
        return (self.running.total + self._mean_over_processes()) / max(self.state.global_step, 1)

    def _mean_over_processes(self) -> float:
        loss = self.running.loss
        own = torch.zeros((), device=self.args.device) if loss is None else loss
        return float(self.accelerator.gather(own.reshape(1)).mean())

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, Trainer writes below the temporary name."""
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's own files under a temporary name, ours beside them; then sealed and renamed by one process."""
        name = f"{PREFIX}{self.state.global_step}"
        staging = self.checkpoints / STAGING
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
            (staging / name).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            self._save_running(staging / name)
            settle(model)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._finish(staging / name)
        except Exception as error:
            raise_if_full(staging, error)
            raise
        finally:
            self._staging = None
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _finish(self, staged: Path) -> None:
        (staged / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing here reads
        if self.metrics_path is not None and self.metrics_path.is_file():
            shutil.copyfile(self.metrics_path, staged / METRICS)
        seal(staged, self.state.global_step, self.about)
        publish(staged, self.checkpoints / staged.name)
        prune(self.checkpoints, self.checkpoints / staged.name, self.args.save_total_limit)

    def _save_running(self, folder: Path) -> None:
        path = folder / _running_name(self.args.process_index)
        path.write_text(json.dumps(self.running.as_data()), encoding="utf-8")

    def _load_running(self, folder: Path) -> None:
        path = folder / _running_name(self.args.process_index)
        step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
        if not path.is_file():  # a checkpoint of plain Trainer
            self.running = Running(None, step, 0.0)
            return
        data = json.loads(path.read_text(encoding="utf-8"))
        loss = torch.tensor(data["loss"], dtype=torch.float32, device=self.args.device)
        self.running = Running(loss, data["steps"], data["total"])


class _NothingLeft(Exception):
    """All steps of the run are made."""


def _running_name(process: int) -> str:
    return f"running_{process}.json"


def _listed(root: Path) -> list[Path]:
    """The folders that look like checkpoints, fewest steps first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def _digests(folder: Path, names: Any, what: str) -> Iterator[tuple[str, str]]:
    """SHA-256 of each file, with a bar where that takes long."""
    total = sum((folder / name).stat().st_size for name in names)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for name in names:
            yield name, _digest(folder / name, bar)


def _digest(path: Path, bar: Any) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Write a file or folder through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
