"""Evaluation of classifiers: the eight GLUE tasks, with the metrics that their leaderboard reports."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from corelora.data.glue import GLUE, REGRESS, metrics
from corelora.evaluate.job import KINDS, Job, Kind, Outcome
from corelora.evaluate.scores import bootstrap_score, mean_score
from corelora.evaluate.session import batches
from corelora.evaluate.suites import SuiteTask


def classes(task: SuiteTask) -> int:
    """Labels of a task's head; 1 for a regression."""
    assert task.form is not None
    return len(GLUE[task.form].labels)


def run_classify(job: Job) -> Outcome:
    """Logits of all rows, in batches of like length; verdicts, and metrics with errors."""
    data = job.data
    assert job.task.form is not None
    task = GLUE[job.task.form]
    ids, texts = job.ids(len(data)), [tuple(row[c] for c in task.texts) for row in data]
    lengths = [sum(len(t) for t in pair) for pair in texts]
    with tqdm(total=len(ids), initial=sum(n in job.partial.outputs for n in ids), desc=job.name, unit="row") as bar:
        for batch in batches(ids, lengths, job.batch_size, job.partial):
            new = sum(ids[n] not in job.partial.outputs for n in batch)
            logits = _logits(job, [texts[n] for n in batch])
            job.partial.add({ids[n]: row for n, row in zip(batch, logits, strict=True)})
            bar.update(new)
    outputs = np.array([job.partial.outputs[name] for name in ids])
    labels = np.array([row["label"] for row in data])
    samples = [_sample(job, *parts) for parts in zip(ids, texts, outputs, labels, strict=True)]
    return Outcome(samples, scores(job.name, job.task.form, outputs, labels))


def scores(name: str, form: str, outputs: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, Any]]:
    """Every metric of a GLUE task with its standard error: of a mean for accuracies, else by drawing rows again.

    Args:
        name: what the scores are called after.
        form: the GLUE task.
        outputs: logits [n, labels], or [n, 1] for a regression.
        labels: [n].
    """
    found = {}
    for metric, value in metrics(form, outputs, labels).items():
        if metric == "accuracy":
            score = mean_score((outputs.argmax(axis=1) == labels).astype(float).tolist())
        else:
            score = bootstrap_score(partial(_metric, form, metric, outputs, labels), len(labels))
        found[f"{name} {metric}"] = score | {"value": value}
    return found


def _metric(form: str, metric: str, outputs: np.ndarray, labels: np.ndarray, at: np.ndarray) -> float:
    return metrics(form, outputs[at], labels[at])[metric]


@torch.no_grad()
def _logits(job: Job, texts: list[tuple[str, ...]]) -> list[list[float]]:
    longest = min(job.tokenizer.model_max_length, job.model.config.max_position_embeddings)
    columns = [list(column) for column in zip(*texts, strict=True)]
    batch = job.tokenizer(*columns, return_tensors="pt", padding=True, truncation=True, max_length=longest)
    return job.model(**batch.to(job.model.device)).logits.float().cpu().tolist()


def _sample(job: Job, name: str, texts: tuple[str, ...], logits: np.ndarray, label: Any) -> dict[str, Any]:
    task = GLUE[job.task.form or ""]
    base = {"id": name, "prompt": " | ".join(texts), "output": [round(float(v), 5) for v in logits]}
    if task.kind == REGRESS:  # right within half a point of 0 to 5, to have something to look at
        return base | {"read": float(logits[0]), "gold": float(label), "right": bool(abs(logits[0] - label) <= 0.5)}
    best = int(logits.argmax())
    return base | {"read": task.labels[best], "gold": task.labels[int(label)], "right": best == int(label)}


KINDS.add("classify", Kind(run=run_classify, classes=classes))
