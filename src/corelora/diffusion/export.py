"""A subject's adapter as a LoRA file that image software loads: in diffusers' keys, or in kohya's.

    diffusers   unet.DOTTED.NAME.lora_A.weight, .lora_B.weight; text_encoder..., text_encoder_2...; alpha is the rank
    kohya       lora_unet_NAME_WITH_LINES.lora_down.weight, .lora_up.weight, .alpha; lora_te1_..., lora_te2_... or, for
                SD 1.5, lora_te_...; SDXL's UNet has the names of the original code (input_blocks_4_1_...)

Either file loads with diffusers' `load_lora_weights` in a process that never
heard of corelora.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from corelora.diffusion.parts import ENCODERS, read_parts
from corelora.diffusion.subject import Subject
from corelora.errors import CoreLoraError
from corelora.export import CONFIG, KEY, WEIGHTS, export_lora
from corelora.folders import finished_folder

LAYOUTS = ("diffusers", "kohya")
OUT = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder


@dataclass(frozen=True, kw_only=True)
class SubjectExport:
    """What was written.

    Attributes:
        path: the file.
        layout: diffusers or kohya.
        layers: adapted layers in it.
        rank: the largest.
        bytes: its size.
    """

    path: Path
    layout: str
    layers: int
    rank: int
    bytes: int

    def __str__(self) -> str:
        facts = f"{self.layers} layers, rank {self.rank}, {self.bytes / 1e6:.2f} MB"
        return f"LoRA in {self.layout}'s keys: {self.path}\n  {facts}"


def export_subject(adapter: Path, out: Path, layout: str, overwrite: bool = False) -> SubjectExport:
    """Write the adapter of a dreambooth run for image software.

    Args:
        adapter: its folder, corelora's method or PEFT's LoRA.
        out: the folder to make.
        layout: "diffusers" or "kohya".
        overwrite: replace a folder that is not empty.

    Raises:
        CoreLoraError: the folder holds no such adapter, or its method is no LoRA and can't be written as one.
    """
    with finished_folder(out, overwrite, source=adapter) as folder:
        pairs, is_xl = lora_pairs(adapter)
        tensors = diffusers_keys(pairs) if layout == "diffusers" else kohya_keys(pairs, is_xl)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / OUT, metadata={"format": "pt"})
        size = (folder / OUT).stat().st_size
    rank = max(down.shape[0] for down, _, _ in pairs.values())
    return SubjectExport(path=out / OUT, layout=layout, layers=len(pairs), rank=rank, bytes=size)


def lora_pairs(adapter: Path) -> tuple[dict[str, tuple[Tensor, Tensor, float]], bool]:
    """({layer: (down [q, i], up [o, q], alpha)}, whether it is SDXL's), convolutions with their kernels."""
    parts = read_parts(adapter)
    config = _config(adapter)
    if config["peft_type"] == "CORELORA":
        encoders = {name: parts.load(name) for name in ENCODERS if name in parts.encoders}
        base = Subject(parts.load("unet"), encoders, parts.load("scheduler"))
        with tempfile.TemporaryDirectory() as scratch:
            plain = Path(scratch) / "lora"
            export_lora(adapter, plain, for_="peft", base_model=base)
            return _pairs_in(plain, _config(plain)), parts.is_xl
    if config["peft_type"] != "LORA" or config.get("use_dora"):
        raise CoreLoraError(f"{adapter}: {config['peft_type']} adapters can't be written as a LoRA file")
    return _pairs_in(adapter, config), parts.is_xl


def diffusers_keys(pairs: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, Tensor]:
    """Keys as diffusers saves them, which takes a file's alpha to be its rank: the scale is in lora_B."""
    tensors = {}
    for name, (down, up, alpha) in pairs.items():
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = up * (alpha / down.shape[0])
    return tensors


def kohya_keys(pairs: dict[str, tuple[Tensor, Tensor, float]], is_xl: bool) -> dict[str, Tensor]:
    """Keys as kohya's scripts save them."""
    tensors = {}
    for name, (down, up, alpha) in {**pairs, **_recognised(pairs)}.items():
        part, _, inner = name.partition(".")
        if part == "unet":
            key = f"lora_unet_{(original_name(inner) if is_xl else inner).replace('.', '_')}"
        else:
            inner = inner if inner.startswith("text_model.") else f"text_model.{inner}"  # transformers 5 left it out
            number = {"text_encoder": "1", "text_encoder_2": "2"}[part] if is_xl else ""
            key = f"lora_te{number}_{inner.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _recognised(pairs: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Zeros for a text encoder's out_proj where none is adapted: diffusers knows kohya's text keys by that name."""
    zeros = {}
    for encoder in ENCODERS:
        names = [n for n in pairs if n.startswith(f"{encoder}.") and ".self_attn." in n]
        if names and not any(n.endswith("out_proj") for n in names):
            down, up, alpha = pairs[names[0]]
            name = f"{names[0].rpartition('.')[0]}.out_proj"
            zeros[name] = (torch.zeros_like(down), torch.zeros_like(up), alpha)
    return zeros


# Inside a residual block: diffusers' names, and those of the original code.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(name: str, layers: int = 2) -> str:
    """A module of SDXL's UNet under the name that the original code has for it.

    Args:
        name: diffusers' name, dotted.
        layers: residual blocks a level; an upward level has one more.
    """
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if found:
        way, level, kind, n, rest = (
            found.group(1),
            int(found.group(2)),
            found.group(3),
            int(found.group(4)),
            found.group(5),
        )
        return _block(way, level * (layers + 1), kind, n, rest)
    middle = re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d+)\.(.*)", name)
    if middle:
        kind, n, rest = middle.group(1), int(middle.group(2)), middle.group(3)
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * n}.{_in_resnet(rest)}"
    outer = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0"}
    outer |= {"time_embedding.linear_2": "time_embed.2"}
    outer |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    return outer.get(name, name)


def _block(way: str, first: int, kind: str, n: int, rest: str) -> str:
    """A module of a downward or upward level whose blocks begin at `first`."""
    blocks, at = ("input_blocks", first + n + 1) if way == "down" else ("output_blocks", first + n)
    if kind == "attentions":
        return f"{blocks}.{at}.1.{rest}"
    if kind == "resnets":
        return f"{blocks}.{at}.0.{_in_resnet(rest)}"
    if kind == "downsamplers":
        return f"input_blocks.{first + 3}.0.op"
    return f"output_blocks.{first + 2}.2.conv"  # after the residual block and its attention


def _in_resnet(rest: str) -> str:
    return RESNET.get(rest, rest)


def _pairs_in(folder: Path, config: dict) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The layers of a plain LoRA folder, with what their product is scaled by as an alpha."""
    tensors = load_file(folder / WEIGHTS)
    pairs = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(KEY).removesuffix(".lora_A.weight")
        rank = down.shape[0]
        alpha = _of_layer(config.get("alpha_pattern"), name, config["lora_alpha"])
        alpha = alpha * rank**0.5 if config.get("use_rslora") else alpha
        pairs[name] = (down, tensors[key.replace("lora_A", "lora_B")], alpha)
    if not pairs:
        raise CoreLoraError(f"{folder}: no LoRA factors are in {WEIGHTS}")
    return pairs


def _of_layer(patterns: dict | None, name: str, otherwise: float) -> float:
    """A pattern's value for a layer, matched as PEFT does: the whole name, or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return otherwise


def _config(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise CoreLoraError(f"{os.fspath(folder)} holds no adapter ({CONFIG} is missing)")
    return json.loads(path.read_text(encoding="utf-8"))
