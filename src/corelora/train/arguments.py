"""A recipe's optimizer and loop as transformers' TrainingArguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, Trainer, TrainingArguments, get_scheduler

from corelora.recipe import Recipe
from corelora.recipe.schema import ModelPart
from corelora.train.folder import RunFolder
from corelora.train.liger import liger_arguments
from corelora.train.methods import is_corelora, is_whole
from corelora.train.models import DTYPES
from corelora.train.optim import optimizer_name
from corelora.train.processes import placement, shares_weights


def weight_dtype(part: ModelPart, config: PretrainedConfig) -> torch.dtype:
    """Type of the base weights: the recipe's, else the file's own, else float32."""
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return DTYPES.get(part.dtype, own)


def precision_problems(recipe: Recipe, config: PretrainedConfig | None) -> list[str]:
    """Types that this machine can't compute with, or that don't fit the weights."""
    precision = recipe.loop.precision
    found = []
    cuda = torch.cuda.is_available()
    if precision == "float16" and not cuda:
        found.append("loop.precision: float16 needs a GPU; use bfloat16 or float32 on a CPU.")
    if precision == "bfloat16" and cuda and not torch.cuda.is_bf16_supported():
        found.append("loop.precision: this GPU has no bfloat16; use float16.")
    if precision == "tf32" and cuda and not has_tf32():
        found.append("loop.precision: this GPU has no TF32; use float32.")
    if config is None:
        return found
    weights = weight_dtype(recipe.model, config)
    if precision in ("float32", "tf32") and weights != torch.float32 and recipe.model.quantize is None:
        found.append(
            f"loop.precision: {precision} with weights in {_name(weights)}; set model.dtype to float32 as well."
        )
    if is_whole(recipe.method) and weights == torch.float16:
        found.append("model.dtype: training weights can't unscale gradients in float16; use float32 or bfloat16.")
    if recipe.loop.fold and (not is_corelora(recipe.method) or recipe.model.quantize is not None):
        found.append("loop.fold: only corelora's own methods fold, and on weights that are not quantised.")
    if recipe.loop.fold and shares_weights():
        found.append("loop.fold: base weights can't be changed where they are sharded; leave it out.")
    if is_whole(recipe.method) and recipe.model.quantize is not None:
        found.append("model.quantize: quantised weights can't be trained; use a method with an adapter.")
    return found


def has_tf32() -> bool:
    """Whether the GPU rounds products of float32 where it is allowed to: NVIDIA's Ampere and what came after it."""
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """How products of float32 are made during a run: as the process has it, or in TF32 where the recipe says so.

    Args:
        precision: `loop.precision`; on a CPU `tf32` is float32.
    """
    before = torch.get_float32_matmul_precision()
    if precision == "tf32" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def trial_problems(recipe: Recipe, config: PretrainedConfig, output: Path) -> list[str]:
    """What transformers refuses of a recipe's optimizer and schedule, whose names it knows, tried on one parameter.

    Args:
        recipe: the run's.
        config: the model's, for the type of its weights.
        output: the run folder.
    """
    optim = recipe.optim
    try:
        arguments = training_arguments(recipe, config, output)
    except (ValueError, ImportError) as error:
        return [f"recipe: {' '.join(str(error).split())}"]
    try:
        toy: Any = nn.Linear(8, 8)
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, toy)
        parameters = options.pop("params", None) or options.pop("model", None) or list(toy.parameters())
        optimizer = cls(parameters, **options)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        return [f"optim.name: {optim.name} can't be had here ({' '.join(str(error).split())})."]
    try:
        get_scheduler(optim.schedule, optimizer, num_warmup_steps=1, num_training_steps=10)
    except (ValueError, TypeError) as error:
        return [f"optim.schedule: {optim.schedule} wants settings that a recipe has no key for ({error})."]
    return []


def training_arguments(
    recipe: Recipe, config: PretrainedConfig, output: Path, counts_tokens: bool = True
) -> TrainingArguments:
    """Trainer's settings for this run.

    Args:
        recipe: the run's.
        config: the model's, for the type of its weights.
        output: the run folder.
        counts_tokens: the rows are tokens, which are counted as they are read.
    """
    loop = recipe.loop
    tests = loop.test_every is not None and recipe.data.test is not None
    return TrainingArguments(
        output_dir=str(RunFolder(output).checkpoints),
        max_steps=loop.steps or -1,
        num_train_epochs=loop.epochs,
        per_device_train_batch_size=loop.batch_size,
        per_device_eval_batch_size=loop.test_batch_size or loop.batch_size,
        gradient_accumulation_steps=loop.accumulate,
        torch_compile=loop.compile,
        seed=loop.seed,
        logging_steps=loop.log_every,
        logging_nan_inf_filter=False,  # a loss that is not finite stops the run and is not averaged away
        eval_strategy="steps" if tests else "no",
        eval_steps=loop.test_every if tests else None,
        save_strategy="steps",
        save_steps=loop.save_every or 0.1,  # below 1: a part of all steps
        save_total_limit=loop.keep,
        report_to=loop.report_to or "none",
        run_name=output.name,
        train_sampling_strategy="random" if recipe.data.shuffle else "sequential",
        remove_unused_columns=False,  # the collators take what they need
        include_num_input_tokens_seen=("all" if recipe.data.packing else "non_padding") if counts_tokens else "no",
        disable_tqdm=True,  # our own bar shows more
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # frozen factors are equal everywhere
        **placement(),
        **_checkpointing(loop.checkpointing),
        **liger_arguments(recipe),
        **_precision(recipe, config),
        **_optimizer(recipe),
    )


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Recomputed activations, under the name that this transformers has for them."""
    if not wanted:
        return {}
    new = "activation_checkpointing" in {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _optimizer(recipe: Recipe) -> dict[str, Any]:
    optim = recipe.optim
    settings: dict[str, Any] = {
        "optim": optimizer_name(optim),
        "learning_rate": optim.lr,
        "weight_decay": optim.weight_decay,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": optim.warmup,  # below 1: a part of all steps
        "max_grad_norm": optim.max_grad_norm,
    }
    if optim.betas is not None:
        settings |= {"adam_beta1": optim.betas[0], "adam_beta2": optim.betas[1]}
    if optim.eps is not None:
        settings |= {"adam_epsilon": optim.eps}
        settings |= {"optim_args": f"eps={optim.eps}"} if "rmsprop" in optimizer_name(optim) else {}
    return settings


def _precision(recipe: Recipe, config: PretrainedConfig) -> dict[str, Any]:
    """Autocast only where the arithmetic's type is smaller than the weights'; weights of that type need none."""
    wanted = DTYPES.get(recipe.loop.precision)
    quantized = recipe.model.quantize is not None  # what is not quantised is in float32 then
    if wanted is None or (wanted == weight_dtype(recipe.model, config) and not quantized):
        return {}
    return {"bf16": wanted == torch.bfloat16, "fp16": wanted == torch.float16}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
