"""Pictures that the model makes: of a class, for the prior, and of validation prompts; a contact sheet of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from corelora.data.cache import key_of
from corelora.diffusion.parts import Parts
from corelora.run.models import cache_root

STEPS = 50  # of inference, as in the NoRA paper
BATCH = 4
CELL, CAPTION = 256, 34  # pixels of the contact sheet


def class_pictures(parts: Parts, prompt: str, count: int, size: int, steps: int = STEPS) -> list[Path]:
    """Pictures of a class, made by the pipeline itself; those that are there already are kept.

    Args:
        parts: the pipeline.
        prompt: of the class.
        count: how many.
        size: side in pixels.
        steps: of inference.
    """
    folder = cache_root() / "class-pictures" / key_of(parts.identity, prompt, size, steps)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{n:05}.png" for n in range(count)]
    with PartialState().local_main_process_first():  # one process of a machine makes them, for all
        missing = [n for n, path in enumerate(paths) if not path.is_file()]
        if missing:
            _make(parts, {n: paths[n] for n in missing}, (prompt, size, steps))
    return paths


def _make(parts: Parts, paths: Mapping[int, Path], what: tuple[str, int, int]) -> None:
    """Pictures of (prompt, side, steps), each from the noise of its number; every one is whole, or not there.

    They are drawn in the same batches whichever are missing: a picture's last bits depend on what is drawn beside it.
    """
    prompt, size, steps = what
    made = parts.pipeline().to(_device())
    for batch in tqdm(sorted({n // BATCH for n in paths}), desc="class pictures", unit="batch", delay=2):
        numbers = range(batch * BATCH, (batch + 1) * BATCH)
        for n, picture in zip(numbers, paint(made, [prompt] * BATCH, numbers, size, steps), strict=True):
            if n in paths:
                temporary = paths[n].with_suffix(".tmp")
                picture.save(temporary, format="PNG")
                os.replace(temporary, paths[n])


def paint(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], size: int, steps: int = STEPS
) -> list[Image.Image]:
    """One picture a prompt, each from noise of its own seed.

    Args:
        pipeline: on its device.
        prompts: what to show.
        seeds: as many.
        size: side in pixels.
        steps: of inference.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    options = {"generator": generators, "height": size, "width": size, "num_inference_steps": steps}
    return pipeline(list(prompts), **options).images


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path) -> None:
    """A table of pictures: a caption a row, its pictures beside each other.

    Args:
        rows: (caption, pictures).
        path: of the PNG.
    """
    wide = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (wide * CELL, len(rows) * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (caption, pictures) in enumerate(rows):
        top = n * (CELL + CAPTION)
        draw.text((8, top + 9), caption, fill="black", font_size=15)
        for k, picture in enumerate(pictures):
            sheet.paste(picture.resize((CELL, CELL)), (k * CELL, top + CAPTION))
    sheet.save(path)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
