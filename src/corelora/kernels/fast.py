"""Which layers take the fused path, and the path itself for such a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from corelora.adapter import CoreAdapter
from corelora.kernels.core_linear import core_linear
from corelora.kernels.form import FormMaker, is_serial
from corelora.layers import LinearView, View

_mode = "auto"


def set_fast(mode: str) -> str:
    """Choose the path of plain linear layers: "on" (fused wherever it fits), "off" (reference), "auto" (on a GPU).

    Returns:
        The mode before.
    """
    global _mode
    if mode not in ("on", "off", "auto"):
        raise ValueError(f"fast mode must be on, off or auto, got {mode!r}")
    before, _mode = _mode, mode
    return before


def wanted(x: Tensor) -> bool:
    """Whether the fused path is asked for on this input's device."""
    return _mode == "on" or (_mode == "auto" and x.is_cuda)


def suits(view: View, base: nn.Module, core: CoreAdapter) -> bool:
    """Whether a layer and an adapter have a fused path at all: a plain linear layer, a serial chain."""
    return type(view) is LinearView and type(base) is nn.Linear and is_serial(core)


def fits(base: nn.Module, x: Tensor) -> bool:
    """Whether this input can take it: the base's own type and frozen, no autocast, nobody listening to the base."""
    kept, own = base._parameters, base.__dict__
    weight, bias = kept["weight"], kept["bias"]
    if (
        weight is None
        or weight.requires_grad
        or weight.dtype != x.dtype
        or weight.is_meta
        or type(base) is not nn.Linear
    ):
        return False
    heard = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or "forward" in own
    learns = bias is not None and bias.requires_grad
    return not heard and not learns and not torch.is_autocast_enabled(x.device.type)


def fused_forward(x: Tensor, base: nn.Module, maker: FormMaker) -> Tensor:
    """base(x) plus the adapter's output, in one operation.

    Args:
        x: [..., i].
        base: the plain linear layer, one that `suits`.
        maker: makes the adapter's form.
    """
    kept = base._parameters
    weight = kept["weight"]
    assert weight is not None
    return core_linear(x, weight, kept["bias"], maker.make())
