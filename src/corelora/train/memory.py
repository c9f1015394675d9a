"""Memory of a training step from shapes alone, and which changes of a recipe would make it fit.

The step is simulated as `corelora plan` does (`plan_memory`). What it does not know: autocast makes activations smaller
than counted, and a CPU run shares its memory with everything else.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from corelora.errors import CoreLoraError
from corelora.plan_memory import GIB, OPTIMIZERS, RESERVE, Step, StepMemory, StepSimulator, largest_batch
from corelora.recipe import Recipe
from corelora.train.graphs import has_graphs
from corelora.train.methods import (
    MANY_STEPS,
    adapter_config,
    freeze_below,
    is_corelora,
    is_head,
    is_whole,
    needs_stats,
    problems,
)
from corelora.train.optim import optimizer_name
from corelora.train.tasks import TASKS

# Bytes of a weight in storage: LLM.int8 has a scale a row; NF4 with quantised scales takes 4.127 bits (QLoRA paper).
QUANTIZED = {"8bit": 1.0, "4bit": 4.127 / 8}


Candidate = tuple[tuple[str, ...], Callable[[Recipe], Recipe]]  # settings, and what they do to a recipe


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of a recipe and the peak that it would have.

    Attributes:
        settings: as after --set, one or more.
        peak: bytes at the peak of a step.
    """

    settings: tuple[str, ...]
    peak: int


def meta_model(recipe: Recipe, config: PretrainedConfig) -> nn.Module:
    """The recipe's model with its adapter, on the meta device: shapes and names, no weights.

    Raises:
        CoreLoraError: targets that match nothing, ranks that don't fit, ....
    """
    task = TASKS[recipe.task]
    model = task.make_meta(recipe, config)
    if is_head(recipe.method):
        freeze_below(model, task.heads(model))
    if is_whole(recipe.method):
        return model
    # Statistics change no shape, so the weights' own stand in for them.
    method = {**recipe.method, "stats": "weight"} if needs_stats(recipe.method) else recipe.method
    steps = recipe.loop.steps or MANY_STEPS
    adapter = adapter_config(method, task.task_type, task.heads(model), steps, task.unused(model))
    assert adapter is not None
    try:
        if is_corelora(method):
            with torch.device("meta"):
                return get_peft_model(model, adapter)
        return get_peft_model(model, adapter, low_cpu_mem_usage=True)  # PEFT's way to leave out a start's values
    except CoreLoraError:
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        if "meta tensor" in str(error):
            name = recipe.method["name"]
            raise CoreLoraError(
                f"method.name: PEFT's {name} decomposes the weights as it is made, and what is checked before they are "
                "loaded can't be checked then; take another method."
            ) from None
        raise CoreLoraError(f"method: {' '.join(str(error).split())}") from None


def step_memory(recipe: Recipe, config: PretrainedConfig, device: str) -> StepMemory:
    """What is alive at the peak of one step of a recipe, with rows as long as data.max_length.

    Args:
        recipe: the run's.
        config: the model's.
        device: "cuda" or "cpu": whose path is counted.

    Raises:
        CoreLoraError: the model can't be simulated.
    """
    if not TASKS[recipe.task].reads_tokens:
        raise CoreLoraError(f"not known beforehand: steps of {recipe.task} can't be simulated")
    if (recipe.model.attention or "").startswith("flash"):  # its kernels want values; sdpa's hold about as much
        recipe = _with(recipe, "model", {"attention": None})
    step = Step(
        batch=recipe.loop.batch_size,
        length=recipe.data.max_length,
        optimizer=_optimizer(recipe),
        checkpointing=recipe.loop.checkpointing,
        device=device,
        fast=recipe.loop.fast,
    )
    model = meta_model(recipe, config)
    saved = _saved_by_quantizing(recipe, model)
    memory = StepSimulator(model, step.device, step.fast).measure(step)
    if device == "cuda" and has_graphs(recipe):  # what was recorded keeps its memory, beside passes that are not
        memory = replace(memory, activations=2 * memory.activations, logits=2 * memory.logits)
    return replace(memory, weights=memory.weights - saved)


def room(device: str) -> int:
    """Bytes that a step may take on this machine: of a GPU, what other processes leave."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - RESERVE
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether a whole model leaves a fifth of the device's memory free, enough to run it without gradients."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(t.numel() * t.element_size() for t in tensors) < 0.8 * room(device.type)


def changes_that_fit(recipe: Recipe, config: PretrainedConfig, device: str, space: int) -> list[Change]:
    """Changes of a recipe that would bring its peak under `space` bytes, largest effect first.

    Each is tried alone; where none is enough they are put together, the largest effect first, until the step fits. An
    empty list says that even all of them are too much.
    """
    tried: list[tuple[Change, Callable[[Recipe], Recipe]]] = []
    for settings, change in tqdm(_candidates(recipe), desc="what would fit", unit="change", delay=2, leave=False):
        peak = _peak(change(recipe), config, device)
        if peak is not None:
            tried.append((Change(settings=settings, peak=peak), change))
    tried.sort(key=lambda pair: pair[0].peak)
    alone = [change for change, _ in tried if change.peak <= space]
    if not alone:
        return _together(recipe, tried, (config, device, space))
    batches = [_largest_batch(recipe, c, (config, device, space)) if _is_batch(c) else c for c in alone]
    return sorted(batches, key=lambda change: change.peak)


def _is_batch(change: Change) -> bool:
    return change.settings[0].startswith("loop.batch_size=")


def _largest_batch(recipe: Recipe, one: Change, where: tuple[PretrainedConfig, str, int]) -> Change:
    """The largest batch that fits, in place of a batch of one row that does.

    By the line between one row and the recipe's batch; the peak is convex in the batch, so the line is not below it.
    """
    config, device, space = where
    rows, whole = recipe.loop.batch_size, _peak(recipe, config, device)
    if whole is None or whole <= one.peak:
        return one
    size = largest_batch((1, one.peak), (rows, whole), space)
    size = max((n for n in range(1, min(size, rows - 1) + 1) if rows % n == 0), default=1)
    settings, change = _smaller_batch(recipe, size)
    peak = _peak(change(recipe), config, device)
    return one if peak is None or peak > space else Change(settings=settings, peak=peak)


def _smaller_batch(recipe: Recipe, size: int) -> Candidate:
    """The rows of an update stay as many."""
    loop = recipe.loop
    values = {"batch_size": size, "accumulate": loop.accumulate * loop.batch_size // size}
    return _settings("loop", values), lambda r: _with(r, "loop", values)


def explain(recipe: Recipe, config: PretrainedConfig, device: str, space: int | None = None) -> str:
    """What to say after running out of memory: the estimate, and what would fit."""
    space = room(device) if space is None else space
    peak = _peak(recipe, config, device)
    size = f"about {peak / GIB:.2f} GiB a step" if peak is not None else "more than there is"
    first = f"out of memory: this recipe takes {size}, and there are {space / GIB:.2f} GiB."
    if not TASKS[recipe.task].reads_tokens:
        return f"{first} Try --set loop.checkpointing=true, or a smaller loop.batch_size with more loop.accumulate."
    fitting = changes_that_fit(recipe, config, device, space)
    if not fitting:
        return f"{first} No change of batch, checkpointing, type, storage and method makes it fit: use a smaller model."
    lines = [f"  - {' '.join(f'--set {s}' for s in c.settings)}   ({c.peak / GIB:.2f} GiB)" for c in fitting]
    return "\n".join([f"{first} What would fit, by estimate, largest effect first:", *lines])


def _together(recipe: Recipe, tried: list[Any], where: tuple[PretrainedConfig, str, int]) -> list[Change]:
    config, device, space = where
    settings: tuple[str, ...] = ()
    for change, apply in tried:
        if {s.partition("=")[0] for s in settings} & {s.partition("=")[0] for s in change.settings}:
            continue  # a larger change of the same key is in already
        recipe, settings = apply(recipe), (*settings, *change.settings)
        peak = _peak(recipe, config, device)
        if peak is not None and peak <= space:
            return [Change(settings=settings, peak=peak)]
    return []


def _candidates(recipe: Recipe) -> list[Candidate]:
    """Settings, and the function that makes them in a recipe."""
    loop, model = recipe.loop, recipe.model
    found: list[Candidate] = [_smaller_batch(recipe, 1)] if loop.batch_size > 1 else []

    def add(**parts: Mapping[str, Any]) -> None:
        settings = tuple(s for part, values in parts.items() for s in _settings(part, values))
        found.append((settings, lambda r: functools.reduce(lambda x, p: _with(x, *p), parts.items(), r)))

    if not loop.checkpointing:
        add(loop={"checkpointing": True})
    if model.dtype in ("auto", "float32") and model.quantize is None:
        # float32 arithmetic over smaller weights would be refused
        add(model={"dtype": "bfloat16"}, **({"loop": {"precision": "auto"}} if loop.precision == "float32" else {}))
    if not is_whole(recipe.method):
        for kind in ("8bit", "4bit"):
            if model.quantize is None or QUANTIZED[kind] < QUANTIZED[model.quantize]:
                add(model={"quantize": kind})
    for name in ("nlora", "inttune"):
        method = {**recipe.method, "name": name}
        if recipe.method.get("name") != name and not problems(method):
            found.append(((f"method.name={name}",), functools.partial(_with_method, method)))
    return found


def _settings(part: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{part}.{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items())


def _with(recipe: Recipe, part: str, values: Mapping[str, Any]) -> Recipe:
    return replace(recipe, **{part: replace(getattr(recipe, part), **values)})


def _with_method(method: dict[str, Any], recipe: Recipe) -> Recipe:
    return replace(recipe, method=method)


def _peak(recipe: Recipe, config: PretrainedConfig, device: str) -> int | None:
    try:
        return step_memory(recipe, config, device).peak
    except CoreLoraError:
        return None


def _optimizer(recipe: Recipe) -> str:
    """The simulation's name for an optimizer's cost; AdamW's where it knows no closer one."""
    name = optimizer_name(recipe.optim)
    if name in OPTIMIZERS:
        return name
    return "adamw_8bit" if "8bit" in name else "adamw"


def _saved_by_quantizing(recipe: Recipe, model: nn.Module) -> int:
    """Bytes by which quantised weights are smaller; what is left is kept in float32, as PEFT prepares it."""
    kind = recipe.model.quantize
    if kind is None:
        return 0
    output = model.get_output_embeddings()  # type: ignore[operator]
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not output}
    saved = 0.0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            after = QUANTIZED[kind] if id(parameter) in linear else 4
            saved += parameter.numel() * (parameter.element_size() - after)
    return int(saved)
