"""The end of a run: its weights as a folder that appears whole, and its figures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from corelora.recipe import Recipe
from corelora.recipe.tree import as_data
from corelora.train.folder import RunFolder, versions
from corelora.train.methods import is_whole
from corelora.train.progress import memory_bytes
from corelora.train.tasks import TASKS, Rows

NOT_FIGURES = ("_runtime", "_per_second", "_preparation_time")


def save_weights(trainer: Any, folder: RunFolder, processor: Any, recipe: Recipe) -> None:
    """Write adapter/ (or model/) with the tokenizer or processor; on all processes, as sharded weights are gathered."""
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    path = folder.weights(is_whole(recipe.method))
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    TASKS[recipe.task].save(trainer.accelerator.unwrap_model(trainer.model), temporary, processor, state)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(temporary, path)


def summarize(
    trainer: Any, recipe: Recipe, rows: Mapping[str, Rows], metrics: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The figures of a finished run.

    Args:
        trainer: after training.
        recipe: the run's.
        rows: what it was trained and tested on.
        metrics: Trainer's own figures.
        seconds: of the whole run.
    """
    parameters = list(trainer.model.parameters())
    tokens, runtime = trainer.state.num_input_tokens_seen, metrics.get("train_runtime")
    return {
        "task": recipe.task,
        "method": recipe.method["name"],
        "steps": trainer.state.global_step,
        "train_loss": metrics.get("train_loss"),
        **{k: v for k, v in metrics.items() if k.startswith("test_") and not k.endswith(NOT_FIGURES)},
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / runtime, 1) if runtime else None,
        "peak_memory": memory_bytes(),
        "seed": recipe.loop.seed,
        "recipe_fingerprint": fingerprint(recipe),
        "rows": {which: dict(made.counts) for which, made in rows.items()},
        "versions": versions(),
    }


def fingerprint(recipe: Recipe) -> str:
    """A short hash of everything that a recipe says."""
    text = json.dumps(as_data(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
