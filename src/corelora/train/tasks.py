"""Tasks: what a run trains for. A task knows the model's class, how rows become tokens, and what is measured.

Each task registers itself; adding one is one file like `instruct`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets

from corelora.data.replies import Encoded
from corelora.recipe import Recipe
from corelora.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokenised rows, ready for the collator.

    Attributes:
        dataset: one example a row.
        counts: what was counted while tokenising, for the results: rows, tokens, truncated, ...
        summary: the same for a reader.
        fingerprint: names the content and its order; None where that is not known.
    """

    dataset: datasets.Dataset
    counts: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""
    fingerprint: str | None = None


def as_rows(encoded: Encoded) -> Rows:
    """What `corelora.data` made, as a run takes it."""
    return Rows(
        dataset=encoded.dataset,
        counts=encoded.counts,
        summary=encoded.summary(),
        fingerprint=encoded.fingerprint,
    )


class Task(ABC):
    """One kind of training. Instances have no state: everything comes from the recipe."""

    name: str
    task_type: str  # PEFT's
    auto_class: Any  # transformers' class that loads the model
    has_head: bool  # a new head trains beside the adapter

    @abstractmethod
    def config_settings(self, recipe: Recipe) -> dict[str, Any]:
        """Settings of the model's config that the task decides, such as num_labels."""

    @abstractmethod
    def problems(self, recipe: Recipe) -> list[str]:
        """What is wrong with the recipe's data for this task, without loading weights."""

    @abstractmethod
    def encode(self, recipe: Recipe, which: str, tokenizer: Any) -> Rows:
        """Tokenised rows of `data.train` or `data.test`."""

    @abstractmethod
    def collator(self, recipe: Recipe, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Rows to one batch of tensors."""

    @abstractmethod
    def measure(self, recipe: Recipe) -> Callable[[Any], dict[str, float]]:
        """The function that turns predictions of all test rows into figures: `loss` and the task's own."""

    @abstractmethod
    def trainer_class(self) -> type:
        """The RunTrainer that gives those predictions."""

    @abstractmethod
    def sample(self, row: Mapping[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
        """A row as pieces of text, each with whether it is trained."""

    @abstractmethod
    def row_problems(self, rows: Rows, tokenizer: Any, stop_ids: set[int]) -> list[str]:
        """Why these rows would train the wrong thing."""

    @abstractmethod
    def model_problems(self, recipe: Recipe, model: Any, collator: Any) -> list[str]:
        """Why this model, as it was loaded, can't be trained on this data."""


TASKS: Registry[Task] = Registry("task")
