"""What a run prints, beside its progress bar: on the main process only, to standard error, where bars are too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from corelora.recipe import Recipe
from corelora.train.checkpoints import newest_checkpoint
from corelora.train.folder import RunFolder
from corelora.train.methods import is_whole
from corelora.train.tasks import TASKS

SHOWN = 1500  # characters of the sample

# The suite that a form of data is trained for, as in the papers.
SUITES = {
    "metamath": "gsm8k,math",
    "gsm8k": "gsm8k",
    "code_feedback": "humaneval,mbpp",
    "evol_instruct": "mt_bench",
    "conversations": "mt_bench",
    "commonsense": "commonsense",
}


def say(text: str) -> None:
    """Print one message of the run."""
    if PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)


def shortened(text: str, limit: int = SHOWN) -> str:
    """A text with its middle left out where it is long."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def where_stopped(output: Path) -> str:
    """What is kept of a run that its user has stopped."""
    kept = newest_checkpoint(RunFolder(output).checkpoints)
    return f"the same command goes on after {kept}" if kept else "no checkpoint was written yet: it will begin anew"


def next_steps(recipe: Recipe, output: Path, results: dict[str, Any]) -> str:
    """What came out, where it is, and what to do with it."""
    folder = RunFolder(output)
    weights = folder.weights(is_whole(recipe.method))
    tested = [f"test {k.removeprefix('test_')} {v:.4f}" for k, v in results.items() if _is_figure(k, v)]
    figures = ", ".join([f"training loss {results['train_loss']:.4f}", *tested])
    speed = f"{results['seconds']:.0f} s" + (
        f", {results['tokens_per_second']:,.0f} tokens/s" if results["tokens_per_second"] else ""
    )
    lines = [
        f"{results['steps']} steps, {figures}; {speed}; {results['trained_parameters']:,} numbers trained",
        "",
        f"  {weights!s:40s} the {'model' if is_whole(recipe.method) else 'adapter'}, with its {_reader(recipe)}",
        f"  {folder.metrics!s:40s} loss and speed, a line every {recipe.loop.log_every} steps",
        f"  {folder.curve!s:40s} the loss curve",
        f"  {folder.results!s:40s} all figures and versions",
        "",
        "Next:",
    ]
    suite = "glue" if recipe.task == "classify" else SUITES.get(recipe.data.form)
    if suite is not None:
        lines.append(f"  corelora evaluate {output} --suite {suite}")
    lines.append(f"  corelora report {output}")
    if not is_whole(recipe.method):
        lines.append(f"  corelora export {weights} {TASKS[recipe.task].exports}")
    return "\n".join(lines)


def _reader(recipe: Recipe) -> str:
    return "tokenizer" if TASKS[recipe.task].reads_tokens else "processor"


def _is_figure(key: str, value: Any) -> bool:
    return key.startswith("test_") and isinstance(value, float)
