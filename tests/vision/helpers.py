"""Generated textures, tiny models of two towers and classifiers, and recipes over them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)

from corelora.recipe import Recipe, read_tree
from corelora.vision.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from train.helpers import save_tokenizer

SIDE = 32  # pixels of the tiny models
REPOSITORY = Path(__file__).parents[2]
SHARED = Path(os.environ.get("CORELORA_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
DTD = SHARED / "vision" / "dtd10"
TEXTURES = ("banded", "dotted", "chequered")


def texture(kind: str, seed: int, side: int = 40) -> Image.Image:
    """A picture of stripes, dots or squares, of a random period, phase and colour."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] + draw.integers(0, 8)
    period = draw.integers(6, 10)
    waves = {
        "banded": np.sin(2 * np.pi * y / period) > 0,
        "dotted": (y % period < 2) & (x % period < 2),
        "chequered": ((y // (period // 2)) + (x // (period // 2))) % 2 > 0,
    }
    colours = draw.integers(0, 256, (2, 3))
    values = np.where(waves[kind][..., None], colours[0], 255 - colours[0])
    noise = draw.normal(0, 8, values.shape)
    return Image.fromarray((values + noise).clip(0, 255).astype(np.uint8))


def save_textures(folder: Path, train: int = 12, test: int = 8) -> Path:
    """Folders of classes under `train` and `test`."""
    for which, count, first in (("train", train, 0), ("test", test, 1000)):
        for k, kind in enumerate(TEXTURES):
            place = folder / which / kind
            place.mkdir(parents=True)
            for n in range(count):
                texture(kind, first + 100 * k + n).save(place / f"{n:03}.png")
    return folder


def save_processor(folder: Path, side: int = SIDE) -> None:
    """An image processor without tricks."""
    size = {"height": side, "width": side}
    BitImageProcessor(size={"shortest_edge": side}, crop_size=size).save_pretrained(folder)


def save_texts(folder: Path) -> Any:
    """A character tokenizer that ends each text with its stop token, where CLIP's text tower reads."""
    tokenizer = save_tokenizer(folder)
    stop = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {stop[0]}", special_tokens=[stop])
    tokenizer.save_pretrained(folder)
    return tokenizer


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_clip(folder: Path) -> Path:
    """A tiny CLIP with its processor and tokenizer."""
    tokenizer = save_texts(folder)
    save_processor(folder)
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 48}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
    vision = {**TOWER, "image_size": SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """A tiny SigLIP with its processor and tokenizer."""
    tokenizer = save_texts(folder)
    save_processor(folder)
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 48, "projection_size": 32}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
    vision = {**TOWER, "image_size": SIDE, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model.logit_scale.data.fill_(2.3)  # where SigLIP's training begins; a new model draws it
    model.save_pretrained(folder)
    return folder


def _vit() -> Any:
    return ViTForImageClassification(ViTConfig(**TOWER, image_size=SIDE, patch_size=8))


def _resnet() -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def _convnext() -> Any:
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2))


def _efficientnet() -> Any:
    stages = [(1, 3, 1, 1, 8), (2, 5, 2, 2, 16)]
    sizes = {"stem": 8, "top": 32, "image_size": SIDE}
    return EfficientNetLiteForImageClassification(EfficientNetLiteConfig(stages, **sizes))


CLASSIFIERS = {"vit": _vit, "resnet": _resnet, "convnext": _convnext, "efficientnet": _efficientnet}


def save_classifier(folder: Path, kind: str) -> Path:
    """A tiny classifier with its processor."""
    save_processor(folder)
    torch.manual_seed(0)
    CLASSIFIERS[kind]().save_pretrained(folder)
    return folder


def make_recipe(model: Path, pictures: Path, /, **parts: Any) -> Recipe:
    """A recipe over a tiny model and textures; each part's keys can be changed.

    Args:
        model: the model's folder.
        pictures: holds the folders `train` and `test`.
        **parts: keys laid over the defaults; `method` is replaced.
    """
    tree: dict[str, Any] = {
        "task": "clip_few_shot",
        "model": {"name": str(model)},
        "data": {
            "train": {"path": str(pictures)},
            "test": {"path": str(pictures), "split": "test"},
            "form": "folder",
        },
        "images": {"augment": "none"},
        "method": {"name": "nora", "r": 8, "inner_r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        "optim": {"lr": 2e-3, "warmup": 0.0},
        "loop": {"steps": 6, "batch_size": 12, "log_every": 2, "save_every": 100, "fast": "off"},
        "stats": {"batches": 2, "batch_size": 6},
    }
    for name, keys in parts.items():
        replace = name == "method" or not isinstance(keys, dict)
        tree[name] = keys if replace else {**tree.get(name, {}), **keys}
    recipe, problems = read_tree(Recipe, tree)
    assert not problems, problems
    assert recipe is not None
    return recipe
