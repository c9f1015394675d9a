"""The harness's standard protocol, run by lm-evaluation-harness itself: its prompts, worked examples, filters, scores.

Its tasks come with the package; their rows come from the hub, or from local files with the hub's columns. What it has
answered is kept in its own request cache beside the results, so that a stopped run goes on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from corelora.data.sources import is_local
from corelora.errors import CoreLoraError
from corelora.evaluate.job import KINDS, Job, Kind, Outcome


def run_harness(job: Job) -> Outcome:
    """One task of the harness.

    Raises:
        CoreLoraError: the harness has no such task, or its rows can't be read.
    """
    lm = HFLM(pretrained=job.model, tokenizer=job.tokenizer, batch_size=job.batch_size)
    cache = job.partial.path.with_suffix(f".{job.name}.harness")
    manager = manager_for(job.task.harness or job.name)
    try:
        found: Any = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task_of(job, manager)],
            task_manager=manager,
            limit=job.settings.limit,
            use_cache=str(cache),
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
            confirm_run_unsafe_code=False,
        )
    except (FileNotFoundError, ConnectionError, ValueError, KeyError, OSError) as error:
        why = " ".join(str(error).split())[:300]
        raise CoreLoraError(f"{job.suite.name}: the harness could not run {job.name!r}: {why}") from error
    for left in cache.parent.glob(cache.name + "*"):
        left.unlink()
    return _outcome(job, found)


def manager_for(name: str) -> TaskManager:
    """The harness's tasks, those beside `name` alone where one file defines it.

    To read all of its files, over ten thousand, takes longer than many an evaluation. Groups, tags and names that are
    made by code are found among all.
    """
    found = _defined().get(name, [])
    if len(found) != 1:
        return TaskManager()
    return TaskManager(include_path=found[0].parent, include_defaults=False)


@cache
def _defined() -> dict[str, list[Path]]:
    """The harness's files that define a task, by its name."""
    line, found = re.compile(r"^task:[ \t]*[\"']?([^\s\"']+)[\"']?[ \t]*$", re.MULTILINE), defaultdict(list)
    for file in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        for name in set(line.findall(file.read_text(encoding="utf-8", errors="replace"))):
            found[name].append(file)
    return found


def task_of(job: Job, manager: TaskManager) -> Any:
    """The harness's task: its name, or its settings with local files in place of the hub set."""
    name = job.task.harness or job.name
    parts = {"test": job.task.test, "train": job.task.train}
    files = {n: str(Path(s.path).expanduser()) for n, s in parts.items() if s is not None and is_local(s.path)}
    if not files:
        return name
    if name not in manager.task_index:
        raise CoreLoraError(f"{job.suite.name}: lm-evaluation-harness {lm_eval.__version__} has no task {name!r}")
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return {**manager.task_index[name].cfg, **local}


def _outcome(job: Job, found: dict[str, Any]) -> Outcome:
    (name, figures), *_ = found["results"].items()
    count = found["n-samples"][name]["effective"]
    scores = {}
    for key, value in figures.items():
        metric, _, filtered = key.partition(",")
        if "," not in key or not isinstance(value, (int, float)) or metric.endswith("_stderr"):
            continue
        label = f"{job.name} {metric}" + (f" ({filtered})" if filtered not in ("", "none") else "")
        stderr = figures.get(f"{metric}_stderr,{filtered}")
        known = stderr if isinstance(stderr, float) else (value * (1 - value) / max(1, count - 1)) ** 0.5
        scores[label] = {"value": float(value), "stderr": float(known), "n": count}
    samples = [_sample(job, entry) for entry in found["samples"][name]]
    version = found["versions"].get(name)
    return Outcome(samples, scores, [f"lm-evaluation-harness {lm_eval.__version__}, task {name} version {version}"])


def _sample(job: Job, entry: dict[str, Any]) -> dict[str, Any]:
    arguments = entry["arguments"]
    first = next(iter(arguments.values())) if isinstance(arguments, dict) else arguments[0]
    prompt = next(iter(first.values())) if isinstance(first, dict) else first[0]
    metric = next((m for m in entry.get("metrics", []) if m in entry), None)
    return {
        "id": f"{job.name}/{entry['doc_id'] + 1}",
        "filter": entry.get("filter"),
        "prompt": prompt,
        "output": entry["resps"][0][0] if entry["resps"] and entry["resps"][0] else None,
        "read": entry["filtered_resps"][0] if entry["filtered_resps"] else None,
        "gold": entry["target"],
        "right": None if metric is None else bool(entry[metric]),
    }


KINDS.add("harness", Kind(run=run_harness, reads_rows=False))
