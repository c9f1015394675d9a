"""The task `image_classification`: classes of pictures, with a new head on any image classifier of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification

from corelora.recipe import Recipe
from corelora.train.methods import is_full
from corelora.train.models import head_names, load_model
from corelora.train.pictures import PictureTask, chosen_of
from corelora.train.tasks import TASKS
from corelora.vision.norms import freeze_batch_norms

HEAD_STD = 0.01  # of a new head's weights: small, so that its first answers are even


class ImageClassification(PictureTask):
    """One class a picture; ViT, ConvNeXt, ResNet, EfficientNet-Lite, ...."""

    name = "image_classification"
    auto_class = AutoModelForImageClassification

    def config_settings(self, recipe: Recipe) -> dict[str, Any]:
        """The classes' names, and so as many outputs."""
        names = dict(enumerate(chosen_of(recipe).names))
        return {
            "id2label": names,
            "label2id": {name: n for n, name in names.items()},
            "problem_type": "single_label_classification",
        }

    def load_model(self, recipe: Recipe, config: Any, processor: Any, source: str | None) -> nn.Module:
        """With a new head, unless the weights are those of an earlier run; batch norms frozen unless all trains."""
        checkpointing = recipe.loop.checkpointing
        model: Any = load_model(recipe.model, config, self.auto_class, checkpointing, source, new_head=True)
        if source is None:
            _begin_anew(model, self.heads(model))
        if not is_full(recipe.method):
            freeze_batch_norms(model)
        if not torch.cuda.is_available():  # two thirds of the time of a step there, or less
            model.to(memory_format=torch.channels_last)
        return model

    def heads(self, model: nn.Module) -> list[str]:
        """The classifier."""
        return head_names(model)


def _begin_anew(model: nn.Module, heads: list[str]) -> None:
    """Draw the heads' weights, also where a pretrained head happens to have the right size."""
    layers = (m for name in heads for m in model.get_submodule(name).modules())
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(layer.weight, std=HEAD_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


TASKS.add(ImageClassification.name, ImageClassification())
