"""The main path of training: check, data, model, adapter, Trainer, save."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from peft import PeftConfig, get_peft_model
from transformers import PretrainedConfig, PrinterCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from corelora.errors import CoreLoraError, raise_all
from corelora.fold import fold
from corelora.gradients import GradientStats
from corelora.kernels.fast import fast_path
from corelora.measured import Stats
from corelora.recipe import Recipe
from corelora.train.adalora import AdaLoraSteps, adalora_of
from corelora.train.arguments import float32_products, training_arguments
from corelora.train.dry_run import check
from corelora.train.finish import save_weights, summarize
from corelora.train.folder import RunFolder, write_json
from corelora.train.memory import explain, fits
from corelora.train.methods import (
    WantedStats,
    adapter_config,
    clipped_ranks,
    freeze_below,
    is_head,
    is_whole,
    wanted_stats,
)
from corelora.train.models import positions
from corelora.train.optim import warmup_problems
from corelora.train.out_of_memory import is_out_of_memory
from corelora.train.plots import loss_curve
from corelora.train.processes import is_main, meet
from corelora.train.progress import MetricsFile, ProgressBar, forget_memory, read_metrics
from corelora.train.resume import Standing, held
from corelora.train.start_from import load_start, weights_folder
from corelora.train.statistics import gathered_in_turn, run_gradients, run_stats
from corelora.train.story import say, shortened
from corelora.train.tasks import TASKS, Rows, Task
from corelora.train.watch import first_steps, marked


@dataclass(kw_only=True)
class Run:
    """Everything that a run holds before its model is loaded."""

    recipe: Recipe
    folder: RunFolder
    task: Task
    config: PretrainedConfig
    arguments: TrainingArguments
    processor: Any  # a tokenizer, or what turns images into tensors
    rows: dict[str, Rows]  # "train", and "test" where the recipe has it
    collator: Any

    @property
    def about(self) -> dict[str, Any]:
        """What must be as it was where the run goes on, beside the recipe: else other rows would follow."""
        return {"processes": self.arguments.world_size, "rows": self.rows["train"].fingerprint}

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        loop = self.recipe.loop
        if loop.steps is not None:
            return loop.steps
        batches = math.ceil(len(self.rows["train"].dataset) / (loop.batch_size * self.arguments.world_size))
        return math.ceil(loop.epochs * math.ceil(batches / loop.accumulate))


def train(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Train what a recipe says.

    Args:
        recipe: the whole run.
        output: the run folder; made where it is missing.

    Returns:
        The results, as they are written to results.json: test loss and metrics, trained parameters, seconds, tokens
        a second, peak memory in bytes, versions, the recipe's fingerprint, seed.

    Raises:
        CoreLoraError: anything wrong with the recipe, its data or the training.
    """
    meet()
    folder = RunFolder(Path(output))
    with held(folder, recipe) as standing:
        if standing.results is None:
            return make(recipe, folder, standing)
    say(f"{output} holds this run, finished; nothing was done. Another run needs another --output")
    return standing.results


def make(recipe: Recipe, folder: RunFolder, standing: Standing) -> dict[str, Any]:
    """Train from where the run stands to its end; the folder is held."""
    began = time.perf_counter()
    forget_memory()
    facts = check(recipe, folder.root)
    run = prepare(recipe, facts.config, folder)
    standing.check_same(run.about)
    if is_main():
        folder.begin(recipe)
    loop = recipe.loop
    with fast_path(loop.fast), float32_products(loop.precision), memory_advice(run):
        model = build_model(run)
        trainer = build_trainer(run, model, standing)
        metrics = run_trainer(trainer, run, standing)
    save_weights(trainer, run.folder, run.processor, recipe)
    more = run.task.finish(recipe, trainer, run.folder, run.processor)
    seconds = standing.seconds + time.perf_counter() - began
    results = {**summarize(trainer, recipe, run.rows, metrics, seconds), **more}
    if trainer.is_world_process_zero():
        loss_curve(read_metrics(run.folder.metrics), run.folder.curve, run.folder.root.name)
        write_json(run.folder.results, results)
    return results


def prepare(recipe: Recipe, config: PretrainedConfig, folder: RunFolder) -> Run:
    """Everything before the model: arguments, tokenizer or processor, rows, one of them shown.

    Raises:
        CoreLoraError: bad rows; rows that train no stop token.
    """
    task = TASKS[recipe.task]
    # before any model: DeepSpeed's ZeRO-3 wants to know
    arguments = training_arguments(recipe, config, folder.root, task.reads_tokens)
    processor = task.load_processor(recipe)
    rows = {"train": task.encode(recipe, "train", processor)}
    if recipe.data.test is not None:
        rows["test"] = task.encode(recipe, "test", processor)
    raise_all(task.row_problems(rows["train"], processor, config), "data")
    for which, made in rows.items():
        say(f"{which}: {made.summary or f'{len(made.dataset):,} rows'}")
    sample = task.sample(rows["train"].dataset[0], processor)
    colour = sys.stderr.isatty()
    say(f"\na row, what is trained {'in green' if colour else 'in [[ ]]'}:\n{shortened(marked(sample, colour))}\n")
    run = Run(
        recipe=recipe,
        folder=folder,
        task=task,
        config=config,
        arguments=arguments,
        processor=processor,
        rows=rows,
        collator=task.collator(recipe, processor),
    )
    raise_all(warmup_problems(recipe.optim, run.steps), "recipe")
    return run


def build_model(run: Run) -> Any:
    """The model with its adapter, or with everything trained.

    Raises:
        CoreLoraError: it can't be loaded, or not be trained on this data.
    """
    recipe, part = run.recipe, run.recipe.model
    full = is_whole(recipe.method)
    source = str(weights_folder(part.start_from, full=True)) if full and part.start_from else None
    set_seed(recipe.loop.seed)  # a new head is drawn while loading
    model = run.task.load_model(recipe, run.config, run.processor, source)
    with gathered_in_turn(model):
        raise_all(run.task.model_problems(recipe, model, run.collator), "recipe")
    if is_head(recipe.method):
        freeze_below(model, run.task.heads(model))
    method = dict(recipe.method)
    if (wanted := wanted_stats(method)) is not None:
        method["stats"] = collect(run, model, wanted)
    heads, unused = run.task.heads(model), run.task.unused(model)
    config = adapter_config(method, run.task.task_type, heads, run.steps, unused)
    set_seed(recipe.loop.seed)  # starts depend on the seed alone, not on what was drawn so far
    return model if config is None else adapted(run, model, config)


def collect(run: Run, model: Any, wanted: WantedStats) -> Stats:
    """Statistics of the model, where it will train if it can be moved there whole."""
    if run.recipe.model.quantize is None and fits(model, run.arguments.device):
        model.to(run.arguments.device)
    rows, part = run.rows["train"], run.recipe.stats
    if wanted.kind == GradientStats.kind:
        return run_gradients(model, rows, run.collator, part, wanted)
    return run_stats(model, rows, run.collator, part, wanted.targets)


def adapted(run: Run, model: Any, config: PeftConfig) -> Any:
    """The model with an adapter on it, begun from an earlier one where the recipe says so."""
    with warnings.catch_warnings():
        # Heads are excluded whether the targets would have met them or not.
        warnings.filterwarnings("ignore", message=".*exclude_modules.*")
        model = get_peft_model(model, config)
    clipped = clipped_ranks(model)
    if clipped:
        say(clipped)
    given = run.recipe.model.start_from
    if given is not None:
        left = load_start(model, given)
        say(f"starting from {given}" + (f"; a new head: {', '.join(left)} have another size" if left else ""))
    if run.recipe.loop.fold:
        say(f"{fold(model)} layers run with the start in their base weights")
    return model


def build_trainer(run: Run, model: Any, standing: Standing) -> Any:
    """The task's Trainer with everything that watches the run."""
    callbacks = [ProgressBar(), MetricsFile(run.folder.metrics, standing.seconds)]
    if standing.checkpoint is None:
        callbacks += first_steps(model)
    callbacks += run.task.callbacks(run.recipe, run.folder, run.processor)
    if adalora_of(model) is not None:
        callbacks.append(AdaLoraSteps(standing.checkpoint.path if standing.checkpoint else None))
    trainer = run.task.trainer_class()(
        recipe=run.recipe,
        model=model,
        args=run.arguments,
        train_dataset=run.rows["train"].dataset,
        eval_dataset=run.rows["test"].dataset if "test" in run.rows else None,
        data_collator=run.collator,
        compute_metrics=run.task.measure(run.recipe),
        callbacks=callbacks,
        metrics=run.folder.metrics,
        about=run.about,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(run.folder.root / "tensorboard")
    return trainer


def run_trainer(trainer: Any, run: Run, standing: Standing) -> dict[str, Any]:
    """Train, from a checkpoint where there is one, and test at the end; the bars end whatever happens.

    Returns:
        Trainer's figures of both.
    """
    try:
        outcome = trainer.train(str(standing.checkpoint.path) if standing.checkpoint else None)
        tested = trainer.evaluate(metric_key_prefix="test") if "test" in run.rows else {}
    finally:
        bars = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressBar)]
        for bar in bars:
            bar.close()
    return {**outcome.metrics, **tested}


@contextmanager
def memory_advice(run: Run) -> Iterator[None]:
    """Turn running out of memory, or out of positions, into what to change, computed."""
    try:
        yield
    except (RuntimeError, IndexError, MemoryError) as error:
        if is_out_of_memory(error):
            advice = explain(run.recipe, run.config, run.arguments.device.type)
        elif longer := run.task.reads_tokens and beyond_positions(run):
            first = (str(error).splitlines() or [type(error).__name__])[0]
            advice = f"{longer} ({first})"
        else:
            raise
    else:
        return
    raise CoreLoraError(advice)  # outside the handler: the error's traceback would keep the tensors alive


def beyond_positions(run: Run) -> str | None:
    """What to say where rows are longer than what the model was made for, which some models can't read; else None."""
    places = min(positions(run.config) or math.inf, run.processor.model_max_length)
    lengths = [pc.list_value_length(made.dataset.data.column("input_ids")) for made in run.rows.values()]
    longest = max(pc.max(column).as_py() for column in lengths)
    if longest <= places:
        return None
    return (
        f"data.max_length: rows have up to {longest:,} tokens, and this model, made for {places:,}, failed: lower "
        f"data.max_length to {places}"
    )
