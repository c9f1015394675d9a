"""Pictures to tensors: a model's own processor, and while training a crop and a flip before its last steps.

Every draw depends on the run's seed, the epoch and the picture alone, so a run that goes on after a cut sees the same
crops as one that nobody disturbed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from corelora.errors import CoreLoraError
from corelora.vision.pictures import read_picture

AREAS = {"light": (0.5, 1.0), "strong": (0.08, 1.0)}  # of the crop, as parts of the picture
RATIOS = (3 / 4, 4 / 3)  # width over height of the crop
TRIES = 10  # draws of a crop that fits; after them the largest square in the middle is taken
MOST_THREADS = 8  # that decode and crop a batch
KEPT = 1 << 30  # bytes of decoded pictures that are held, so that a small set is decoded once


@dataclass(frozen=True)
class Processor:
    """What turns pictures, and for two towers texts, into tensors.

    Attributes:
        images: the model's image processor.
        tokenizer: of the text tower, or None.
    """

    images: Any
    tokenizer: Any = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both beside the weights."""
        self.images.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures in RGB, of any size -> [b, 3, height, width], without any chance."""
        return self.images(images=list(pictures), return_tensors="pt")["pixel_values"].float()

    def size(self) -> tuple[int, int]:
        """(height, width) of every tensor.

        Raises:
            CoreLoraError: the size depends on the picture, so that no batch can be made; pictures become something
                else than pixels.
        """
        made = self.images(images=[Image.new("RGB", (64, 48))], return_tensors="pt")
        beside = sorted(set(made) - {"pixel_values"})
        if beside or made["pixel_values"].ndim != 4:
            also = f", and {', '.join(beside)}" if beside else ""
            shape = list(made["pixel_values"].shape)
            raise CoreLoraError(f"model.name: its processor makes pixel_values {shape}{also}; [1, 3, h, w] is expected")
        sizes = {tuple(self([Image.new("RGB", size)]).shape[2:]) for size in ((640, 480), (300, 500))}
        if len(sizes) > 1:
            shown = " and ".join(f"{h} x {w}" for h, w in sorted(sizes))
            raise CoreLoraError(
                f"model.name: its processor makes tensors of several sizes ({shown}): none can be batched"
            )
        height, width = sizes.pop()
        return height, width


def load_processor(source: str, where: Mapping[str, Any], texts: bool) -> Processor:
    """The processor of a model.

    Args:
        source: folder or hub name.
        where: revision and trust_remote_code, as transformers takes them.
        texts: the model has a text tower, too.

    Raises:
        CoreLoraError: the model has none.
    """
    try:
        images = AutoImageProcessor.from_pretrained(source, **where)
        tokenizer = AutoTokenizer.from_pretrained(source, **where) if texts else None
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = "image processor and tokenizer" if texts else "image processor"
        raise CoreLoraError(f"model.name: no {kind} at {source!r} ({first})") from None
    return Processor(images, tokenizer)


class Cropper:
    """Crops, flips and normalises training pictures.

    Args:
        processor: whose size, filter, mean and deviation are used.
        augment: a name of AREAS.
    """

    def __init__(self, processor: Processor, augment: str) -> None:
        own = processor.images
        self.height, self.width = processor.size()
        self.area = AREAS[augment]
        self.filter = Image.Resampling(int(own.resample))
        self.factor = float(own.rescale_factor) if own.do_rescale else 1.0
        mean, std = (own.image_mean, own.image_std) if own.do_normalize else ([0.0] * 3, [1.0] * 3)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32).reshape(3, 1, 1) for v in (mean, std))

    def __call__(self, picture: Image.Image, draw: random.Random) -> Tensor:
        """One picture in RGB -> [3, height, width]."""
        box = crop_box(picture.size, self.area, draw)
        out = picture.resize((self.width, self.height), self.filter, box=box)
        if draw.random() < 0.5:
            out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.normalise(out)

    def normalise(self, picture: Image.Image) -> Tensor:
        """A picture of the right size -> [3, height, width], as the processor's last steps make it."""
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
        return (values * self.factor - self.mean) / self.std


def crop_box(
    size: tuple[int, int], area: tuple[float, float], draw: random.Random
) -> tuple[float, float, float, float]:
    """A random part of a picture: area even between two parts of the whole, ratio even in its logarithm.

    Args:
        size: (width, height) in pixels.
        area: smallest and largest part, of 1.
        draw: where chance comes from.

    Returns:
        (left, top, right, bottom) in pixels, inside the picture.
    """
    width, height = size
    for _ in range(TRIES):
        pixels = width * height * draw.uniform(*area)
        ratio = math.exp(draw.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
        if w <= width and h <= height:
            left, top = draw.uniform(0, width - w), draw.uniform(0, height - h)
            return left, top, min(left + w, width), min(top + h, height)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


@dataclass(frozen=True, kw_only=True)
class Batches:
    """How rows become batches.

    Attributes:
        augment: for training rows: `none` or a name of AREAS.
        seed: of the run.
        dtype: of the pixels: that of the model's weights, which not every model turns them into.
        beside: tensors that every batch has as well, such as the class texts.
    """

    augment: str = "none"
    seed: int = 0
    dtype: torch.dtype = torch.float32
    beside: Mapping[str, Tensor] = field(default_factory=dict)


class Collator:
    """Rows of pictures to a batch: pixel_values [b, 3, h, w], labels [b], and what else each batch has.

    Args:
        processor: for pictures that are not augmented.
        batches: how.
    """

    def __init__(self, processor: Processor, batches: Batches) -> None:
        self.processor, self.batches = processor, batches
        self.crop = Cropper(processor, batches.augment) if batches.augment in AREAS else None
        self.epoch = 0  # the trainer says which; crops are drawn anew in each
        self._kept: dict[tuple[bool, int], Image.Image] = {}
        self._bytes = 0
        self._threads: ThreadPoolExecutor | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch."""
        crop = self.crop if all(row["train"] for row in rows) else None
        pictures = self._pictures(rows)
        if crop is None:
            values = self.processor(pictures)
        else:
            values = torch.stack(self._each(crop, pictures, [self._draw(row) for row in rows]))
        labels = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
        return {"pixel_values": values.to(self.batches.dtype), "labels": labels, **self.batches.beside}

    def _draw(self, row: Mapping[str, Any]) -> random.Random:
        return random.Random(f"crop {self.batches.seed} {self.epoch} {row['row']}")

    def _each(self, function: Callable[..., Any], *lists: Sequence[Any]) -> list[Any]:
        """A function of each row, on several threads: Pillow decodes and resizes without Python's lock."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads()))
        return list(self._threads.map(function, *lists))

    def _pictures(self, rows: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
        """Decoded, and held while there is room."""
        keys = [(bool(row["train"]), int(row["row"])) for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._kept}
        read = dict(zip(missing, self._each(_read, list(missing.values())), strict=True))
        found = [self._kept[key] if key in self._kept else read[key] for key in keys]
        for key, picture in read.items():
            size = 3 * picture.width * picture.height
            if self._bytes + size <= KEPT:
                self._kept[key] = picture
                self._bytes += size
        return found


def _read(row: Mapping[str, Any]) -> Image.Image:
    try:
        return read_picture(row["picture"])
    except CoreLoraError as error:  # it was good when it was checked
        raise CoreLoraError(f"{row['picture']['path'] or 'picture ' + str(row['row'] + 1)} {error}") from None
