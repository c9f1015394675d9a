"""Which layers take the fused path, and the path itself for such a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from corelora.adapter import CoreAdapter
from corelora.kernels.core_linear import core_linear
from corelora.kernels.form import FormMaker, is_serial
from corelora.kernels.groups import Layer, taken, together
from corelora.layers import LinearView, View

_mode = "auto"
CPU_TYPES = (torch.float32, torch.bfloat16)
CPU_ROWS = 64


def set_fast(mode: str) -> str:
    """Choose the path of plain linear layers: "on" (fused wherever it fits), "off" (reference), "auto" (where it pays).

    On a GPU that is wherever it fits, on a CPU what `wanted` and `pays` say.

    Returns:
        The mode before.
    """
    global _mode
    if mode not in ("on", "off", "auto"):
        raise ValueError(f"fast mode must be on, off or auto, got {mode!r}")
    before, _mode = _mode, mode
    return before


@contextmanager
def fast_path(mode: str) -> Iterator[None]:
    """`set_fast` for the time of a block."""
    before = set_fast(mode)
    try:
        yield
    finally:
        set_fast(before)


def wanted(x: Tensor) -> bool:
    """Whether the fused path is asked for on this input's device, by what can be told from the input alone.

    On a CPU "auto" takes it for float32 and bfloat16, eager and plain (a compiler has its own order of products,
    torch.func cannot go through it, autocast makes W narrow each time, next to which nothing counts): in passes without
    gradients always, in those with them from `CPU_ROWS` rows on. With fewer, what the host does between products
    decides, and autograd does its part in C++ where we use Python.
    """
    if _mode != "auto" or x.is_cuda:
        return _mode != "off"
    if not x.is_cpu or x.dtype not in CPU_TYPES or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and x.numel() < CPU_ROWS * x.shape[-1]:
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


def pays(x: Tensor, maker: FormMaker) -> bool:
    """Whether an adapter whose path is `wanted` takes it: on a CPU "auto" leaves out what copies its factors each time.

    Those are stored starts beside trained offsets of outer factors (PiSSA's, with its start subtracted).
    """
    return _mode != "auto" or x.is_cuda or not maker.stacks


def suits(view: View, base: nn.Module, core: CoreAdapter) -> bool:
    """Whether a layer and an adapter have a fused path at all: a plain linear layer, a serial chain."""
    return type(view) is LinearView and type(base) is nn.Linear and is_serial(core)


def fits(base: nn.Module, x: Tensor) -> bool:
    """Whether this input can take it: the base's own type, or autocast; not learning; nobody listening to the base."""
    kept, own = base._parameters, base.__dict__
    weight, bias = kept["weight"], kept["bias"]
    if (
        weight is None
        or (weight.requires_grad and torch.is_grad_enabled())
        or (weight.dtype != x.dtype and not _is_cast(x, weight))
        or weight.is_meta
        or type(base) is not nn.Linear
    ):
        return False
    heard = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or "forward" in own
    learns = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    return not heard and not learns


def _is_cast(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast brings both to one type; float64 is left as it is."""
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)


def fast_forward(layer: Layer, x: Tensor) -> Tensor | None:
    """A layer's output by the fused path, alone or with the layers that read the same input; None where it has none.

    Args:
        layer: adapted.
        x: [..., i], one for which the path is `wanted`.
    """
    compiling = torch.compiler.is_compiling()  # a graph shows which layers read one input (compiled.py)
    y = None if compiling else taken(layer, x)
    if y is not None:
        return y
    maker, base = layer.form_maker(x), layer._modules["base_layer"]
    if maker is None or base is None:
        return None
    y = None if compiling else together(layer, x, maker)
    return fused_forward(x, base, maker) if y is None else y


def fused_forward(x: Tensor, base: nn.Module, maker: FormMaker) -> Tensor:
    """base(x) plus the adapter's output, in one operation; under autocast in its type, as nn.Linear's.

    Args:
        x: [..., i].
        base: the plain linear layer, one that `suits`.
        maker: makes the adapter's form.
    """
    kept = base._parameters
    weight = kept["weight"]
    assert weight is not None
    kind, bias = x.device.type, kept["bias"]
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return core_linear(x, weight, bias, maker.make())
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):  # what is inside has types of its own: G is made in the factors'
        cast_bias = None if bias is None else bias.to(dtype)
        return core_linear(x.to(dtype), weight.to(dtype), cast_bias, maker.make())
