"""Pictures of a subject, and of its class, as latents with noise that depends on seed, pass and row alone."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from corelora.data.cache import digest_of, key_of, made_once
from corelora.diffusion.parts import Parts, embed, tokens
from corelora.errors import CoreLoraError, raise_all
from corelora.recipe import Recipe
from corelora.vision.pictures import read_picture


@dataclass(frozen=True, kw_only=True)
class Coded:
    """Pictures of one prompt, coded once.

    Attributes:
        mean, deviation: of the latents, scaled as the UNet takes them [n, c, h, w].
        sizes: SDXL's time ids [n, 6].
        prompt, pooled: the prompt's embeddings [t, d] and [p]; or
        ids: its token ids [encoders, t], where the text encoders train.
    """

    mean: Tensor
    deviation: Tensor
    sizes: Tensor
    prompt: Tensor | None
    pooled: Tensor | None
    ids: Tensor | None


class SubjectRows(Dataset):
    """A row for each picture of the subject, with one of the class beside it where there is a prior.

    Noise, timestep and the draw from the VAE's distribution follow from (seed, pass, row), so that a run that goes on
    sees what it would have seen.

    Args:
        own: pictures of the subject.
        prior: pictures of the class, or None.
        seed: of the run.
        steps: of the noise schedule.
        repeat: rows a pass for each picture.
    """

    def __init__(self, own: Coded, prior: Coded | None, seed: int, steps: int, repeat: int = 1) -> None:
        self.own, self.prior, self.seed, self.steps = own, prior, seed, steps
        self.repeat, self.epoch = repeat, 0

    def set_epoch(self, epoch: int) -> None:
        """The pass over the rows, as the Trainer counts it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.own.mean) * self.repeat

    def __getitem__(self, n: int) -> dict[str, Any]:
        mixed = np.random.SeedSequence([self.seed, self.epoch, n]).generate_state(1, np.uint64)
        random = torch.Generator().manual_seed(int(mixed[0]))
        row = {"own": self._drawn(self.own, n % len(self.own.mean), random)}
        if self.prior is not None:
            at = (n + self.epoch * len(self)) % len(self.prior.mean)
            row["prior"] = self._drawn(self.prior, at, random)
        return row

    def _drawn(self, coded: Coded, n: int, random: torch.Generator) -> dict[str, Tensor | None]:
        shape = coded.mean[n].shape
        return {
            "latents": coded.mean[n] + coded.deviation[n] * torch.randn(shape, generator=random),
            "noise": torch.randn(shape, generator=random),
            "timesteps": torch.randint(self.steps, (), generator=random),
            "sizes": coded.sizes[n],
            "prompt": coded.prompt,
            "pooled": coded.pooled,
            "ids": coded.ids,
        }


def collate(rows: Sequence[Mapping[str, Any]], prior_weight: float) -> dict[str, Tensor]:
    """Rows to a batch: the subject's first, then the class's, with its weight.

    Args:
        rows: of `SubjectRows`.
        prior_weight: of the class's loss.
    """
    flat = [row["own"] for row in rows] + [row["prior"] for row in rows if "prior" in row]
    weights = [1.0] * len(rows) + [prior_weight] * (len(flat) - len(rows))
    batch = {k: torch.stack([row[k] for row in flat]) for k, v in flat[0].items() if v is not None}
    return {**batch, "weights": torch.tensor(weights)}


def picture_files(source: str, which: str = "train") -> list[Path]:
    """Pictures in a folder, in the order of their names; or one file.

    Args:
        source: the folder or file.
        which: "train" or "test", for messages.

    Raises:
        CoreLoraError: there is none.
    """
    root = Path(source)
    if root.is_file():
        return [root]
    found = sorted(p for p in root.iterdir() if _is_candidate(p)) if root.is_dir() else []
    if not found:
        raise CoreLoraError(f"data.{which}.path: no pictures in {source}")
    return found


def _is_candidate(path: Path) -> bool:
    """Whether a file's name says that it is a picture, of whatever kind; one that Pillow can't read is then named."""
    kind, _ = mimetypes.guess_type(path.name)
    return (kind or "").startswith("image/") and not path.name.startswith(".") and not path.is_dir()


def read_all(paths: Sequence[Path]) -> list[Image.Image]:
    """Pictures, upright and RGB.

    Raises:
        CoreLoraError: every file that can't be used.
    """
    pictures, problems = [], []
    for path in paths:
        try:
            pictures.append(read_picture({"path": str(path), "bytes": None}))
        except CoreLoraError as error:
            problems.append(f"{path} {error}")
    raise_all(problems, "data")
    return pictures


def code(parts: Parts, recipe: Recipe, paths: Sequence[Path], prompt: str, size: int) -> Coded:
    """Latents and text of pictures with one prompt, from the cache where they were made before.

    Args:
        parts: the pipeline.
        recipe: the run's.
        paths: picture files.
        prompt: what they show.
        size: side in pixels that they are cut to.

    Raises:
        CoreLoraError: pictures that can't be used, by file.
    """
    assert recipe.subject is not None
    trains_text = recipe.subject.text_encoder
    files = [digest_of(p) for p in paths]
    key = key_of("subject", parts.identity, files, prompt, size, trains_text)

    def make(folder: Path) -> None:
        coded = {**_latents(parts, read_all(paths), size), **_text(parts, prompt, trains_text)}
        save_file({k: v.contiguous() for k, v in coded.items()}, folder / "coded.safetensors")

    coded = load_file(made_once("subjects", key, make) / "coded.safetensors")
    return Coded(**{name: coded.get(name) for name in Coded.__dataclass_fields__})  # type: ignore[arg-type]


@torch.no_grad()
def _latents(parts: Parts, pictures: Sequence[Image.Image], size: int) -> dict[str, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = parts.load("vae", torch.float32).to(device)  # SDXL's own VAE overflows in float16
    means, deviations, sizes = [], [], []
    for picture in tqdm(pictures, desc="latents", unit="picture", delay=2):
        pixels, ids = cut(picture, size)
        found = vae.encode(pixels[None].to(device)).latent_dist
        means.append(found.mean[0].cpu() * vae.config.scaling_factor)
        deviations.append(found.std[0].cpu() * vae.config.scaling_factor)
        sizes.append(torch.tensor(ids, dtype=torch.float32))
    return {"mean": torch.stack(means), "deviation": torch.stack(deviations), "sizes": torch.stack(sizes)}


def _text(parts: Parts, prompt: str, trains: bool) -> dict[str, Tensor]:
    ids = tokens(parts, prompt)
    if trains:
        return {"ids": torch.cat(ids)}
    encoders = [parts.load(name, torch.float32).eval() for name in parts.encoders]
    found, pooled = embed(ids, encoders)
    return {"prompt": found[0], **({} if pooled is None else {"pooled": pooled[0]})}


def cut(picture: Image.Image, size: int) -> tuple[Tensor, list[int]]:
    """The middle square of a picture [3, size, size] in [-1, 1], and SDXL's time ids for it.

    The ids are height and width before, the crop's top and left corner after scaling, and the target's sides.
    """
    width, height = picture.size
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    scaled = picture.resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.asarray(scaled).copy()).float().permute(2, 0, 1) / 127.5 - 1
    return pixels, [height, width, top, left, size, size]
