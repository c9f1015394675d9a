"""Tasks: what a run trains for. A task knows the model's class, how rows become tokens, and what is measured.

Each task registers itself; adding one is one file like `instruct`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import TrainerCallback

from corelora.data.replies import Encoded
from corelora.errors import CoreLoraError
from corelora.recipe import Recipe
from corelora.registry import Registry
from corelora.train.arguments import weight_dtype
from corelora.train.folder import RunFolder
from corelora.train.models import load_model, load_model_config, load_tokenizer


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


FEW = 20  # types of models that a message lists


class Task(ABC):
    """One kind of training. Instances have no state: everything comes from the recipe.

    A task of one model of transformers says which (`auto_class`) and what its rows are; one of another kind, such as a
    diffusion pipeline, also has its own `load_config`, `load_processor`, `make_meta`, `load_model` and `save`.
    """

    name: str
    task_type: str | None  # PEFT's
    auto_class: Any  # transformers' class that loads the model
    gives_loss: bool = True  # the model itself, for a batch: what starts of first gradients need
    reads_tokens: bool = True  # a step's memory can be simulated from data.max_length
    exports: str = "FOLDER    a plain LoRA for any server"  # what `corelora export` makes of its adapters

    # -- the model ---------------------------------------------------------------------------------------------------

    def config_settings(self, recipe: Recipe) -> dict[str, Any]:
        """Settings of the model's config that the task decides, such as num_labels."""
        return {}

    def load_config(self, recipe: Recipe) -> Any:
        """The model's config; no weights are read.

        Raises:
            CoreLoraError: there is no such model.
        """
        return load_model_config(recipe.model, **self.config_settings(recipe))

    def plain_config(self, recipe: Recipe) -> Any:
        """The same without what the data decides, where the data can't be used.

        Raises:
            CoreLoraError: there is no such model.
        """
        return load_model_config(recipe.model)

    def load_processor(self, recipe: Recipe) -> Any:
        """What turns rows into tensors, saved with the weights: a tokenizer, or a processor of images.

        Raises:
            CoreLoraError: the model has none.
        """
        return load_tokenizer(recipe.model)

    def make_meta(self, recipe: Recipe, config: Any) -> nn.Module:
        """The model on the meta device: shapes and names, no weights.

        Raises:
            CoreLoraError: it does not have the recipe's attention, or this machine lacks the package for it.
        """
        attention = recipe.model.attention
        options = {} if attention is None else {"attn_implementation": attention}
        try:
            with torch.device("meta"):
                model: nn.Module = self.auto_class.from_config(
                    copy.deepcopy(config),
                    dtype=weight_dtype(recipe.model, config),
                    trust_remote_code=recipe.model.trust_remote_code,
                    **options,
                )
        except (ValueError, ImportError) as error:
            if "Unrecognized configuration class" in str(error):
                raise CoreLoraError(f"model.name: {self._wrong_type(config)}") from None
            if attention is None:
                raise
            raise CoreLoraError(f"model.attention: {error}") from None
        return model

    def _wrong_type(self, config: Any) -> str:
        """What to say of a model that the task has no class for."""
        known = sorted({kind.model_type for kind in self.auto_class._model_mapping})
        which = f": {', '.join(known)}" if len(known) <= FEW else f", {len(known)} of them"
        return f"{config.model_type} is no type of model that the task {self.name} trains{which}"

    def load_model(self, recipe: Recipe, config: Any, processor: Any, source: str | None) -> nn.Module:
        """The model with its weights, from a folder `source` where that is given.

        Raises:
            CoreLoraError: it can't be loaded.
        """
        return load_model(recipe.model, config, self.auto_class, recipe.loop.checkpointing, source)

    def heads(self, model: nn.Module) -> list[str]:
        """Modules that are new in each run and train beside the adapter."""
        return []

    def unused(self, model: nn.Module) -> list[str]:
        """Modules that the loss does not depend on; they get no adapter, which would never learn."""
        return []

    def save(self, model: Any, folder: Path, processor: Any, state: Mapping[str, Any] | None) -> None:
        """Write the adapter, or the whole model, with its processor into a folder.

        Args:
            model: as it was trained.
            folder: made here.
            processor: as `load_processor` gave it.
            state: the weights, where they were gathered from several processes.
        """
        model.config.use_cache = True  # switched off for training; a saved model generates with it
        model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)

    # -- its rows ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def problems(self, recipe: Recipe) -> list[str]:
        """What is wrong with the recipe's data for this task, without loading weights."""

    @abstractmethod
    def encode(self, recipe: Recipe, which: str, processor: Any) -> Rows:
        """Rows of `data.train` or `data.test`, ready for the collator."""

    @abstractmethod
    def collator(self, recipe: Recipe, processor: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Rows to one batch of tensors."""

    @abstractmethod
    def sample(self, row: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        """A row as pieces of text, each with whether it is trained."""

    def processor_problems(self, recipe: Recipe) -> list[str]:
        """Why the rows can't be encoded with what the model has for that, as far as no weights are needed to tell."""
        return []

    def row_problems(self, rows: Rows, processor: Any, config: Any) -> list[str]:
        """Why these rows would train the wrong thing."""
        return []

    def model_problems(self, recipe: Recipe, model: Any, collator: Any) -> list[str]:
        """Why this model, as it was loaded, can't be trained on this data."""
        return []

    # -- the run -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, recipe: Recipe) -> Callable[[Any], dict[str, float]]:
        """The function that turns predictions of all test rows into figures: `loss` and the task's own."""

    @abstractmethod
    def trainer_class(self) -> type:
        """The RunTrainer that gives those predictions."""

    def callbacks(self, recipe: Recipe, folder: RunFolder, processor: Any) -> list[TrainerCallback]:
        """What else watches the run."""
        return []

    def finish(self, recipe: Recipe, trainer: Any, folder: RunFolder, processor: Any) -> dict[str, Any]:
        """What else a run leaves behind, after its test: pictures, tables.

        Returns:
            More figures for results.json.
        """
        return {}


TASKS: Registry[Task] = Registry("task")
