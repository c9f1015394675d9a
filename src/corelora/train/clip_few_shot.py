"""The task `clip_few_shot`: few pictures a class, and both towers of a CLIP or SigLIP adapted to them.

As CLIP-LoRA (Zanella 2024) and the NoRA paper train: the classes' prompts go through the text tower in every step, the
picture's answer is the class whose text is nearest, and the cross-entropy over all classes trains both towers. The
logit scale stays as it is.

b pictures, n classes, t templates, d size of the shared space.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForZeroShotImageClassification

from corelora.errors import CoreLoraError, raise_all, sentences
from corelora.recipe import Recipe
from corelora.train.folder import RunFolder
from corelora.train.models import load_model, load_tokenizer
from corelora.train.pictures import PictureTask, PictureTrainer, chosen_of, images_of
from corelora.train.tasks import TASKS
from corelora.vision.choose import Chosen
from corelora.vision.tensors import Collator, Processor

SCALES = ("logit_scale", "logit_bias")  # of CLIP and SigLIP; what turns cosines into logits
LOOKED_AT = 8  # prompts that must have features of their own
READS_LAST = ("siglip",)  # text towers that read their last place, so that a text is padded to its full length


class ClipFewShot(PictureTask):
    """Classes by their texts."""

    name = "clip_few_shot"
    auto_class = AutoModelForZeroShotImageClassification
    has_texts = True
    gives_loss = False

    def texts(self, recipe: Recipe, chosen: Chosen) -> list[str]:
        """Every template with every name, a class at a time."""
        return [template.format(name) for name in chosen.names for template in chosen.templates]

    def problems(self, recipe: Recipe) -> list[str]:
        """As for all tasks of pictures; and prompts that are longer than the text tower reads."""
        found = super().problems(recipe)
        if found:
            return found
        try:
            config = self.load_config(recipe)
            if hasattr(config, "text_config"):  # else the model itself is refused
                texts = self.texts(recipe, chosen_of(recipe))
                found = [f"images.templates: {p}" for p in long_texts(texts, load_tokenizer(recipe.model), config)]
        except CoreLoraError as error:
            return sentences(error)
        return found

    def beside(self, recipe: Recipe, processor: Processor) -> Mapping[str, Tensor]:
        """Tokens of the prompts, [n t, length].

        Raises:
            CoreLoraError: prompts that are longer than the text tower reads.
        """
        return prompt_tokens(self.texts(recipe, chosen_of(recipe)), processor.tokenizer, self.load_config(recipe))

    def load_model(self, recipe: Recipe, config: Any, processor: Any, source: str | None) -> nn.Module:
        """With its logit scale frozen, in full fine-tuning too."""
        model = load_model(recipe.model, config, self.auto_class, recipe.loop.checkpointing, source)
        for name, parameter in model.named_parameters():
            if name in SCALES:
                parameter.requires_grad_(False)
        return model

    def model_problems(self, recipe: Recipe, model: Any, collator: Any) -> list[str]:
        """A model whose answers are no cosines of two towers, or whose text tower reads past the texts."""
        found = super().model_problems(recipe, model, collator)
        if SCALES[0] in dict(model.named_parameters()):
            texts = self.texts(recipe, chosen_of(recipe))
            return found + _same_features(model, collator, texts[:LOOKED_AT])
        return [*found, f"model.name: {type(model).__name__} has no {SCALES[0]}; clip_few_shot trains CLIP and SigLIP"]

    def trainer_class(self) -> type:
        """Cross-entropy over the classes' texts."""
        return TwoTowerTrainer

    def finish(self, recipe: Recipe, trainer: Any, folder: RunFolder, processor: Any) -> dict[str, Any]:
        """Zero-shot accuracy, and the accuracy of each class."""
        return {"zero_shot_accuracy": trainer.zero_shot, **super().finish(recipe, trainer, folder, processor)}


TASKS.add(ClipFewShot.name, ClipFewShot())


def prompt_tokens(texts: list[str], tokenizer: Any, config: Any) -> dict[str, Tensor]:
    """Prompts as the text tower was trained to see them.

    Args:
        texts: prompts.
        tokenizer: the model's.
        config: the model's, with its text tower's config in it.

    Returns:
        input_ids [texts, length], and attention_mask of that shape where the tower takes one.

    Raises:
        CoreLoraError: each prompt that is longer than the tower reads.
    """
    raise_all(long_texts(texts, tokenizer, config), "images.templates")
    limit = config.text_config.max_position_embeddings
    if config.model_type in READS_LAST:
        made = tokenizer(texts, padding="max_length", max_length=limit, return_tensors="pt")
        return {"input_ids": made["input_ids"]}
    made = tokenizer(texts, padding=True, return_tensors="pt")
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def long_texts(texts: list[str], tokenizer: Any, config: Any) -> list[str]:
    """Each prompt that is longer than the text tower reads, as `prompt_tokens` takes them."""
    limit = config.text_config.max_position_embeddings
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    long = [(text, length) for text, length in zip(texts, lengths, strict=True) if length > limit]
    return [f"{text!r} has {n} tokens, the text tower reads {limit}" for text, n in long]


@torch.no_grad()
def _same_features(model: nn.Module, collator: Collator, texts: list[str]) -> list[str]:
    """Two prompts that the text tower can't tell apart, as where its tokenizer does not end texts as it expects."""
    beside = {name: values[: len(texts)] for name, values in collator.batches.beside.items()}
    height, width = collator.processor.size()
    device = next(model.parameters()).device
    pixels = torch.zeros(1, 3, height, width, dtype=collator.batches.dtype, device=device)
    training = model.training
    features = model.eval()(pixel_values=pixels, **{n: v.to(device) for n, v in beside.items()}).text_embeds
    model.train(training)
    for n, text in enumerate(texts[1:], 1):
        if text != texts[0] and torch.equal(features[n], features[0]):
            return [
                f"model.name: its text tower gives {texts[0]!r} and {text!r} the same features; does its tokenizer "
                f"end a text with the token that its config names (text_config.eos_token_id)?"
            ]
    return []


def class_logits(pictures: Tensor, texts: Tensor, templates: int, scale: float) -> Tensor:
    """Scaled cosines of pictures and classes [b, n].

    SigLIP's bias is left out: it is one number for all classes, which a softmax over them does not see.

    Args:
        pictures: [b, d], of norm 1.
        texts: [n t, d], of norm 1; a class's templates stand together, and their mean is the class.
        templates: t.
        scale: what cosines are multiplied with.
    """
    classes = F.normalize(texts.unflatten(0, (-1, templates)).mean(dim=1), dim=-1)
    return scale * pictures @ classes.T


class TwoTowerTrainer(PictureTrainer):
    """Trains both towers on the classes' texts; measures the model as it came first.

    Attributes:
        zero_shot: accuracy on the test pictures before training, a part of 1; None without test pictures, and where
            FSDP or DeepSpeed share the model out, which only training prepares.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.args.n_gpu > 1:
            raise CoreLoraError(
                f"one process would split the classes' texts over {self.args.n_gpu} GPUs: start it with accelerate "
                "launch, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.templates = len(images_of(self.recipe).templates or [""])
        self.scale = _scale(self.accelerator.unwrap_model(self.model))
        self.zero_shot: float | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, after the test of the model without its adapter."""
        shared_out = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.eval_dataset is not None and not shared_out:
            plain = self.model.disable_adapter() if isinstance(self.model, PeftModel) else contextlib.nullcontext()
            with plain:
                self.zero_shot = self.evaluate(metric_key_prefix="zero_shot")["zero_shot_accuracy"]
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of the pictures; with their logits [b, n] where asked for."""
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**rest)
        logits = class_logits(outputs.image_embeds.float(), outputs.text_embeds.float(), self.templates, self.scale)
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, logits) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """(None, logits [b, n], labels [b]) of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, logits = self.compute_loss(model, inputs, return_outputs=True)
        return None, logits, inputs["labels"]


def _scale(model: nn.Module) -> float:
    """The frozen factor of the cosines."""
    found = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == SCALES[0]]
    return float(found[0].detach().float().exp())
