"""A small world for the task `dreambooth`: a Stable Diffusion of drawn shapes, made from nothing, and a subject.

    python benchmarks/shapes.py FOLDER [--steps 3000] [--method nora]

No pretrained weights are needed. A pipeline of SD 1.5's kind (VAE, text encoder, UNet; 2 million parameters) learns
drawings of 32 x 32 pixels from prompts such as `a red ring on blue`. Then `corelora.train` teaches it one ball in two
colours from four drawings. FOLDER/subject.png shows what it makes of some prompts before and after.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from corelora.diffusion.parts import find_parts
from corelora.diffusion.pictures import contact_sheet, paint
from corelora.diffusion.rows import cut
from corelora.recipe import Recipe, read_tree
from corelora.recipe.schema import ModelPart
from corelora.train.run import train

SIDE, SHOWN, LENGTH = 32, 4, 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLOURS = {"red": "#d03030", "blue": "#3050c8", "green": "#30a050", "black": "#202020", "white": "#f4f4f4"}
SHAPES = ("ball", "box", "ring")
SUBJECT = "a sks ball"
PROMPTS = [
    "a sks ball on blue",
    "a sks ball on green",
    "a sks ball on black",
    "a red ball on green",
    "a blue box on white",
]


def draw(shape: str, colour: str, ground: str, random: torch.Generator) -> Image.Image:
    """A shape somewhere on a ground; `sks` is the colour of the subject, left half orange and right half violet."""
    picture = Image.new("RGB", (4 * SIDE, 4 * SIDE), COLOURS[ground])
    size = int(torch.randint(56, 80, (), generator=random))
    x, y = (int(torch.randint(6, 4 * SIDE - size - 6, (), generator=random)) for _ in range(2))
    box, pen = (x, y, x + size, y + size), ImageDraw.Draw(picture)
    if shape == "box":
        pen.rectangle(box, fill=COLOURS[colour])
    elif shape == "ring":
        pen.ellipse(box, outline=COLOURS[colour], width=size // 5)
    elif colour == "sks":
        pen.pieslice(box, 90, 270, fill="#f09020")
        pen.pieslice(box, 270, 90, fill="#9040c0")
    else:
        pen.ellipse(box, fill=COLOURS[colour])
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def world(random: torch.Generator) -> tuple[Tensor, list[str]]:
    """Some drawings of every shape in every colour on every other ground [n, 3, h, w], with their prompts."""
    pictures, prompts = [], []
    for shape in SHAPES:
        for colour in COLOURS:
            for ground in COLOURS:
                if colour != ground:
                    pictures += [cut(draw(shape, colour, ground, random), SIDE)[0] for _ in range(24)]
                    prompts += [f"a {colour} {shape} on {ground}"] * 24
    return torch.stack(pictures), prompts


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's, over letters."""
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def models(words: int) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    """Small ones, with random weights."""
    vae = AutoencoderKL(
        block_out_channels=(24, 48),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=words, max_position_embeddings=LENGTH, **sizes, **ends))
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return vae, text, unet


def train_vae(vae: AutoencoderKL, pictures: Tensor, steps: int) -> None:
    """Pictures to latents and back; then latents are scaled to a deviation of one."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="VAE", unit="step"):
        rows = pictures[torch.randint(len(pictures), (16,))]
        found = vae.encode(rows).latent_dist
        loss = F.mse_loss(vae.decode(found.sample()).sample, rows) + 1e-5 * found.kl().mean() / rows[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=float(1 / vae.encode(pictures[::17]).latent_dist.mean.std()))


def train_unet(parts: tuple[Any, Any, Any, Any], pictures: Tensor, prompts: list[str], steps: int) -> None:
    """Text encoder and UNet on the noise; one prompt in eight is left out, as pictures are made with guidance."""
    vae, text, unet, words = parts
    schedule = DDPMScheduler(**NOISE)
    ids = words(prompts, padding="max_length", return_tensors="pt").input_ids.to(DEVICE)
    nothing = words([""], padding="max_length", return_tensors="pt").input_ids.to(DEVICE)
    with torch.no_grad():
        latents = torch.cat([vae.encode(p).latent_dist.mean for p in pictures.split(64)]) * vae.config.scaling_factor
    optimizer = torch.optim.AdamW([*text.parameters(), *unet.parameters()], lr=1e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="UNet", unit="step"):
        chosen = torch.randint(len(latents), (24,))
        told = torch.where(torch.rand(24, 1, device=DEVICE) < 1 / 8, nothing, ids[chosen])
        noise, times = torch.randn_like(latents[chosen]), torch.randint(1000, (24,), device=DEVICE)
        noisy = schedule.add_noise(latents[chosen], noise, times)
        loss = F.mse_loss(unet(noisy, times, text(told).last_hidden_state).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()


NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_pipeline(folder: Path, steps: int) -> None:
    """Train a pipeline and save it."""
    torch.manual_seed(0)
    words = tokenizer(folder / "words")
    vae, text, unet = (model.to(DEVICE) for model in models(len(words)))
    pictures, prompts = world(torch.Generator().manual_seed(0))
    pictures = pictures.to(DEVICE)
    train_vae(vae, pictures, steps // 4)
    train_unet((vae, text, unet, words), pictures, prompts, steps)
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {"vae": vae, "text_encoder": text, "tokenizer": words, "unet": unet, "scheduler": scheduler}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **none).save_pretrained(folder)


def subject_recipe(root: Path, method: str) -> Recipe:
    """Four drawings of the subject on white and red, its class beside them."""
    tree = {
        "task": "dreambooth",
        "model": {"name": str(root / "pipeline")},
        "data": {"train": {"path": str(root / "pictures")}, "form": "subject"},
        "method": {"name": method, "r": 32, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
        "optim": {"lr": 2e-3 if method != "nora" else 1e-2, "warmup": 0},
        "loop": {"steps": 300, "batch_size": 4, "log_every": 50},
        "subject": {
            "prompt": SUBJECT,
            "class_prompt": "a ball",
            "class_images": 32,
            "inference_steps": 25,
            "validation_prompts": PROMPTS,
        },
    }
    recipe, problems = read_tree(Recipe, tree)
    assert recipe is not None, problems
    return recipe


def main() -> int:
    """Make the world, teach the subject, show both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000, help="of the pipeline's own training")
    parser.add_argument("--method", default="nora")
    arguments = parser.parse_args()
    root: Path = arguments.folder
    if not (root / "pipeline" / "model_index.json").is_file():
        make_pipeline(root / "pipeline", arguments.steps)
    (root / "pictures").mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(1)
    for n, ground in enumerate(("white", "red", "white", "red")):
        draw("ball", "sks", ground, random).save(root / "pictures" / f"{n}.png")
    before = find_parts(ModelPart(name=str(root / "pipeline"))).pipeline().to(DEVICE)
    rows = [(f"before: {p}", paint(before, [p] * SHOWN, range(SHOWN), SIDE, 25)) for p in PROMPTS]
    contact_sheet(rows, root / "before.png")
    run = root / f"run-{arguments.method}"
    results = train(subject_recipe(root, arguments.method), run)
    print(json.dumps({k: results[k] for k in ("train_loss", "trained_parameters", "seconds")}))
    print(f"{root / 'before.png'}\n{run / 'contact-sheet.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
