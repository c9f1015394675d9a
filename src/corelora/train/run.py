"""The main path of training: check, data, model, adapter, Trainer, save."""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftConfig, get_peft_model
from transformers import PretrainedConfig, PrinterCallback, TrainingArguments, set_seed

from corelora.kernels.fast import set_fast
from corelora.recipe import Recipe
from corelora.train.arguments import training_arguments
from corelora.train.folder import RunFolder, versions, write_json
from corelora.train.methods import adapter_config, is_full
from corelora.train.models import head_names, load_model, load_model_config, load_tokenizer
from corelora.train.progress import MetricsFile, ProgressBar, memory_bytes
from corelora.train.tasks import TASKS, Rows, Task


@dataclass(kw_only=True)
class Run:
    """Everything that a run holds before its model is loaded."""

    recipe: Recipe
    folder: RunFolder
    task: Task
    config: PretrainedConfig
    arguments: TrainingArguments
    tokenizer: Any
    rows: dict[str, Rows]  # "train", and "test" where the recipe has it

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.recipe.loop.steps is not None:
            return self.recipe.loop.steps
        batches = math.ceil(len(self.rows["train"].dataset) / (self.recipe.loop.batch_size * self.arguments.world_size))
        a_pass = math.ceil(batches / self.recipe.loop.accumulate)
        return math.ceil(self.recipe.loop.epochs * a_pass)


def train(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Train what a recipe says.

    Args:
        recipe: the whole run.
        output: the run folder; made where it is missing.

    Returns:
        The results, as they are written to results.json.

    Raises:
        CoreLoraError: anything wrong with the recipe, its data or the training; nothing is left half written.
    """
    began = time.perf_counter()
    run = prepare(recipe, Path(output))
    model = build_model(run)
    trainer = build_trainer(run, model)
    bar = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressBar))
    try:
        outcome = trainer.train()
        tested = trainer.evaluate(metric_key_prefix="test") if "test" in run.rows else {}
    finally:
        bar.close()
    save_weights(trainer, run)
    results = summarize(run, trainer, {**outcome.metrics, **tested}, time.perf_counter() - began)
    if trainer.is_world_process_zero():
        write_json(run.folder.results, results)
    return results


def prepare(recipe: Recipe, output: Path) -> Run:
    """Everything before the model: folder, arguments, tokenizer, tokenised rows."""
    task = TASKS[recipe.task]
    config = load_model_config(recipe.model, **task.config_settings(recipe))
    arguments = training_arguments(recipe, config, output)  # before any model: DeepSpeed's ZeRO-3 wants to know
    folder = RunFolder(output)
    if PartialState().is_main_process:
        folder.begin(recipe)
    set_seed(recipe.loop.seed)
    set_fast(recipe.loop.fast)
    tokenizer = load_tokenizer(recipe.model)
    wanted = ["train"] + (["test"] if recipe.data.test is not None else [])
    rows = {which: task.encode(recipe, which, tokenizer) for which in wanted}
    return Run(
        recipe=recipe, folder=folder, task=task, config=config, arguments=arguments, tokenizer=tokenizer, rows=rows
    )


def build_model(run: Run) -> Any:
    """The model with its adapter, or with everything trained."""
    recipe = run.recipe
    model = load_model(recipe.model, run.config, run.task.auto_class, recipe.loop.checkpointing)
    heads = head_names(model) if run.task.has_head else []
    config = adapter_config(recipe.method, run.task.task_type, heads, run.steps)
    set_seed(recipe.loop.seed)  # starts depend on the seed alone, not on what was drawn while loading
    return model if config is None else adapted(model, config)


def adapted(model: Any, config: PeftConfig) -> Any:
    """The model with an adapter on it."""
    with warnings.catch_warnings():
        # Heads are excluded whether the targets would have met them or not.
        warnings.filterwarnings("ignore", message=".*exclude_modules.*")
        return get_peft_model(model, config)


def build_trainer(run: Run, model: Any) -> Any:
    """The task's Trainer with everything that watches the run."""
    trainer = run.task.trainer_class()(
        recipe=run.recipe,
        model=model,
        args=run.arguments,
        train_dataset=run.rows["train"].dataset,
        eval_dataset=run.rows["test"].dataset if "test" in run.rows else None,
        data_collator=run.task.collator(run.tokenizer),
        compute_metrics=run.task.measure(run.recipe),
        callbacks=[ProgressBar(), MetricsFile(run.folder.metrics)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def save_weights(trainer: Any, run: Run) -> None:
    """Write adapter/ (or model/) with the tokenizer; the folder appears whole or not at all."""
    state = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # gathered by all processes
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    path = run.folder.weights(is_full(run.recipe.method))
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True  # switched off for training; a saved model generates with it
    model.save_pretrained(temporary, state_dict=state)
    run.tokenizer.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(temporary, path)


def summarize(run: Run, trainer: Any, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The figures of a finished run."""
    parameters = list(trainer.model.parameters())
    tokens = trainer.state.num_input_tokens_seen
    return {
        "steps": trainer.state.global_step,
        "train_loss": metrics.get("train_loss"),
        **{k: v for k, v in metrics.items() if k.startswith("test_") and not k.endswith(("_runtime", "_per_second"))},
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / metrics["train_runtime"], 1) if metrics.get("train_runtime") else None,
        "peak_memory": memory_bytes(),
        "seed": run.recipe.loop.seed,
        "rows": {which: dict(rows.counts) for which, rows in run.rows.items()},
        "versions": versions(),
    }
