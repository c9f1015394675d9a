"""Which layers are computed together: those that were called one after the other with the same tensor.

It is seen, not told by their names. From the next pass on the first of them computes for all (siblings.py), and the
others, called with that very tensor, hand out what is there. A group whose outputs were not all asked for is dissolved
for good.

Left alone are compiled code, functorch, and passes whose saved tensors are watched: checkpointing without reentry
wants the pass that it repeats to save the same tensors as the first, in which no group was known yet.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from corelora.kernels.form import Form, FormMaker, on_cpu
from corelora.kernels.siblings import siblings


class Layer(Protocol):
    """What a group asks of an adapted layer."""

    _modules: dict[str, nn.Module | None]

    def form_maker(self, x: Tensor) -> FormMaker | None:
        """What makes the form for this input; None where the fused path does not apply."""


def _call(x: Tensor) -> tuple[Any, ...]:
    """Under what a group's outputs are made: they are handed out only under the same."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), None if x.is_inference() else x._version, cast


class Group:
    """Layers that read one input, in the order of their calls.

    Args:
        layers: of the model; the first computes for all.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = [weakref.ref(layer) for layer in layers]
        self.waiting: dict[int, Tensor] = {}
        self.x: weakref.ref[Tensor] | None = None
        self.call: tuple[Any, ...] | None = None

    def lead(self, layer: Layer, x: Tensor, maker: FormMaker) -> Tensor | None:
        """The first layer's output, the others' kept; None where they can't be computed together now."""
        if self.layers[0]() is not layer:
            return None
        if self.waiting:
            self.dissolve()
            return None
        members = []
        for ref in self.layers:
            other = ref()
            own = None if other is None else maker if other is layer else other.form_maker(x)
            member = None if other is None or own is None else _whole(other._modules["base_layer"], own, x)
            if member is None:
                return None
            members.append((id(other), member))
        ys = _run(x, [member for _, member in members])
        self.x, self.call = weakref.ref(x), _call(x)
        self.waiting = {key: y for (key, _), y in zip(members[1:], ys[1:], strict=True)}
        return ys[0]

    def take(self, layer: Layer, x: Tensor) -> Tensor | None:
        """What was computed for a layer, if it was for this input."""
        y = self.waiting.pop(id(layer), None)
        if y is None:
            return None
        if self.x is not None and self.x() is x and _call(x) == self.call:
            return y
        self.dissolve()
        return None

    def dissolve(self) -> None:
        """The layers are apart from here on."""
        self.waiting = {}
        for layer in (ref() for ref in self.layers):
            _groups.pop(layer, None)
            _alone.add(layer)


_groups: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()
_alone: weakref.WeakSet[Any] = weakref.WeakSet()
_seen = threading.local()  # .x, .layers: the last input, and the layers that were called with it


def taken(layer: Layer, x: Tensor) -> Tensor | None:
    """A layer's output that its group has computed for this input; None where there is none."""
    group = _groups.get(layer)
    return None if group is None or not group.waiting else group.take(layer, x)


def together(layer: Layer, x: Tensor, maker: FormMaker) -> Tensor | None:
    """A layer's output, computed with those of its group; None where it has none, or computes alone.

    Args:
        layer: on its fused path.
        x: its input.
        maker: what makes its form.
    """
    if on_cpu(x) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        return None
    if layer not in _groups:
        _watch(layer, x)
    group = _groups.get(layer)
    return None if group is None else group.lead(layer, x, maker)


def _watch(layer: Layer, x: Tensor) -> None:
    """Remember a call; layers that were called one after the other with the same input are a group from then on."""
    if layer in _alone:
        return
    seen = getattr(_seen, "x", None)
    if seen is not None and seen() is x:
        _seen.layers.append(weakref.ref(layer))
        return
    layers = [found for ref in getattr(_seen, "layers", ()) if (found := ref()) is not None]
    if len(layers) > 1 and len({id(found) for found in layers}) == len(layers):
        group = Group(layers)
        for found in layers:
            _groups[found] = group
    _seen.x, _seen.layers = weakref.ref(x), [weakref.ref(layer)]


def _whole(base: Any, maker: FormMaker, x: Tensor) -> tuple[Tensor, Tensor | None, Form] | None:
    """A layer's tensors for this input, if all are here: another layer's call may not gather what is sharded."""
    kept, form = base._parameters, maker.make()
    weight = kept["weight"]
    for tensor in (weight, *form[:4]):
        if tensor is not None and type(tensor) not in PLAIN:
            return None
    fits = weight.shape[1] == x.shape[-1] and weight.device == x.device and not hasattr(weight, "ds_id")
    return (weight, kept["bias"], form) if fits else None


PLAIN = (Tensor, nn.Parameter)


def _run(x: Tensor, members: Sequence[tuple[Tensor, Tensor | None, Form]]) -> tuple[Tensor, ...]:
    """The outputs, under autocast in its type."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return siblings(x, members)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        cast = [(W.to(dtype), None if bias is None else bias.to(dtype), form) for W, bias, form in members]
        return siblings(x.to(dtype), cast)
