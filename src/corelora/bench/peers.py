"""What is measured: the frozen model, other libraries' adapters, and every corelora method on both of its paths.

One table, `PEERS`, from a name to how a plain model is adapted. A corelora method needs no entry: its name, or
`NAME:reference` for its path in plain modules, or `NAME:folded` with its start in the base weights, or
`NAME:orthonormal` with such slices (any `slice_scale`), is looked up in the registry of methods.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from corelora.config import CoreLoraConfig
from corelora.errors import CoreLoraError, unknown_name
from corelora.kernels.fast import fast_path
from corelora.registry import METHODS, OUTERS, Registry
from corelora.spec import SLICE_SCALES

BASE = "base"
PATHS = {"fast": "on", "reference": "off"}
FORMS = {**PATHS, "folded": "on", **dict.fromkeys(SLICE_SCALES, "on")}
SLICES = {scale: f", {scale} slices" for scale in SLICE_SCALES} | {"none": ", raw slices"}
ENDINGS = {"fast": "", "reference": ", plain modules", "folded": ", folded", **SLICES}  # of titles


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The size of the adapters to compare.

    Attributes:
        r: outer rank.
        k: inner rank of nested cores.
        target_modules: as in PEFT.
    """

    r: int
    k: int
    target_modules: Any = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One thing to measure.

    Attributes:
        title: for tables.
        adapt: (plain model, ranks) -> the model to run; may change the modules that it is given.
        needs: modules that must be importable.
        autocast: runs under autocast in the base's type.
        mode: of the fused path while it runs: "on" or "off" (kernels/fast.py).
        note: what a reader of the figures must know.
        family: "base", "peer" or "corelora".
        folds: runs with its start in the base weights, only while it is measured: other variants share them.
    """

    title: str
    adapt: Callable[[Any, Ranks], Any]
    needs: tuple[str, ...] = ()
    autocast: bool = False
    mode: str = "off"
    note: str = ""
    family: str = "peer"
    folds: bool = False

    def missing(self) -> str | None:
        """Why it can't be measured here; None where it can. The modules are imported: some fail without a GPU."""
        for name in self.needs:
            try:
                importlib.import_module(name)
            except ImportError as error:
                return f"{name} can't be imported ({_first_line(error)})"
            except (RuntimeError, NotImplementedError, OSError, AttributeError) as error:
                return f"importing {name} fails here ({_first_line(error)})"
        return None

    @contextmanager
    def running(self, device: str, dtype: torch.dtype) -> Iterator[None]:
        """Autocast and the choice of the path, for the time of a measurement."""
        casts = self.autocast and dtype != torch.float32  # over a float32 base there is nothing to cast to
        cast: AbstractContextManager = torch.autocast(device, dtype=dtype) if casts else nullcontext()
        with fast_path(self.mode), cast:
            yield


PEERS: Registry = Registry("peer")


def find_peer(name: str) -> Peer:
    """The peer of a name: one of `PEERS`, a method, or `METHOD:FORM` with one of `FORMS`.

    Raises:
        CoreLoraError: no peer and no method is called so.
    """
    method, _, path = name.partition(":")
    if path and path not in FORMS:
        raise CoreLoraError(unknown_name("path", path, FORMS))
    if not path and name in PEERS:
        return PEERS[name]
    if method not in METHODS:
        raise CoreLoraError(unknown_name("method or peer", name, [*PEERS, *METHODS]))
    path = path or "fast"
    extra = {"slice_scale": path} if path in SLICES else {}
    return Peer(
        title=METHODS[method].title + ENDINGS[path],
        adapt=lambda model, ranks: adapt_core(model, method, ranks, **extra),
        mode=FORMS[path],
        family="corelora",
        folds=path == "folded",
    )


def core_config(method: str, ranks: Ranks, **settings: Any) -> CoreLoraConfig:
    """A method's config for measuring steps, with `settings` over its default.

    Starts that decompose each weight, or read statistics, are replaced by random factors of the same shapes: a step
    costs the same, and the model need not be decomposed first (`corelora bench init` measures that).
    """
    outer = OUTERS[METHODS[method].default.outer]
    replaced = outer.decomposes or outer.needs_stats
    extra: dict[str, Any] = {"outer": "random"} if replaced else {}
    if replaced and METHODS[method].default.core_start == "singular":
        extra["core_start"] = "gaussian"
    extra |= settings
    return CoreLoraConfig(method=method, r=ranks.r, inner_r=ranks.k, target_modules=ranks.target_modules, **extra)


def adapt_core(model: Any, method: str, ranks: Ranks, **settings: Any) -> Any:
    """The model with a corelora method's adapters in the base's own type."""
    return get_peft_model(model, core_config(method, ranks, **settings), autocast_adapter_dtype=False)


def lora_config(ranks: Ranks, **settings: Any) -> LoraConfig:
    """PEFT's own LoRA of the same rank on the same modules, with scale 1."""
    return LoraConfig(r=ranks.r, lora_alpha=ranks.r, target_modules=ranks.target_modules, **settings)


def _lora(model: Any, ranks: Ranks, float32: bool = False, **settings: Any) -> Any:
    return get_peft_model(model, lora_config(ranks, **settings), autocast_adapter_dtype=float32)


def _liger(model: Any, ranks: Ranks) -> Any:
    """PEFT LoRA on a model whose norms, MLP activations and loss are Liger's kernels.

    Without its rotary embedding: that one can be replaced for the whole process only, which would change the others.
    """
    apply: Any = importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama
    apply(rope=False, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=model)
    return _lora(model, ranks)


def _unsloth(model: Any, ranks: Ranks) -> Any:
    """PEFT LoRA whose products go through Unsloth's fused functions: MLP, QKV and output projections."""
    kernels: Any = importlib.import_module("unsloth.kernels")
    adapted = _lora(model, ranks)
    for layer in adapted.get_base_model().model.layers:
        fuse_projections(layer, kernels)
    return adapted


def fuse_projections(layer: Any, kernels: Any) -> None:
    """Give one decoder layer Unsloth's functions for its projections; the attention between them stays.

    Args:
        layer: a Llama decoder layer with PEFT LoRA on its projections.
        kernels: the module that has `apply_lora_mlp_swiglu`, `apply_lora_qkv` and `apply_lora_o`.
    """
    layer.mlp.forward = types.MethodType(kernels.apply_lora_mlp_swiglu, layer.mlp)
    attention = layer.self_attn
    fused = _FusedQKV(attention, kernels)
    attention.q_proj, attention.k_proj, attention.v_proj = fused, _Kept(fused, 1), _Kept(fused, 2)
    attention.o_proj = _FusedOutput(attention.o_proj, kernels)


class _FusedQKV(nn.Module):
    """Stands where q_proj was: computes all three, hands on the first and keeps the others for who asks next."""

    def __init__(self, attention: Any, kernels: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.kernels = kernels
        self.kept: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.kernels.apply_lora_qkv(self, x)
        return self.kept[0]


class _Kept(nn.Module):
    """Stands where k_proj or v_proj was: what the fused call has computed already, handed on once."""

    def __init__(self, fused: _FusedQKV, which: int) -> None:
        super().__init__()
        self.ask = lambda: fused.kept[which]  # not a submodule: its parameters are counted where they are

    def forward(self, x: Tensor) -> Tensor:
        return self.ask()


class _FusedOutput(nn.Module):
    """Stands where o_proj was."""

    def __init__(self, projection: Any, kernels: Any) -> None:
        super().__init__()
        self.o_proj, self.kernels = projection, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.apply_lora_o(self, x)


PEERS.add(BASE, Peer(title="frozen base, input gradients only", adapt=lambda model, ranks: model, family=BASE))
PEERS.add("peft_lora", Peer(title="PEFT LoRA", adapt=_lora))
PEERS.add(
    "peft_lora_fp32",
    Peer(
        title="PEFT LoRA, float32 adapters under autocast",
        adapt=lambda model, ranks: _lora(model, ranks, float32=True),
        autocast=True,
        note="PEFT's default over a half-precision base",
    ),
)
PEERS.add("peft_dora", Peer(title="PEFT DoRA", adapt=lambda model, ranks: _lora(model, ranks, use_dora=True)))
PEERS.add(
    "liger",
    Peer(
        title="PEFT LoRA with Liger",
        adapt=_liger,
        needs=("liger_kernel.transformers",),
        note="Liger's norms, SwiGLU and loss are not the adapter's, and its rotary embedding is left out",
    ),
)
PEERS.add(
    "unsloth",
    Peer(
        title="Unsloth's LoRA functions",
        adapt=_unsloth,
        needs=("unsloth.kernels",),
        note="importing unsloth changes transformers for the whole process: measure it in a run of its own",
    ),
)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
