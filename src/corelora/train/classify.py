"""The task `classify`: GLUE, with a new head that trains beside the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import log_softmax
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

from corelora.data.check import check_data
from corelora.data.glue import GLUE, REGRESS, encode_pairs, metrics
from corelora.recipe import Recipe
from corelora.train.tasks import TASKS, Rows, Task, as_rows
from corelora.train.trainer import LabelTrainer


class Classify(Task):
    """Labels, or a score, of one or two texts."""

    name = "classify"
    task_type = "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification
    has_head = True

    def config_settings(self, recipe: Recipe) -> dict[str, Any]:
        """As many outputs as the task has labels; one, with a squared loss, for a regression."""
        task = GLUE[recipe.data.form]
        names = dict(enumerate(task.labels))
        labels = {"id2label": names, "label2id": {label: n for n, label in names.items()}}
        return {"num_labels": len(task.labels), "problem_type": task.kind, **labels}

    def problems(self, recipe: Recipe) -> list[str]:
        """Missing files and columns, unknown tasks."""
        return check_data(recipe.data, self.name)

    def encode(self, recipe: Recipe, which: str, tokenizer: Any) -> Rows:
        """Token ids and labels of the rows; cached, once for all processes."""
        return as_rows(encode_pairs(recipe.data, which, tokenizer, recipe.loop.seed))

    def collator(self, recipe: Recipe, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Pads to the longest row of the batch."""
        return DataCollatorWithPadding(tokenizer)

    def measure(self, recipe: Recipe) -> Callable[[Any], dict[str, float]]:
        """The mean loss of a row and the task's metrics."""
        regress = GLUE[recipe.data.form].kind == REGRESS

        def figures(prediction: EvalPrediction) -> dict[str, float]:
            logits, labels = np.asarray(prediction.predictions, np.float64), np.asarray(prediction.label_ids)
            if regress:
                losses = (logits[:, 0] - labels) ** 2
            else:
                losses = -np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1)
            return {"loss": float(losses.mean()), **metrics(recipe.data.form, logits, labels)}

        return figures

    def trainer_class(self) -> type:
        """Predictions of all rows."""
        return LabelTrainer

    def sample(self, row: Mapping[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
        """The row's text, and its label as what is trained."""
        return [(f"{tokenizer.decode(row['input_ids'])} -> label ", False), (str(row["labels"]), True)]

    def row_problems(self, rows: Rows, tokenizer: Any, stop_ids: set[int]) -> list[str]:
        """Nothing beyond what reading the rows checks: a label has no stop token."""
        return []

    def model_problems(self, recipe: Recipe, model: Any, collator: Any) -> list[str]:
        """Nothing: rows of a batch don't meet."""
        return []


TASKS.add(Classify.name, Classify())
