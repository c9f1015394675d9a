"""The parts of a Stable Diffusion pipeline (SD 1.5 and SDXL), each loaded when it is needed and let go afterwards.

diffusers is imported inside: it is optional, and takes seconds.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corelora.errors import CoreLoraError
from corelora.recipe.schema import ModelPart

INSTALL = "pip install corelora[train,diffusion]"
PREDICTIONS = ("epsilon", "v_prediction")  # what a UNet says: the noise, or the velocity
ENCODERS = ("text_encoder", "text_encoder_2")
FILE = "pipeline.json"  # beside an adapter: which pipeline it is for


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A pipeline's folder or hub name, and what its files say without weights.

    Attributes:
        source: folder or hub name.
        revision: on the hub.
        unet: the UNet's config.
        encoders: names of the text encoders, one or two.
        dtype: of the weights while training, float32 unless the recipe says otherwise.
    """

    source: str
    revision: str | None
    unet: Mapping[str, Any]
    encoders: tuple[str, ...]
    dtype: torch.dtype = torch.float32

    @property
    def is_xl(self) -> bool:
        """SDXL: two text encoders, and sizes as a condition."""
        return len(self.encoders) == 2

    @property
    def scale(self) -> int:
        """Pixels a latent, along a side."""
        vae = _class_of("vae").load_config(self.source, subfolder="vae", **self.where)
        return 2 ** (len(vae["block_out_channels"]) - 1)

    @property
    def where(self) -> dict[str, Any]:
        """What each part's loader is told."""
        return {"revision": self.revision} if self.revision else {}

    @property
    def identity(self) -> list[Any]:
        """What stands for the pipeline in the names of what is kept: of a folder, where it is and its files' state."""
        root = Path(self.source)
        if not root.is_dir():
            return [self.source, self.revision]
        states = [(str(p.relative_to(root)), p.stat()) for p in sorted(root.glob("*/*")) if p.is_file()]
        return [str(root.resolve()), [[name, s.st_size, s.st_mtime_ns] for name, s in states]]

    def load(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """A part with its weights, on the CPU; tokenizers and the scheduler as they are.

        Args:
            name: `unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler`, ... .
            dtype: of its weights; `self.dtype` if None.

        Raises:
            CoreLoraError: the pipeline has no such part, or it can't be read.
        """
        try:
            options = {"subfolder": name, **self.where}
            if name.startswith("tokenizer") or name == "scheduler":
                return _class_of(name).from_pretrained(self.source, **options)
            return _class_of(name).from_pretrained(self.source, **options, dtype=dtype or self.dtype)
        except (OSError, ValueError, ImportError) as error:
            raise CoreLoraError(f"model.name: {self.source} has no {name} that can be read ({_line(error)})") from None

    def meta_unet(self) -> nn.Module:
        """The UNet on the meta device: shapes and names."""
        with torch.device("meta"):
            return _class_of("unet").from_config(dict(self.unet)).to(self.dtype)

    def meta_encoder(self, name: str) -> nn.Module:
        """A text encoder on the meta device."""
        from transformers import AutoConfig

        kind = _class_of(name)
        with torch.device("meta"):
            return kind(AutoConfig.from_pretrained(self.source, subfolder=name, **self.where)).to(self.dtype)

    def pipeline(self, **given: Any) -> Any:
        """The whole pipeline for making pictures, with some parts given.

        Without a safety checker's weights, and without the watermark that SDXL's pipeline can put into pictures: those
        of the class would teach it.

        Raises:
            CoreLoraError: it can't be read.
        """
        import diffusers

        kind = diffusers.StableDiffusionXLPipeline if self.is_xl else diffusers.StableDiffusionPipeline
        unchecked = {"safety_checker": None, "requires_safety_checker": False}
        options: dict[str, Any] = {"add_watermarker": False} if self.is_xl else unchecked
        try:
            made = kind.from_pretrained(self.source, dtype=self.dtype, **options, **self.where, **given)
        except (OSError, ValueError, ImportError) as error:
            raise CoreLoraError(f"model.name: {self.source} can't be loaded ({_line(error)})") from None
        made.set_progress_bar_config(disable=True)
        return made

    def save(self, folder: Path) -> None:
        """Write which pipeline an adapter in this folder is for."""
        data = {"pipeline": self.source, "revision": self.revision, "is_xl": self.is_xl}
        (folder / FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def find_parts(part: ModelPart) -> Parts:
    """Look at a pipeline without reading weights.

    Raises:
        CoreLoraError: diffusers is missing; there is no such pipeline, or it is neither SD 1.5 nor SDXL, or of another
            kind of diffusion.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise CoreLoraError(f"the task dreambooth needs diffusers. Install it with: {INSTALL}")
    from diffusers import DiffusionPipeline

    where = {"revision": part.revision} if part.revision else {}
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    try:
        index = DiffusionPipeline.load_config(part.name, **where)
        unet = _class_of("unet").load_config(part.name, subfolder="unet", **where)
        schedule = _class_of("scheduler").load_config(part.name, subfolder="scheduler", **where)
    except (OSError, ValueError) as error:
        raise CoreLoraError(f"model.name: no Stable Diffusion pipeline at {part.name!r} ({_line(error)})") from None
    encoders = tuple(name for name in ENCODERS if index.get(name, [None, None])[1] is not None)
    if not encoders or "unet" not in index:
        kind = index.get("_class_name", "unknown")
        raise CoreLoraError(f"model.name: {part.name} is a {kind}; SD 1.5 and SDXL pipelines can be trained here")
    says = schedule.get("prediction_type", PREDICTIONS[0])
    if says not in PREDICTIONS:
        raise CoreLoraError(
            f"model.name: {part.name} predicts {says!r}; {' and '.join(PREDICTIONS)} can be trained here"
        )
    dtype = dtypes.get(part.dtype, torch.float32)
    return Parts(source=part.name, revision=part.revision, unet=unet, encoders=encoders, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class SavedFor:
    """What an adapter's folder says about the pipeline that it was trained for.

    Attributes:
        model: its name or folder, and its revision.
        is_xl: it is SDXL.
    """

    model: ModelPart
    is_xl: bool


def read_saved(adapter: Path) -> SavedFor:
    """Which pipeline an adapter's folder names; nothing of the pipeline is read.

    Raises:
        CoreLoraError: the folder is no adapter of a diffusion model.
    """
    path = adapter / FILE
    if not path.is_file():
        raise CoreLoraError(f"{adapter} holds no {FILE}: it is not the adapter of a diffusion model")
    data = json.loads(path.read_text(encoding="utf-8"))
    return SavedFor(model=ModelPart(name=data["pipeline"], revision=data["revision"]), is_xl=data["is_xl"])


@torch.no_grad()
def embed(ids: list[Tensor], encoders: list[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """(embeddings [b, t, d], pooled [b, p] or None) of a prompt, as each pipeline's UNet takes them.

    SD 1.5: the last layer's states. SDXL: those before the last of both encoders side by side, and the second one's
    pooled projection (Podell et al. 2023, arXiv 2307.01952).

    Args:
        ids: token ids [b, t], one tensor an encoder.
        encoders: one, or two.
    """
    return encode_text(ids, encoders)


def encode_text(ids: list[Tensor], encoders: list[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """`embed` with gradients, for encoders that train."""
    if len(encoders) == 1:
        return encoders[0](ids[0]).last_hidden_state, None
    outputs = [e(i, output_hidden_states=True) for e, i in zip(encoders, ids, strict=True)]
    return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[1].text_embeds


def tokens(parts: Parts, prompt: str) -> list[Tensor]:
    """Token ids [1, t] of a prompt, one tensor an encoder; padded to the model's length."""
    found = []
    for tokenizer in _tokenizers(parts):
        length = tokenizer.model_max_length
        made = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        found.append(made.input_ids)
    return found


def long_prompts(parts: Parts, prompts: Mapping[str, str]) -> list[str]:
    """A sentence for each prompt that the text encoders would read a part of.

    Args:
        parts: the pipeline.
        prompts: by the key of the recipe that has them.
    """
    found = []
    for key, prompt in prompts.items():
        sizes = [(len(t(prompt).input_ids), t.model_max_length) for t in _tokenizers(parts)]
        over = [
            f"{key} has {n} tokens, the text encoder reads {most}: make it shorter" for n, most in sizes if n > most
        ]
        found += over[:1]
    return found


def _tokenizers(parts: Parts) -> list[Any]:
    return [parts.load(name.replace("text_encoder", "tokenizer")) for name in parts.encoders]


def _class_of(name: str) -> Any:
    import diffusers
    import transformers

    return {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "tokenizer": transformers.CLIPTokenizer,
        "tokenizer_2": transformers.CLIPTokenizer,
        "scheduler": diffusers.DDPMScheduler,
    }[name]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
