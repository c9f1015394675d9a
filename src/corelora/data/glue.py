"""The eight GLUE tasks: columns and labels as on the hub, tokens, and the metrics that their leaderboard reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, List, Value
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from corelora.data.cache import key_of, made_once
from corelora.data.columns import Column
from corelora.data.encoded import Encoded, load, save, source_of, tokenised
from corelora.data.replies import tokenizer_key
from corelora.data.sources import Rows, read_rows
from corelora.errors import CoreLoraError
from corelora.recipe.schema import DataPart
from corelora.registry import Registry

CLASSIFY, REGRESS = "single_label_classification", "regression"  # transformers' names for `problem_type`


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task.

    Attributes:
        texts: its one or two columns of text.
        labels: what 0, 1, 2 mean; for a regression one name.
        kind: CLASSIFY or REGRESS.
        metrics: names of METRICS; the first is the one that papers report.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    kind: str = CLASSIFY
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def columns(self) -> dict[str, Column]:
        """What a row needs; a text may be empty (a few of QQP's are)."""
        label = Column(kind="whole", low=0, high=len(self.labels) - 1)
        if self.kind == REGRESS:
            label = Column(kind="number", low=0, high=5)
        return {**{name: Column(empty=True) for name in self.texts}, "label": label}


_ENTAILMENT = ("entailment", "not_entailment")
GLUE: Registry[GlueTask] = Registry("GLUE task")
GLUE.add(
    "cola",
    GlueTask(texts=("sentence",), labels=("unacceptable", "acceptable"), metrics=("matthews_correlation", "accuracy")),
)
GLUE.add("sst2", GlueTask(texts=("sentence",), labels=("negative", "positive")))
GLUE.add(
    "mrpc",
    GlueTask(texts=("sentence1", "sentence2"), labels=("not_equivalent", "equivalent"), metrics=("accuracy", "f1")),
)
GLUE.add(
    "qqp",
    GlueTask(texts=("question1", "question2"), labels=("not_duplicate", "duplicate"), metrics=("accuracy", "f1")),
)
GLUE.add(
    "mnli",
    GlueTask(
        texts=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
    ),
)
GLUE.add("qnli", GlueTask(texts=("question", "sentence"), labels=_ENTAILMENT))
GLUE.add("rte", GlueTask(texts=("sentence1", "sentence2"), labels=_ENTAILMENT))
GLUE.add(
    "stsb",
    GlueTask(texts=("sentence1", "sentence2"), labels=("similarity",), kind=REGRESS, metrics=("pearson", "spearmanr")),
)


def encode_pairs(part: DataPart, which: str, tokenizer: Any, seed: int = 0) -> Encoded:
    """Tokenised rows of a GLUE task, from the cache where it has them.

    What is longer than max_length is cut at the end of the longer text, and counted.

    Args:
        part: the recipe's `data`; `form` is the task.
        which: "train" or "test".
        tokenizer: the model's.
        seed: of the order of the training rows, where the recipe shuffles them.

    Returns:
        Columns: what the tokenizer gives (input_ids, attention_mask, maybe token_type_ids) and `labels`, whole
        numbers or, for a regression, floats.

    Raises:
        CoreLoraError: bad rows, a label out of range among them, by file and line.
    """
    task = GLUE[part.form]
    rows = read_rows(source_of(part, which), task.columns, part.columns)
    key = key_of(rows.fingerprint, part.form, tokenizer_key(tokenizer), part.max_length)
    folder = made_once("tokens", key, lambda out: _encode(part, rows, tokenizer, out))
    return load(folder, key, seed if which == "train" and part.shuffle else None)


def _encode(part: DataPart, rows: Rows, tokenizer: Any, out: Path) -> None:
    task = GLUE[part.form]

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        made = tokenizer(*(batch[name] for name in task.texts), verbose=False)
        full = [len(ids) for ids in made["input_ids"]]
        made = tokenizer(*(batch[name] for name in task.texts), truncation=True, max_length=part.max_length)
        return {**made, "labels": batch["label"], "length": full}

    probe = encode({name: values[:1] for name, values in rows.dataset[:1].items()})
    schema = Features(
        {
            **{name: List(Value("int32" if name == "input_ids" else "int8")) for name in probe},
            "labels": Value("float32" if task.kind == REGRESS else "int64"),
            "length": Value("int32"),
        }
    )
    made = tokenised(rows, encode, schema, part.workers, out)
    lengths = made["length"][:]
    cut = [n for n, length in enumerate(lengths) if length > part.max_length]
    counts = {
        "rows": len(lengths),
        "truncated": len(cut),
        "truncated_share": len(cut) / len(lengths),
        "left_out": 0,
        "tokens": sum(min(length, part.max_length) for length in lengths),
    }
    save(made.remove_columns("length"), rows, counts, {"truncated": cut, "left_out": []}, out)


# -- metrics ---------------------------------------------------------------------------------------------------------


def _correlation(measure: Any) -> Any:
    """Pearson's or Spearman's; 0 where one side is constant, where neither is defined."""

    def correlation(labels: np.ndarray, scores: np.ndarray) -> float:
        if np.ptp(labels) == 0 or np.ptp(scores) == 0:
            return 0.0
        return measure(labels, scores).statistic

    return correlation


METRICS: dict[str, Any] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


def metrics(name: str, predictions: Any, labels: Any) -> dict[str, float]:
    """The metrics of a task.

    Args:
        name: the GLUE task.
        predictions: a model's output for each row: logits [n, labels], or for a regression scores [n] or [n, 1].
        labels: [n], class numbers or scores.

    Returns:
        One figure a metric, the one that papers report first; parts of 1.

    Raises:
        CoreLoraError: sizes that don't fit; predictions that are not finite.
    """
    task = GLUE[name]
    predictions, labels = np.asarray(predictions, dtype=np.float64), np.asarray(labels)
    width = len(task.labels)
    if task.kind == REGRESS and predictions.ndim == 1:
        predictions = predictions[:, None]
    if predictions.shape != (len(labels), width) or labels.ndim != 1 or not len(labels):
        raise CoreLoraError(
            f"{name}: predictions [{len(labels)}, {width}] are expected for {labels.shape} labels, "
            f"found {list(predictions.shape)}"
        )
    bad = int((~np.isfinite(predictions)).any(axis=1).sum())
    if bad:
        raise CoreLoraError(f"{name}: {bad} of {len(labels)} predictions are not finite")
    answers = predictions[:, 0] if task.kind == REGRESS else predictions.argmax(axis=1)
    return {metric: float(METRICS[metric](labels, answers)) for metric in task.metrics}
