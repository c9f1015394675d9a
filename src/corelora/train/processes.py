"""How the processes of one launch meet: before anything asks which is the main one, and the way Trainer meets them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from corelora.errors import CoreLoraError

T = TypeVar("T")

PATIENCE = 7200  # seconds that processes wait for each other: one tokenises for all


def meet() -> None:
    """Join the launch's process group, once; a run that was not launched by torchrun or accelerate is alone."""
    if PartialState._shared_state:
        return
    settings = placement()
    options: dict[str, Any] = {"cpu": True} if settings.get("use_cpu") else {}
    if "LOCAL_RANK" in os.environ:
        options |= {"timeout": timedelta(seconds=PATIENCE), "backend": settings.get("ddp_backend")}
    PartialState(**options)


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return PartialState().is_main_process


def launched() -> int:
    """Processes of this launch; known before they meet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shares_weights() -> bool:
    """Whether processes may hold parts of the weights each: FSDP and DeepSpeed, as accelerate's launcher says."""
    return _launched_with("FSDP") or _launched_with("DEEPSPEED")


def _launched_with(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def placement() -> dict[str, Any]:
    """TrainingArguments' settings of where to compute.

    Without an accelerator processes meet through gloo. accelerate does that by itself only where it is told that the
    run is on a CPU, which in turn switches DeepSpeed off; so DeepSpeed gets the backend's name instead.
    """
    settings: dict[str, Any] = {"ddp_timeout": PATIENCE}
    if torch.accelerator.is_available():
        return settings
    if not _launched_with("DEEPSPEED"):
        settings["use_cpu"] = True  # without it, bfloat16 is refused there too
    if "LOCAL_RANK" in os.environ:
        settings["ddp_backend"] = "gloo"
    return settings


def on_main(function: Callable[[], T]) -> T:
    """Call a function on the main process; its result, or its CoreLoraError, is every process's."""
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = function()
        except CoreLoraError as error:
            box[1] = str(error)
    broadcast_object_list(box)
    if box[1] is not None:
        raise CoreLoraError(box[1])
    return box[0]
