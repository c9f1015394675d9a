"""A subject's adapter as a LoRA file that image software loads: in diffusers' keys, or in kohya's.

    diffusers   unet.DOTTED.NAME.lora_A.weight, .lora_B.weight; text_encoder..., text_encoder_2...
    kohya       lora_unet_NAME_WITH_LINES.lora_down.weight, .lora_up.weight, .alpha; lora_te1_..., lora_te2_... or, for
                SD 1.5, lora_te_...; SDXL's UNet has the names of the original code (input_blocks_4_1_...)

Either file loads with diffusers' `load_lora_weights` in a process that never
heard of corelora. The scale is in the second factor and ranks are filled up with
zeros to one, so that alpha is the rank everywhere.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from corelora.convert import truncated
from corelora.diffusion.parts import ENCODERS, find_parts, read_saved
from corelora.diffusion.subject import Subject
from corelora.errors import CoreLoraError
from corelora.export import CONFIG, KEY, WEIGHTS, export_lora
from corelora.folders import finished_folder
from corelora.recipe.schema import ModelPart

LAYOUTS = ("diffusers", "kohya")
OUT = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva")  # PEFT's starts that leave the weights as they are


@dataclass(frozen=True, kw_only=True)
class SubjectExport:
    """What was written.

    Attributes:
        path: the file.
        layout: diffusers or kohya.
        layers: adapted layers in it.
        rank: of all of them; alpha is equal.
        bytes: its size.
        truncation: relative error of the weights' changes that a smaller rank cost, 0 where nothing was cut.
        checked: each layer's change was compared with the adapter's.
    """

    path: Path
    layout: str
    layers: int
    rank: int
    bytes: int
    truncation: float
    checked: bool

    def __str__(self) -> str:
        checked = "each layer agrees with the adapter" if self.checked else "not compared with the adapter"
        lines = [
            f"LoRA in {self.layout}'s keys: {self.path}",
            f"  rank and alpha {self.rank}, {self.layers} layers, {self.bytes / 1e6:.2f} MB; {checked}",
        ]
        if self.truncation:
            lines.append(f"  cut to the rank asked for: relative error {self.truncation:.2e} of the weights' changes")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How an export should be.

    Attributes:
        layout: "diffusers" or "kohya".
        rank: cut to this; None keeps the exact factors.
        base: the pipeline, in place of the one that the adapter names.
        check: compare each layer's change with the adapter's.
    """

    layout: str
    rank: int | None = None
    base: str | None = None
    check: bool = True


Pairs = dict[str, tuple[Tensor, Tensor]]  # {layer: (down [q, i, ...], up [o, q, ...])}, convolutions with their kernels


@torch.no_grad()
def export_subject(adapter: Path, out: Path, wanted: Wanted, overwrite: bool = False) -> SubjectExport:
    """Write the adapter of a dreambooth run for image software.

    Args:
        adapter: its folder, corelora's method or PEFT's LoRA.
        out: the folder to make.
        wanted: layout and rank.
        overwrite: replace a folder that is not empty.

    Raises:
        CoreLoraError: the folder holds no such adapter, or its method is no LoRA and can't be written as one.
    """
    if wanted.rank is not None and wanted.rank < 1:
        raise CoreLoraError(f"--rank must be at least 1, got {wanted.rank}")
    with finished_folder(out, overwrite, source=adapter) as folder:
        saved, config = read_saved(adapter), _config(adapter)
        ours = config["peft_type"] == "CORELORA"
        pairs = _ours(adapter, wanted) if ours else _plain(adapter, config)
        pairs, truncation = _cut(pairs, wanted.rank)
        rank = max(down.shape[0] for down, _ in pairs.values())
        pairs = {name: _filled(down, up, rank) for name, (down, up) in pairs.items()}
        tensors = diffusers_keys(pairs) if wanted.layout == "diffusers" else kohya_keys(pairs, saved.is_xl)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / OUT, metadata={"format": "pt"})
        size = (folder / OUT).stat().st_size
    return SubjectExport(
        path=out / OUT,
        layout=wanted.layout,
        layers=len(pairs),
        rank=rank,
        bytes=size,
        truncation=truncation,
        checked=ours and wanted.check,
    )


def _ours(adapter: Path, wanted: Wanted) -> Pairs:
    """Exact factors of a corelora adapter, by way of a plain LoRA that is loaded back and compared."""
    parts = find_parts(ModelPart(name=wanted.base) if wanted.base else read_saved(adapter).model)
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        trained = {key.removeprefix(KEY).partition(".")[0] for key in file.keys()}  # noqa: SIM118
    encoders = {name: parts.load(name) for name in ENCODERS if name in trained}
    base = Subject(parts.load("unet"), encoders, parts.load("scheduler"))
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "lora"
        export_lora(adapter, plain, for_="peft", base_model=base, check=wanted.check)
        return _plain(plain, _config(plain))


def _plain(folder: Path, config: dict[str, Any]) -> Pairs:
    """The factors in a folder with PEFT's LoRA, their scale in the second.

    Raises:
        CoreLoraError: they are not all of the adapter, or there is none.
    """
    if config["peft_type"] != "LORA":
        raise CoreLoraError(f"{folder}: {config['peft_type']} adapters can't be written as a LoRA file")
    changes_base = config.get("init_lora_weights") not in KEEPS_BASE
    for what, present in (("DoRA", config.get("use_dora")), (f"{config.get('init_lora_weights')}'s", changes_base)):
        if present:
            raise CoreLoraError(f"{folder}: {what} adapters are more than the two factors that a LoRA file holds")
    tensors, pairs = load_file(folder / WEIGHTS), {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(KEY).removesuffix(".lora_A.weight")
            up = tensors[key.replace("lora_A", "lora_B")]
            pairs[name] = (down, (up.float() * _scale(config, name, down.shape[0])).to(up.dtype))
    if not pairs:
        raise CoreLoraError(f"{folder}: no LoRA factors are in {WEIGHTS}")
    return pairs


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies a layer's product with."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):  # as PEFT: the whole name, or its end after a dot
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _cut(pairs: Pairs, rank: int | None) -> tuple[Pairs, float]:
    """Factors of at most this rank, and the relative error of all changes together."""
    if rank is None:
        return pairs, 0.0
    made, lost, total = {}, 0.0, 0.0
    for name, (down, up) in pairs.items():
        A, B, S = truncated(down.flatten(1).double(), up.flatten(1).double(), rank)
        lost, total = lost + float(S[rank:].square().sum()), total + float(S.square().sum())
        q = A.shape[0]
        made[name] = A.to(down.dtype).reshape(q, *down.shape[1:]), B.to(up.dtype).reshape(-1, q, *up.shape[2:])
    return made, (lost / total) ** 0.5 if total else 0.0


def _filled(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Zeros up to one rank for all layers: not every reader takes several."""
    more = rank - down.shape[0]
    if not more:
        return down, up
    zeros_down, zeros_up = down.new_zeros(more, *down.shape[1:]), up.new_zeros(up.shape[0], more, *up.shape[2:])
    return torch.cat([down, zeros_down]), torch.cat([up, zeros_up], dim=1)


def diffusers_keys(pairs: Pairs) -> dict[str, Tensor]:
    """Keys as diffusers saves them, which takes a file's alpha to be its rank."""
    tensors = {}
    for name, (down, up) in pairs.items():
        part, _, inner = name.partition(".")
        key = f"unet.{inner}" if part == "unet" else f"{part}.{_text_name(inner)}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = down, up
    return tensors


def kohya_keys(pairs: Pairs, is_xl: bool) -> dict[str, Tensor]:
    """Keys as kohya's scripts save them."""
    tensors = {}
    for name, (down, up) in {**pairs, **_recognised(pairs)}.items():
        part, _, inner = name.partition(".")
        if part == "unet":
            key = f"lora_unet_{(original_name(inner) if is_xl else inner).replace('.', '_')}"
        else:
            number = {"text_encoder": "1", "text_encoder_2": "2"}[part] if is_xl else ""
            key = f"lora_te{number}_{_text_name(inner).replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
        tensors[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def _text_name(inner: str) -> str:
    """A text encoder's module under the name that programs know; transformers 5.6 left a level out."""
    return inner if inner.startswith("text_model.") else f"text_model.{inner}"


def _recognised(pairs: Pairs) -> Pairs:
    """Zeros for a text encoder's out_proj where none is adapted: diffusers knows kohya's text keys by that name."""
    zeros = {}
    for encoder in ENCODERS:
        names = [n for n in pairs if n.startswith(f"{encoder}.") and ".layers." in n]
        if names and not any(n.endswith("out_proj") for n in names):
            down, up = pairs[names[0]]
            width = min(down.shape[1], up.shape[0])  # of the states: an MLP is wider, on one of its sides
            name = names[0].split(".layers.")[0] + ".layers.0.self_attn.out_proj"
            zeros[name] = (down.new_zeros(down.shape[0], width), up.new_zeros(width, down.shape[0]))
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


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CoreLoraError(f"{os.fspath(folder)} holds no adapter ({CONFIG} is missing)")
    return json.loads(path.read_text(encoding="utf-8"))
