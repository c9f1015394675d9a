"""The task `classify`: GLUE, with a new head that trains beside the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import log_softmax
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
)

from corelora.data.check import check_data
from corelora.data.glue import GLUE, REGRESS, encode_pairs, metrics
from corelora.recipe import Recipe
from corelora.train.graphs import row_multiple
from corelora.train.models import head_names, load_model
from corelora.train.tasks import TASKS, Rows, Task, as_rows
from corelora.train.trainer import LabelTrainer


class Classify(Task):
    """Labels, or a score, of one or two texts."""

    name = "classify"
    task_type = "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification

    def config_settings(self, recipe: Recipe) -> dict[str, Any]:
        """As many outputs as the task has labels; one, with a squared loss, for a regression."""
        task = GLUE[recipe.data.form]
        names = dict(enumerate(task.labels))
        labels = {"id2label": names, "label2id": {label: n for n, label in names.items()}}
        return {"num_labels": len(task.labels), "problem_type": task.kind, **labels}

    def load_model(self, recipe: Recipe, config: Any, processor: Any, source: str | None) -> nn.Module:
        """A head of another task's size begins anew. With a padding token in its config, which decoders look for."""
        checkpointing = recipe.loop.checkpointing
        model = load_model(recipe.model, config, self.auto_class, checkpointing, source, new_head=True)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id
        return model

    def heads(self, model: nn.Module) -> list[str]:
        """The classifier."""
        return head_names(model)

    def problems(self, recipe: Recipe) -> list[str]:
        """Missing files and columns, unknown tasks."""
        return check_data(recipe.data, self.name)

    def encode(self, recipe: Recipe, which: str, processor: Any) -> Rows:
        """Token ids and labels of the rows; cached, once for all processes."""
        return as_rows(encode_pairs(recipe.data, which, processor, recipe.loop.seed))

    def collator(self, recipe: Recipe, processor: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Pads to the longest row of the batch."""
        return DataCollatorWithPadding(processor, pad_to_multiple_of=row_multiple(recipe))

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

    def sample(self, row: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        """The row's text, and its label as what is trained."""
        return [(f"{processor.decode(row['input_ids'])} -> label ", False), (str(row["labels"]), True)]


TASKS.add(Classify.name, Classify())
