"""A trained adapter as a plain PEFT LoRA folder, which software that never heard of corelora loads.

    lora_A[q,i] = right        lora_B[o,q] = scale * left        (convert.lora_pair: exact, without an SVD)

The scale is folded into lora_B, so that `lora_alpha` equals the one common rank; smaller ranks are filled up with
zeros. The folder is written beside its place, loaded back with plain PEFT, compared, and only then renamed: a failed
export leaves nothing behind. What each server takes is in `servers.py`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from corelora.convert import lora_pair, truncated
from corelora.errors import CoreLoraError, raise_all
from corelora.exportcheck import bare, check_export
from corelora.folders import adapted_layers, finished_folder, open_model, spare_base
from corelora.layers import ConvView, EmbeddingView, View, view_of
from corelora.servers import SERVERS, Server, clashes, server_named
from corelora.storage import readable, wrapped_layer
from corelora.tuner_layer import PREFIX, CoreLoraLayer, wide

WEIGHTS, CONFIG, KEY = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# Settings that every PEFT and every server knows; newer ones stay out of the file.
_CLASSIC = [
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
]


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the folder.
        for_: whom it was written for.
        rank, alpha: of the plain LoRA, equal.
        layers: adapted layers in the file, and how many of them are zeros for a server's sake.
        zero_layers: those that are zeros.
        bytes: size of the safetensors file.
        dtype: of the tensors in the file.
        checked: it was loaded back with plain PEFT, and each layer's change is the adapter's.
        error: largest difference of an output from the adapter's; None where the model does not run on ids alone.
        truncation: relative error of the deltas that `rank` cost, 0 where nothing was cut.
        max_lora_rank: what to start vLLM and SGLang with.
        notes: what the reader should know.
    """

    path: Path
    for_: str
    rank: int
    alpha: int
    layers: int
    zero_layers: int
    bytes: int
    dtype: str
    checked: bool
    error: float | None
    truncation: float
    max_lora_rank: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        checked = "each layer agrees" if self.error is None else f"largest difference of an output {self.error:.1e}"
        checked = f"loaded back with plain PEFT: {checked}" if self.checked else "not loaded back"
        zeros = f" ({self.zero_layers} of them zero)" if self.zero_layers else ""
        lines = [
            f"plain LoRA in {self.path}",
            f"  rank {self.rank}, alpha {self.alpha}, {self.layers} layers{zeros}, {self.dtype}, "
            f"{self.bytes / 1e6:.2f} MB; {checked}",
        ]
        if self.truncation:
            lines.append(f"  cut to the rank asked for: relative error {self.truncation:.2e} of the weights' changes")
        return "\n".join(
            lines + [f"  {line}" for line in (*SERVERS[self.for_].usage(self.path, self.rank), *self.notes)]
        )


@dataclass
class _Source:
    """The model under a PeftModel, its adapted layers by name, and the adapter's config."""

    model: nn.Module
    layers: dict[str, CoreLoraLayer]
    config: Any
    extras: dict[str, Tensor]


@torch.no_grad()
def export_lora(
    model_or_adapter_folder: Any,
    out_folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    for_: str = "all",
    rank: int | None = None,
    base_model: Any = None,
    check: bool | Mapping[str, Any] = True,
    overwrite: bool = False,
) -> ExportReport:
    """Write an adapter as a plain PEFT LoRA folder with equal outputs.

    Args:
        model_or_adapter_folder: a PeftModel, a transformers or diffusers model with an injected adapter, or the folder
            of a saved adapter, whose base model is then loaded.
        out_folder: the folder to make.
        adapter_name: which adapter of the model.
        for_: who will load it: all, peft, vllm, sglang, tgi, llamacpp or ollama; `all` writes what each of them takes.
        rank: cut to this rank by QR and a small SVD; None keeps the exact pair.
        base_model: with a folder, the base model or its name, in place of the one that the adapter names.
        check: load the export back and compare, on random token ids where the model takes them; a mapping gives the
            model's inputs to compare on.
        overwrite: replace a folder that is not empty.

    Returns:
        A report; `print` shows rank, size, the checked error and how to serve it.

    Raises:
        CoreLoraError: no such adapter, a layer or setting that a plain LoRA or the server can't hold, a folder in the
            way, or an export that does not give the adapter's outputs.
    """
    server = server_named(for_)
    with finished_folder(out_folder, overwrite, source=model_or_adapter_folder) as folder:
        source = _source(open_model(model_or_adapter_folder, adapter_name, base_model), adapter_name)
        spare_base(out_folder, source.model, source.config)
        raise_all(_problems(source, server, rank), f"export for {for_}")
        pairs, truncation = _pairs(source, adapter_name, rank)
        dtype = _dtype(source, adapter_name)
        common = server.rank_for(needed := max(A.shape[0] for A, _ in pairs.values()))
        targets, zeros = server.targets(bare(source.model), source.layers)
        tensors = _tensors(source, pairs, zeros, common, dtype)
        _write(folder, source, tensors, targets, common)
        error = _check(source, adapter_name, folder, pairs, check, not truncation)
        size = (folder / WEIGHTS).stat().st_size
    return ExportReport(
        path=Path(out_folder),
        for_=for_,
        rank=common,
        alpha=common,
        layers=len(pairs) + len(zeros),
        zero_layers=len(zeros),
        bytes=size,
        dtype=str(dtype).removeprefix("torch."),
        checked=check is not False,
        error=error,
        truncation=truncation,
        max_lora_rank=common,
        notes=tuple(_notes(source, adapter_name, server, needed, common)),
    )


def _source(model: nn.Module, adapter_name: str) -> _Source:
    """Find the adapter in a model.

    Raises:
        CoreLoraError: there is none of this name.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = adapted_layers(inner, adapter_name)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    base = {f"{name}.base_layer.weight" for name in layers}  # PEFT saves the table of an adapted embedding
    named = {k if k.startswith(KEY) else KEY + k: t for k, t in state.items() if PREFIX not in k}
    extras = {k: t for k, t in named.items() if k.removeprefix(KEY) not in base}
    return _Source(inner, layers, model.peft_config[adapter_name], extras)  # type: ignore[index]


def _problems(source: _Source, server: Server, rank: int | None) -> list[str]:
    """What a plain LoRA, or this server, can't hold."""
    whole = rank is None or (isinstance(rank, int) and rank >= 1)
    problems = [] if whole else [f"rank must be a whole number of at least 1, got {rank!r}."]
    if any(layer.merged for layer in source.layers.values()):
        problems.append("the adapter is merged: call unmerge_adapter() first.")
    kinds = {name: layer.view for name, layer in source.layers.items()}
    grouped = [name for name, view in kinds.items() if not view.factored]
    if grouped:
        problems.append(f"no plain LoRA fits a grouped convolution ({_some(grouped)}): export merged weights.")
    odd = [name for name, view in kinds.items() if view.factored and _is_odd(view)]
    if odd:
        problems.append(f"PEFT's LoRA drops the dilation or padding mode of {_some(odd)}: export merged weights.")
    other = [name for name, view in kinds.items() if view.kind != "linear"]
    if server.linear_only and other and not grouped:
        problems.append(
            f"{_some(other)} are no linear layers, and servers read those only: export for_='peft', or merged weights."
        )
    if source.extras and not server.extras:
        names = sorted({key.removeprefix(KEY) for key in source.extras})
        problems.append(
            f"{_some(names)} were trained along with the adapter, and servers don't read them: export for_='peft', or "
            "merged weights."
        )
    return problems


def _is_odd(view: View) -> bool:
    return isinstance(view, ConvView) and (view.padding_mode != "zeros" or set(view.dilation) != {1})


def _check(source: _Source, name: str, folder: Path, pairs: Any, check: Any, exact: bool) -> float | None:
    if check is False:
        return None
    return check_export(source.model, name, folder, pairs, None if check is True else check, exact)


def _dtype(source: _Source, name: str) -> torch.dtype:
    """The type that the adapter was trained in: PEFT keeps adapters in float32 on a base of 16 bits."""
    found = [
        f.weight.dtype for layer in source.layers.values() for f in layer.factors(name).values() if f.weight is not None
    ]
    return functools.reduce(torch.promote_types, found)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _pairs(source: _Source, name: str, rank: int | None) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(A[q,i], B[o,q]) of each layer, and the relative error of all deltas together that cutting them cost."""
    pairs, lost, total = {}, 0.0, 0.0
    for key, layer in source.layers.items():
        with readable(layer):
            core = layer.cores[name]
            A, B = lora_pair(core, layer.factors(name), layer.live_weight(name), wide(layer.weight_access.float_dtype))
        B = B * (layer.scaling[name] / core.spec.scale)
        if rank is not None and rank < A.shape[0]:
            A, B, S = truncated(A, B, rank)
            lost, total = lost + float(S[rank:].square().sum()), total + float(S.square().sum())
        pairs[key] = (A, B)
    return pairs, (lost / total) ** 0.5 if total else 0.0


def _tensors(
    source: _Source, pairs: dict[str, tuple[Tensor, Tensor]], zeros: list[str], rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The file's tensors: pairs filled up to one rank, zeros for targeted layers that were not adapted, extras.

    Raises:
        CoreLoraError: a number is not finite, or too large for the file's type.
    """
    tensors = {key: t.clone() for key, t in source.extras.items()}  # tied ones would share memory
    modules = dict(source.model.named_modules())
    for name in zeros:
        view = view_of(wrapped_layer(modules[name]) or modules[name])
        assert view is not None
        o, i = view.shape
        pairs = pairs | {name: (torch.zeros(1, i), torch.zeros(o, 1))}
    for name, (A, B) in pairs.items():
        A, B = F.pad(A, (0, 0, 0, rank - A.shape[0])).to(dtype), F.pad(B, (0, rank - B.shape[1])).to(dtype)
        if not (bool(A.isfinite().all()) and bool(B.isfinite().all())):
            raise CoreLoraError(f"{name}: a factor is not finite in {dtype}; the adapter seems broken")
        view = source.layers[name].view if name in source.layers else None
        if isinstance(view, EmbeddingView):
            tensors |= {f"{KEY}{name}.lora_embedding_A": A, f"{KEY}{name}.lora_embedding_B": B}
            continue
        if isinstance(view, ConvView):
            A = A.reshape(rank, *view.weight_shape[1:])
            B = B.reshape(*B.shape, *(1 for _ in view.stride))
        tensors |= {f"{KEY}{name}.lora_A.weight": A, f"{KEY}{name}.lora_B.weight": B}
    return {key: t.detach().cpu().contiguous() for key, t in tensors.items()}


def _write(folder: Path, source: _Source, tensors: dict[str, Tensor], targets: list[str], rank: int) -> None:
    ours = source.config
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        bias={"corelora_only": "lora_only"}.get(ours.bias, ours.bias) if source.extras else "none",
        fan_in_fan_out=any(layer.view.kind == "conv1d" for layer in source.layers.values()),
        modules_to_save=sorted(ours.modules_to_save) if source.extras and ours.modules_to_save else None,
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        auto_mapping=ours.auto_mapping,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    written = json.loads((folder / CONFIG).read_text()) | {"target_modules": targets}
    (folder / CONFIG).write_text(json.dumps({k: written[k] for k in _CLASSIC if k in written}, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _notes(source: _Source, name: str, server: Server, needed: int, common: int) -> Iterator[str]:
    """What the reader of a report should know about its rank and its keys."""
    own = max(layer.cores[name].spec.r for layer in source.layers.values())
    if needed > own:
        yield (
            f"The start is subtracted and factors on both sides of it moved, so the exact LoRA has rank {needed}, not "
            f"{own}; rank={own} cuts it by an SVD and reports the error."
        )
    if common > needed:
        yield f"Rank {needed} was filled up with zeros to {common}, which vLLM takes."
    if server.short_names and (same := clashes(source.layers)):
        yield (
            f"SGLang can't tell {_some(same)} apart and would serve one of them: adapt one part of the model, or merge."
        )
    model = source.model
    if server.short_names and isinstance(model, PreTrainedModel) and model.base_model is model:
        yield (
            f"The keys are those of a bare {type(model).__name__}. A server that loads it inside another class wants "
            "that class's names: train on the class that will be served."
        )
