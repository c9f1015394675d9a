"""Norms and spectra of what a run learned: the difference of its weights, adapter merged, to the pretrained ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from corelora.compare.standing import UPDATES
from corelora.recipe import Recipe, load_recipe
from corelora.train.folder import RunFolder, write_json
from corelora.train.methods import is_whole
from corelora.train.tasks import TASKS

VALUES = 32  # singular values kept of each layer


def measure_updates(folder: Path) -> list[dict[str, Any]]:
    """Measure each layer's update and write `updates.json` into a run's folder.

    In float32, whatever the run trained in: merged in bfloat16, small updates would drown in rounding.

    Args:
        folder: of a finished run.

    Returns:
        For each weight that changed: `layer`; `norm`, Frobenius, and `relative`, as a part of the weight's own;
        `stable_rank`, squared Frobenius over squared spectral norm; `values`, the largest singular values, descending.

    Raises:
        CoreLoraError: the weights can't be read.
    """
    run = RunFolder(folder)
    recipe = load_recipe(Recipe, run.recipe)
    recipe = replace(recipe, model=replace(recipe.model, dtype="float32", quantize=None))
    task = TASKS[recipe.task]
    config, processor = task.load_config(recipe), task.load_processor(recipe)
    full = is_whole(recipe.method)
    base = task.load_model(recipe, config, processor, None)
    tuned: Any = task.load_model(recipe, config, processor, str(run.weights(full)) if full else None)
    if not full:
        tuned = PeftModel.from_pretrained(tuned, str(run.weights(full))).merge_and_unload()
    before = dict(base.named_parameters())
    layers = []
    for name, layer in tqdm([*tuned.named_modules()], desc="updates", unit="module", delay=2, leave=False):
        old = before.get(f"{name}.weight")
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and old is not None and old.shape == layer.weight.shape:
            found = _measure(layer.weight.detach(), old.detach())
            layers += [{"layer": name, **found}] if found else []
    write_json(folder / UPDATES, {"layers": layers})
    return layers


def _measure(new: Tensor, old: Tensor) -> dict[str, Any] | None:
    """Figures of one weight's update; None where nothing changed.

    Args:
        new: weight after training [o, i].
        old: before [o, i].
    """
    change = (new.float() - old.float()).flatten(1)
    norm = float(torch.linalg.norm(change))
    if norm == 0:
        return None
    values = torch.linalg.svdvals(change)
    return {
        "norm": norm,
        "relative": norm / float(torch.linalg.norm(old.float())),
        "stable_rank": norm**2 / float(values[0]) ** 2,
        "values": [round(float(v), 7) for v in values[:VALUES]],
    }
