"""The quick start: fine-tune a real language model with a recipe, and see what changed.

    python -m corelora.quickstart recipes/quickstart.yaml [--set optim.lr=1e-4] [--output runs/quickstart]

The training is `corelora train` of that recipe. Around it: the model's answers to held-out word problems before and
after, by the same prompt and the same rule, a plain LoRA, quickstart.json with every figure and reply, a report.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import corelora
from corelora.errors import CoreLoraError
from corelora.evaluate.subject import find_subject, load_subject
from corelora.quickstart.report import next_steps, report
from corelora.recipe import Recipe, load_recipe
from corelora.run.generate import Reply, replies
from corelora.tasks.word_problems import Problem, held_out_problems, is_right, read_answer, scores
from corelora.train.folder import versions, write_json
from corelora.train.models import model_source
from corelora.train.progress import read_metrics
from corelora.train.run import train


@dataclass(frozen=True)
class Settings:
    """How the model is asked; the same before and after."""

    held_out: int = 210
    max_new_tokens: int = 64


@dataclass
class Stages:
    """Announces each stage and keeps its seconds."""

    count: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """Run a block as the next stage."""
        print(f"\n[{len(self.seconds) + 1}/{self.count}] {text}", flush=True)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)


def answer(model: Any, tokenizer: Any, problems: list[Problem], settings: Settings, desc: str) -> list[Reply]:
    """The model's replies to the problems, by the same prompt and limit before and after training."""
    questions = [p.question for p in problems]
    batch_size = 16 if model.device.type == "cpu" else 128
    limit = settings.max_new_tokens
    return replies(model, tokenizer, questions, max_new_tokens=limit, batch_size=batch_size, desc=desc)


def run(recipe: Recipe, out: Path, settings: Settings | None = None) -> dict[str, Any]:
    """All stages.

    Args:
        recipe: what is trained; a task `instruct`.
        out: the run folder.
        settings: how the model is asked.

    Returns:
        The results, as they are saved in quickstart.json.
    """
    settings = settings or Settings()
    stages = Stages(5)
    problems = held_out_problems(settings.held_out)
    with stages.stage("model", "the model"):
        base = model_source(recipe.model)
        subject = find_subject(base, str(out), recipe.model.dtype)
        model, tokenizer = load_subject(subject)
        print(f"{Path(base).name}, {model.num_parameters():,} parameters, on {device_name(model)}")
    with stages.stage("before", f"the model answers {len(problems)} held-out problems before training"):
        before = answer(model, tokenizer, problems, settings, "before")
    device = device_name(model)
    del model
    with stages.stage("train", f"training {recipe.method['name']}: corelora train"):
        trained = train(recipe, out)
    with stages.stage("after", "the same problems after training"):
        model, tokenizer = load_subject(find_subject(str(out), dtype=recipe.model.dtype))
        after = answer(model, tokenizer, problems, settings, "after")
        del model
    with stages.stage("files", f"exporting a plain LoRA to {out / 'lora'}"):
        print(corelora.export_lora(out / "adapter", out / "lora", overwrite=True))
    results = {
        "settings": asdict(settings) | {"method": recipe.method, "lr": recipe.optim.lr, "steps": recipe.loop.steps},
        "model": Path(base).name,
        **compare(problems, before, after),
        "losses": [{k: e[k] for k in ("step", "loss")} for e in read_metrics(out / "metrics.jsonl") if "loss" in e],
        "trained_parameters": trained["trained_parameters"],
        "seconds": {**stages.seconds, "all": round(sum(stages.seconds.values()), 1)},
        "versions": versions(),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    write_json(out / "quickstart.json", results)
    print(report(results))
    print(next_steps(out, Path(base)))
    return results


def compare(problems: list[Problem], before: list[Reply], after: list[Reply]) -> dict[str, Any]:
    """Scores by template, replies that were cut, and every reply, before and after."""
    sides = {"before": before, "after": after}
    found: dict[str, Any] = {name: scores(problems, [r.text for r in side]) for name, side in sides.items()}
    found["gain"] = round(found["after"]["all"]["percent"] - found["before"]["all"]["percent"], 2)
    found["cut_replies"] = {name: sum(not r.finished for r in side) for name, side in sides.items()}
    found["samples"] = [
        {"template": p.template, "question": p.question, "answer": p.answer}
        | {name: _sample(side[n], p) for name, side in sides.items()}
        for n, p in enumerate(problems)
    ]
    return json.loads(json.dumps(found))


def _sample(reply: Reply, problem: Problem) -> dict[str, Any]:
    return {"reply": reply.text, "read": read_answer(reply.text), "right": is_right(reply.text, problem)}


def device_name(model: Any) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type


def main(argv: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m corelora.quickstart", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", help="a recipe of the task instruct on built-in:word_problems")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="put a value over the recipe's")
    parser.add_argument("--output", default="runs/quickstart", help="run folder, default runs/quickstart")
    parser.add_argument(
        "--held-out", type=int, default=Settings.held_out, help=f"problems, default {Settings.held_out}"
    )
    arguments = parser.parse_args(argv)
    logging.captureWarnings(True)  # libraries' warnings would tear the bars
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        recipe = load_recipe(Recipe, arguments.recipe, arguments.set)
        run(recipe, Path(arguments.output), Settings(held_out=arguments.held_out))
    except CoreLoraError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    return 0
