"""Tiny Stable Diffusion pipelines from configs, and pictures of a subject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import PeftModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from corelora.diffusion.parts import find_parts
from corelora.diffusion.subject import Subject
from corelora.recipe import Recipe, read_tree
from corelora.recipe.schema import ModelPart
from processes import Driver

LENGTH = 32  # tokens of a prompt


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer over single letters."""
    letters = [chr(c) for c in range(97, 123)] + [str(n) for n in range(10)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def text_config(vocabulary: int, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def save_pipeline(folder: Path, xl: bool) -> Path:
    """A tiny SDXL or SD 1.5 in diffusers' folders; 32 x 32 pictures, 16 x 16 latents."""
    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "words")
    shape: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 2 if xl else 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64 if xl else 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    if xl:
        shape |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "use_linear_projection": True,
        }
    unet = UNet2DConditionModel(**shape)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    schedule = EulerDiscreteScheduler(**noise) if xl else PNDMScheduler(**noise, skip_prk_steps=True)  # as published
    encoder = CLIPTextModel(text_config(len(tokenizer), 32))
    common = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": schedule}
    if xl:
        second = CLIPTextModelWithProjection(text_config(len(tokenizer), 32))
        pipeline = StableDiffusionXLPipeline(**common, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        pipeline = StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return folder


def save_pictures(folder: Path, count: int = 3) -> Path:
    """Pictures of one subject: a bright square on dark ground, in another corner each."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        pixels = np.full((48, 40, 3), 30, np.uint8)
        top = 4 + 8 * n
        pixels[top : top + 12, 10:26] = (230, 60 + 30 * n, 40)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


def make_recipe(root: Path, model: str = "xl", **parts: Any) -> Recipe:
    """A recipe on a tiny pipeline under `root`; each part's keys can be changed."""
    tree: dict[str, Any] = {
        "task": "dreambooth",
        "model": {"name": str(root / model)},
        "data": {
            "train": {"path": str(root / "pictures")},
            "test": {"path": str(root / "pictures")},
            "form": "subject",
        },
        "method": {"name": "nlora", "r": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
        "optim": {"lr": 1e-3, "warmup": 0},
        "loop": {"steps": 6, "batch_size": 2, "log_every": 1, "save_every": 3, "fast": "off"},
        "subject": {"prompt": "a photo of sks", "size": 32, "inference_steps": 2},
    }
    for name, keys in parts.items():
        replace = name == "method" or not isinstance(keys, dict)
        tree[name] = keys if replace else {**tree.get(name, {}), **keys}
    recipe, problems = read_tree(Recipe, tree)
    assert not problems, problems
    assert recipe is not None
    return recipe


LOADER = """
import sys
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
torch.set_num_threads(1)
folder, *wanted = sys.argv[1:]
pictures = {}
for name in [*{f"{n[:2]}-none" for n in wanted}, *wanted]:
    kind = name[:2]
    pipeline = {"xl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}[kind]
    pipe = pipeline.from_pretrained(f"{folder}/{kind}")
    pipe.set_progress_bar_config(disable=True)
    if name in wanted:
        pipe.load_lora_weights(f"{folder}/{name}")
    noise = torch.Generator().manual_seed(5)
    made = pipe("sks", height=32, width=32, num_inference_steps=3, generator=noise, output_type="np")
    pictures[name] = torch.from_numpy(made.images[0])
torch.save(pictures, f"{folder}/pictures.pt")
assert "corelora" not in sys.modules
"""


def our_picture(root: Path, folder: Path, kind: str) -> torch.Tensor:
    """The adapter as corelora or PEFT computes it."""
    parts = find_parts(ModelPart(name=str(root / kind)))
    encoders = {name: parts.load(name) for name in parts.encoders}
    subject = Subject(parts.load("unet"), encoders, parts.load("scheduler"))
    PeftModel.from_pretrained(subject, str(folder)).eval()
    pipeline = parts.pipeline(unet=subject.unet, **{n: subject.get_submodule(n) for n in parts.encoders})
    noise = torch.Generator().manual_seed(5)
    made = pipeline("sks", height=32, width=32, num_inference_steps=3, generator=noise, output_type="np")
    return torch.from_numpy(made.images[0])


def plain_pictures(driver: Driver, root: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Pictures by plain diffusers in a process that does not know corelora, by name.

    `names` are folders under `root` with exports; they begin with the folder of their pipeline, and that alone is drawn
    too, as xl-none or sd-none.
    """
    script = root / "loader.py"
    script.write_text(LOADER)
    done = driver.call(script, root, *names, plain=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(root / "pictures.pt", weights_only=True)
