"""What tasks of pictures share: the pictures of a run, their rows and batches, and the Trainer that crops by epoch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback

from corelora.errors import CoreLoraError, sentences
from corelora.recipe import Recipe
from corelora.recipe.images import ImagesPart
from corelora.train.arguments import weight_dtype
from corelora.train.folder import RunFolder
from corelora.train.models import model_place, model_source
from corelora.train.tasks import Rows, Task
from corelora.train.trainer import LabelTrainer
from corelora.vision.choose import Chosen, check_pictures, choose
from corelora.vision.listing import PICTURE
from corelora.vision.rows import encode_pictures
from corelora.vision.tensors import Batches, Collator, Processor, load_processor


def images_of(recipe: Recipe) -> ImagesPart:
    """The recipe's part, or its defaults."""
    return recipe.images or ImagesPart()


def chosen_of(recipe: Recipe) -> Chosen:
    """The pictures of a run.

    Raises:
        CoreLoraError: as `choose`.
    """
    return choose(recipe.data, images_of(recipe), recipe.loop.seed)


class PictureTask(Task):
    """A task whose rows are pictures of classes, measured by their accuracy."""

    reads_tokens = False
    task_type = None  # PEFT has none for pictures
    exports = "FOLDER --for peft    a plain LoRA for PEFT"
    has_texts = False  # a text tower reads the classes' prompts

    def load_processor(self, recipe: Recipe) -> Processor:
        """The model's image processor, and its tokenizer where it reads texts."""
        processor = load_processor(model_source(recipe.model), model_place(recipe.model), self.has_texts)
        processor.size()
        return processor

    def problems(self, recipe: Recipe) -> list[str]:
        """Sets, classes, files; every picture is decoded."""
        try:
            check_pictures(chosen_of(recipe))
        except CoreLoraError as error:
            return sentences(error)
        return []

    def encode(self, recipe: Recipe, which: str, processor: Any) -> Rows:
        """Pictures, which the collator decodes."""
        chosen, images = chosen_of(recipe), images_of(recipe)
        dataset, fingerprint = encode_pictures(
            chosen, which, processor.images.to_dict(), images.augment, recipe.loop.seed, self.texts(recipe, chosen)
        )
        counts = {"rows": len(dataset), "classes": len(chosen.classes)}
        summary = f"{len(dataset):,} pictures of {len(chosen.classes):,} classes"
        return Rows(dataset=dataset, counts=counts, summary=summary, fingerprint=fingerprint)

    def texts(self, recipe: Recipe, chosen: Chosen) -> list[str]:
        """The prompts of all classes, where the model reads any."""
        return []

    def collator(self, recipe: Recipe, processor: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Decodes; crops and flips training pictures."""
        made = Batches(
            augment=images_of(recipe).augment,
            seed=recipe.loop.seed,
            dtype=weight_dtype(recipe.model, self.load_config(recipe)),
            beside=self.beside(recipe, processor),
        )
        return Collator(processor, made)

    def beside(self, recipe: Recipe, processor: Processor) -> Mapping[str, Tensor]:
        """Tensors that every batch has beside its pictures."""
        return {}

    def sample(self, row: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        """The picture's file and size, and its class as what is trained."""
        height, width = processor.size()
        path = row[PICTURE]["path"]
        name = Path(path).name if path else "a picture"
        return [(f"{name}, as {height} x {width} pixels -> class ", False), (row["name"], True)]

    def model_problems(self, recipe: Recipe, model: Any, collator: Any) -> list[str]:
        """Recomputed activations, where the model has no such thing."""
        if recipe.loop.checkpointing and not model.supports_gradient_checkpointing:
            return [f"loop.checkpointing: {type(model).__name__} can't recompute its activations; set it to false"]
        return []

    def measure(self, recipe: Recipe) -> Callable[[Any], dict[str, float]]:
        """The mean loss of a picture and the accuracy of the first answer."""
        return figures

    def trainer_class(self) -> type:
        """Predictions of all pictures, kept for the table of classes."""
        return PictureTrainer

    def finish(self, recipe: Recipe, trainer: Any, folder: RunFolder, processor: Any) -> dict[str, Any]:
        """The accuracy of each class, where the recipe has test pictures."""
        if trainer.tested is None:
            return {}
        return {"classes": by_class(trainer.tested, chosen_of(recipe).classes)}

    @abstractmethod
    def load_model(self, recipe: Recipe, config: Any, processor: Any, source: str | None) -> Any:
        """The model with its weights."""


def figures(prediction: EvalPrediction) -> dict[str, float]:
    """Mean loss and top-1 accuracy.

    Args:
        prediction: logits [n, classes] and labels [n].
    """
    logits, labels = np.asarray(prediction.predictions, np.float64), np.asarray(prediction.label_ids)
    losses = -np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1)
    return {"loss": float(losses.mean()), "accuracy": float((logits.argmax(axis=1) == labels).mean())}


def by_class(prediction: EvalPrediction, classes: list[str]) -> dict[str, dict[str, float]]:
    """Pictures, accuracy and most frequent wrong answer of each class.

    Args:
        prediction: logits [n, classes] and labels [n].
        classes: their names.
    """
    answers, labels = np.asarray(prediction.predictions).argmax(axis=1), np.asarray(prediction.label_ids)
    table: dict[str, dict[str, Any]] = {}
    for n, name in enumerate(classes):
        own = answers[labels == n]
        counts = np.bincount(own[own != n], minlength=len(classes))
        wrong = classes[int(counts.argmax())] if counts.any() else None
        table[name] = {
            "pictures": len(own),
            "accuracy": float((own == n).mean()) if len(own) else None,
            "taken_for": wrong,
        }
    return table


class PictureTrainer(LabelTrainer):
    """Tells the collator the epoch, and keeps the predictions of the last test."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tested: EvalPrediction | None = None
        self.add_callback(_TellEpoch(self.data_collator))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        output = super().evaluation_loop(*args, **kwargs)
        assert output.label_ids is not None  # every row of pictures has one
        self.tested = EvalPrediction(predictions=output.predictions, label_ids=output.label_ids)
        return output


class _TellEpoch(TrainerCallback):
    """Crops are drawn by epoch; the collator makes a batch before its step, so it can't count for itself."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A whole number also where a run goes on within an epoch."""
        self.collator.epoch = int((state.epoch or 0) + 1e-6)
