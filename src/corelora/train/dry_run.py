"""Everything that can be known about a run before any weight is read: all mistakes at once, and what it will take."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import PretrainedConfig

from corelora.errors import CoreLoraError, UnknownSettingError, nearest, raise_all
from corelora.gradients import GradientStats
from corelora.plan_memory import GIB
from corelora.recipe import Recipe
from corelora.recipe.tree import as_data
from corelora.train import (  # noqa: F401  (they register themselves)
    classify,
    clip_few_shot,
    dreambooth,
    image_classification,
    instruct,
)
from corelora.train.arguments import precision_problems, trial_problems, weight_dtype
from corelora.train.checkpoints import newest_checkpoint
from corelora.train.folder import RunFolder
from corelora.train.graphs import graph_problems
from corelora.train.liger import liger_problems
from corelora.train.memory import changes_that_fit, meta_model, room, step_memory
from corelora.train.methods import clipped_ranks, is_whole, wanted_stats
from corelora.train.methods import problems as method_problems
from corelora.train.models import load_model_config, model_problems, positions
from corelora.train.optim import problems as optim_problems
from corelora.train.optim import rate_problems
from corelora.train.resume import is_finished, raise_if_another
from corelora.train.start_from import start_problems
from corelora.train.tasks import TASKS

NEED_TESTS = ("reduce_lr_on_plateau", "greedy")  # schedules that transformers steps after each test
STATES = 3  # a checkpoint holds the trained weights and, for AdamW, two states of their size


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about a run before its weights are.

    Attributes:
        config: the model's.
        trained, parameters: numbers that train, numbers in all, adapter included.
        trained_bytes: size of what trains.
        disk: bytes that checkpoints and the result will take.
        free: bytes free where the run folder will be.
        clipped: how many layers have a smaller rank than was asked for; None where none has.
    """

    config: PretrainedConfig
    trained: int
    parameters: int
    trained_bytes: int
    disk: int
    free: int
    clipped: str | None = None


def check(recipe: Recipe, output: Path) -> Facts:
    """Look at everything but the weights.

    Args:
        recipe: the run's.
        output: where its folder will be.

    Raises:
        CoreLoraError: every mistake at once: unknown names, settings, targets that match nothing, ranks that don't
            fit, types this machine lacks, missing files and columns, bad first rows, too little room on the disk.
    """
    found = [p for p in (TASKS.miss(recipe.task),) if p]
    found += method_problems(recipe.method)
    sound = not found  # only then there is a model to make
    optim = optim_problems(recipe.optim, recipe.method, recipe.loop.steps) + _test_problems(recipe)
    found += optim
    found += model_problems(recipe.model)
    found += _reporter_problems(recipe)
    found += start_problems(recipe.model, full=is_whole(recipe.method))
    data = TASKS[recipe.task].problems(recipe) + _length_problems(recipe) if recipe.task in TASKS else []
    found += data
    found += _gradient_problems(recipe) if sound and recipe.task in TASKS else []
    config = None
    try:
        known = recipe.task in TASKS and not data
        config = _config(recipe) if not known else TASKS[recipe.task].load_config(recipe)
        found += TASKS[recipe.task].processor_problems(recipe) if recipe.task in TASKS else []
    except CoreLoraError as error:
        found.append(str(error))
    precision = precision_problems(recipe, config)
    found += precision + liger_problems(recipe, config)
    found += graph_problems(recipe) if recipe.loop.graphs == "on" else []
    model = None
    if config is not None and sound:
        model, wrong = _on_meta(recipe, config)
        found += wrong
    found += _folder_problems(output)
    if config is not None and not (optim or precision):
        found += trial_problems(recipe, config, output)
    if config is None or model is None:
        raise_all(found, "recipe")
        raise AssertionError("a config or model is missing without a problem that says so")
    facts = _facts(recipe, config, model, output)
    if facts.disk > facts.free:
        found.append(
            f"output: {facts.disk / GIB:.2f} GiB are needed for checkpoints and the result, {facts.free / GIB:.2f} GiB "
            f"are free at {_existing(output)}; lower loop.keep, or choose another --output."
        )
    raise_all(found, "recipe")
    return facts


def plan(recipe: Recipe, output: Path) -> str:
    """What a run would do and take, for a reader; nothing is loaded and nothing written.

    Raises:
        CoreLoraError: as `check`.
    """
    facts = check(recipe, output)
    folder = RunFolder(output)
    finished, kept = is_finished(folder, recipe), newest_checkpoint(folder.checkpoints)
    raise_if_another(folder, recipe, begun=finished or kept is not None)
    standing = "a finished run: nothing would be done" if finished else f"a run that would go on after {kept}"
    loop = recipe.loop
    share = 100 * facts.trained / facts.parameters
    length = f"{loop.steps} steps" if loop.steps else f"{loop.epochs:g} epochs"
    dtype = str(weight_dtype(recipe.model, facts.config)).removeprefix("torch.")
    lines = [
        yaml.safe_dump(as_data(recipe), sort_keys=False, allow_unicode=True).rstrip(),
        "",
        f"model     {recipe.model.name}, {facts.parameters:,} parameters, weights in {recipe.model.quantize or dtype}",
        f"method    {recipe.method['name']}, {facts.trained:,} of them train ({share:.2f} %)",
        *([f"          {facts.clipped}"] if facts.clipped else []),
        *_long_rows(recipe, facts.config),
        f"length    {length} of {loop.batch_size} x {loop.accumulate} rows a device",
        *([f"folder    {output} holds {standing}"] if finished or kept else []),
        f"disk      {facts.disk / GIB:.2f} GiB of {facts.free / GIB:.2f} GiB free",
        *_memory_lines(recipe, facts.config),
    ]
    return "\n".join(lines)


def _long_rows(recipe: Recipe, config: PretrainedConfig) -> list[str]:
    """Some models can't read more tokens than they were made for, others only do so badly."""
    places = positions(config) if TASKS[recipe.task].reads_tokens else None
    if places is None or recipe.data.max_length <= places:
        return []
    return [f"          made for rows of {places:,} tokens, and data.max_length is {recipe.data.max_length:,}"]


def _memory_lines(recipe: Recipe, config: PretrainedConfig) -> list[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    space = room(device)
    try:
        peak = step_memory(recipe, config, device).peak
    except CoreLoraError as error:
        return [f"memory    {error}"]
    line = f"memory    about {peak / GIB:.2f} GiB at the peak of a step, {space / GIB:.2f} GiB on this {device} device"
    if peak <= space:
        return [line]
    fitting = changes_that_fit(recipe, config, device, space)
    advice = [f"          {' '.join(f'--set {s}' for s in c.settings)}   ({c.peak / GIB:.2f} GiB)" for c in fitting]
    return [
        f"{line}: it won't fit. What would, largest effect first:",
        *(advice or ["          nothing: a smaller model"]),
    ]


def _config(recipe: Recipe) -> PretrainedConfig:
    """The model's config where the data, or the task, is not known."""
    return TASKS[recipe.task].plain_config(recipe) if recipe.task in TASKS else load_model_config(recipe.model)


def _on_meta(recipe: Recipe, config: PretrainedConfig) -> tuple[nn.Module | None, list[str]]:
    """The model with its adapter, and why there is none, or what doesn't fit it."""
    try:
        model = meta_model(recipe, config)
    except (CoreLoraError, UnknownSettingError, ValueError, ImportError) as error:
        return None, [line.removeprefix("- ") for line in str(error).replace("\n  - ", "\n- ").splitlines()]
    return model, target_problems(recipe, model) + rate_problems(recipe.optim, model)


def target_problems(recipe: Recipe, model: nn.Module) -> list[str]:
    """Names in target_modules that no module ends with; PEFT itself is content where any one of them matches.

    Args:
        recipe: the run's.
        model: with its adapter, on any device.
    """
    targets = recipe.method.get("target_modules")
    if not isinstance(targets, list):
        return []
    names = {name for name, _ in model.named_modules()}
    last = sorted({name.rpartition(".")[2] for name in names if ".base_layer" not in name})
    found = []
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            guess = nearest(target.rpartition(".")[2], last)
            hint = f" Did you mean {guess!r}?" if guess else ""
            found.append(f"method.target_modules: no module is called {target!r}.{hint}")
    return found


def _facts(recipe: Recipe, config: PretrainedConfig, model: nn.Module, output: Path) -> Facts:
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in trained)
    return Facts(
        config=config,
        trained=sum(p.numel() for p in trained),
        parameters=sum(p.numel() for p in model.parameters()),
        trained_bytes=size,
        disk=size * (STATES * (recipe.loop.keep + 1) + 1),  # one more than is kept, while it is written
        free=shutil.disk_usage(_existing(output)).free + _replaced(output),
        clipped=clipped_ranks(model),
    )


def _reporter_problems(recipe: Recipe) -> list[str]:
    missing = [name for name in recipe.loop.report_to if importlib.util.find_spec(name) is None]
    return [f"loop.report_to: {name} is not installed. Install it with: pip install {name}" for name in missing]


def _gradient_problems(recipe: Recipe) -> list[str]:
    """A start from gradients where the model gives no loss."""
    wanted = wanted_stats(recipe.method)
    if wanted is None or wanted.kind != GradientStats.kind or TASKS[recipe.task].gives_loss:
        return []
    return [
        f"method.name: {recipe.method['name']} starts from first gradients, and in the task {recipe.task} the model "
        "gives no loss to take them of; give method.stats a file of corelora.collect_gradients, or take another method."
    ]


def _length_problems(recipe: Recipe) -> list[str]:
    """Rows to be grouped by lengths that they don't have."""
    if not recipe.data.group_by_length or TASKS[recipe.task].reads_tokens:
        return []
    return [f"data.group_by_length: rows of the task {recipe.task} are pictures, all of one size; leave it out."]


def _test_problems(recipe: Recipe) -> list[str]:
    """Settings that need tests along the way, which the recipe does not have."""
    loop, tests = recipe.loop, recipe.data.test is not None
    found = [] if tests or loop.test_every is None else ["loop.test_every: there are no test rows; give data.test."]
    if recipe.optim.schedule in NEED_TESTS and not (tests and loop.test_every):
        schedule = recipe.optim.schedule
        found.append(f"optim.schedule: {schedule} follows the test loss; give data.test and loop.test_every.")
    return found


def _replaced(output: Path) -> int:
    """Bytes of the checkpoints that are there already: a run that goes on puts its own in their place."""
    return sum(p.stat().st_size for p in RunFolder(output).checkpoints.rglob("*") if p.is_file())


def _folder_problems(output: Path) -> list[str]:
    existing = _existing(output)
    if not existing.is_dir():
        return [f"output: {existing} is a file, so {output} can't be a folder."]
    if not os.access(existing, os.W_OK):
        return [f"output: {existing} can't be written to."]
    return []


def _existing(path: Path) -> Path:
    """The path itself, or the nearest thing above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
