"""Layers that read one input (q, k and v; gate and up) as one operation, on a GPU.

Apart, each of them reads x for its own thin features, makes an input gradient of its own that autograd adds to the
others', and costs the host a node of autograd's graph in each pass. Together:

    [U1 U2 ..] = x [Rf1 ; Rf2 ; ..]^T                            one product, which reads x once
    dx = [H1 H2 ..] [Rf1 ; Rf2 ; ..] + dy1 W1 + dy2 W2 + ..      accumulated in one tensor, H = V G
    [dR1 ; dR2 ; ..] = [H1 H2 ..]^T x                            likewise

Which layers these are is seen, not told by their names: those that were called one after the other with the same
tensor. From the next pass on the first of them computes for all, and the others, called with that very tensor, hand
out what is there. A group whose outputs were not all asked for is dissolved for good.

Left alone are compiled code, functorch, and passes whose saved tensors are watched: checkpointing without reentry
wants the pass that it repeats to save the same tensors as the first, in which no group was known yet.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corelora.kernels.core_linear import read_side, write_side
from corelora.kernels.edit import add_columns, put_back
from corelora.kernels.form import Chain, Form, FormMaker, Layout, on_cpu
from corelora.kernels.products import Order, Side, Small, apply_form, choose_order, edits, through, write_form


class Layer(Protocol):
    """What a group asks of an adapted layer."""

    _modules: dict[str, nn.Module | None]

    def form_maker(self, x: Tensor) -> FormMaker | None:
        """What makes the form for this input; None where the fused path does not apply."""


@dataclass(slots=True)
class Member:
    """One layer of a group in one pass.

    Attributes:
        W: [o,i].
        bias: [o] or None.
        R, L, chain, layout: as in core_linear.py.
        needs_R, needs_L: whether they learn.
    """

    W: Tensor
    bias: Tensor | None
    R: Tensor | None
    L: Tensor | None
    chain: Chain
    layout: Layout
    needs_R: bool = False
    needs_L: bool = False

    def small(self, dtype: torch.dtype) -> Small:
        """G, in the type of the features."""
        return Small(tuple([g if g.dtype == dtype else g.to(dtype) for g in self.chain]), self.layout.scale)

    def sides(self, dtype: torch.dtype) -> tuple[Side, Side]:
        """(what reads, what writes), likewise."""
        return read_side(self.R, self.layout, dtype), write_side(self.L, self.layout, dtype)


def forward_all(x: Tensor, members: Sequence[Member]) -> tuple[list[Tensor], list[Tensor]]:
    """([y[T,o], ...], [U[T,p], ...]) for x[T,i]."""
    sides = [member.sides(x.dtype) for member in members]
    orders = [choose_order(m.W.shape[0], x.shape[1], *s, x) for m, s in zip(members, sides, strict=True)]
    rows = [read.rows(m.W) for m, (read, _), o in zip(members, sides, orders, strict=True) if o is Order.BEFORE]
    parts = iter((x @ torch.cat(rows).t()).split([r.shape[0] for r in rows], dim=1) if rows else ())
    ys, thin = [], []
    for member, (read, write), order in zip(members, sides, orders, strict=True):
        small = member.small(x.dtype)
        if order is Order.BEFORE:
            y, features = write_form(x, member.W, member.bias, next(parts), write, small)
        else:
            y, features = apply_form(x, member.W, member.bias, read, write, small)
        ys.append(y)
        thin.append(features[0])
    return ys, thin


def backward_all(
    dys: Sequence[Tensor], members: Sequence[Member], x: Tensor | None, thin: Sequence[Tensor], needs_x: bool
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor]]:
    """(dx[T,i], [dR, ...], [dL, ...], [V[T,q], ...]); None where nobody asks.

    Args:
        dys: gradients [T,o] of the outputs.
        members: whose they are.
        x: [T,i], where some R learns.
        thin: U of each member.
        needs_x: whether dx is wanted.
    """
    dtype = dys[0].dtype
    thick, V = [], []  # H of each member, and the features of dy before G^T
    for dy, m in zip(dys, members, strict=True):
        _, write = m.sides(dtype)
        small = m.small(dtype)
        features = through(dy @ write.rows(m.W.t()).t(), tuple([g.t() for g in reversed(small.chain)]))
        V.append(features[0])
        thick.append(features[-1])
    dx = _input_gradient(dys, members, thick) if needs_x else None
    dRs = _reading_gradients(members, thick, x)
    dLs = [_writing_gradient(dy, m, U) if m.needs_L else None for dy, m, U in zip(dys, members, thin, strict=True)]
    return dx, dRs, dLs, V


def _input_gradient(dys: Sequence[Tensor], members: Sequence[Member], thick: Sequence[Tensor]) -> Tensor:
    """dx: stored and copied rows in one product, slices by an edit of dy, the base products added to it."""
    dtype = dys[0].dtype
    dx: Tensor | None = None
    columns, rows, edited = [], [], []
    for dy, m, H in zip(dys, members, thick, strict=True):
        read, _ = m.sides(dtype)
        H = H if m.layout.scale == 1 else H * m.layout.scale
        own = read.stored.shape[0] if read.stored is not None else 0
        by_edit = edits(dy, read, bool(m.chain))
        edited.append(H[:, own:] if by_edit else None)
        if read.stored is not None or not by_edit:
            columns.append(H[:, :own] if by_edit else H)
            rows.append(read.stored if by_edit else read.rows(m.W))
    if columns:
        dx = (columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)) @ torch.cat(
            [row for row in rows if row is not None]
        )
    for dy, m, slice_part in zip(dys, members, edited, strict=True):
        place = None if slice_part is None else add_columns(dy, slice_part, None, m.layout.row_index)
        dx = dy @ m.W if dx is None else dx.addmm_(dy, m.W)
        if place is not None:
            put_back(place, m.layout.row_index)
    assert dx is not None
    return dx


def _reading_gradients(members: Sequence[Member], thick: Sequence[Tensor], x: Tensor | None) -> list[Tensor | None]:
    """[dR[n,i], ...] where R learns: one product, whose rows are theirs."""
    own = [H[:, : m.R.shape[0]] for m, H in zip(members, thick, strict=True) if m.needs_R and m.R is not None]
    if not own or x is None:
        return [None] * len(members)
    parts = iter((torch.cat(own, dim=1).t() @ x).split([H.shape[1] for H in own]))
    found: list[Tensor | None] = []
    for m in members:
        if not m.needs_R or m.R is None:
            found.append(None)
            continue
        dR = next(parts)
        dR = dR if m.layout.scale == 1 else dR * m.layout.scale
        found.append(dR if dR.dtype == m.R.dtype else dR.to(m.R.dtype))
    return found


def _writing_gradient(dy: Tensor, m: Member, U: Tensor) -> Tensor:
    """dL[o,n] = dy^T F, with F made again."""
    assert m.L is not None
    small, n = m.small(dy.dtype), m.L.shape[1]
    chain = (*small.chain[:-1], small.chain[-1][:n]) if small.chain else ()
    F = through(U, chain)[-1][:, :n]
    dL = dy.t() @ F
    dL = dL if m.layout.scale == 1 else dL * m.layout.scale
    return dL if dL.dtype == m.L.dtype else dL.to(m.L.dtype)


PER_MEMBER = 6  # W, bias, R, L, C, D


class _Siblings(torch.autograd.Function):
    """All layers of a group: x and, of each, W, bias, R, L, C, D."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, makers: Sequence[FormMaker], *tensors: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[2:]
        flat = x.reshape(-1, x.shape[-1])
        members = []
        for n, maker in enumerate(makers):
            at = n * PER_MEMBER
            W, bias, R, L, C, D = tensors[at : at + PER_MEMBER]
            G = maker.expand(C, D)
            chain = () if G is None else (G,)
            members.append(Member(W, bias, R, L, chain, maker.layout, needs[at + 2], needs[at + 3]))
        ys, thin = forward_all(flat, members)
        ctx.makers, ctx.shape = makers, x.shape
        keeps_x = any(m.needs_R for m in members)
        ctx.save_for_backward(x if keeps_x else None, *tensors, *(c for m in members for c in m.chain), *thin)
        # No views: views among several outputs must not be changed in place, and what follows may want to.
        return tuple([torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in ys])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        run = once_differentiable(_gradients) if torch.is_grad_enabled() else _gradients
        return run(ctx, *dys)


def _gradients(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    makers, needs = ctx.makers, ctx.needs_input_grad
    count = len(makers)
    tensors, rest = rest[: count * PER_MEMBER], rest[count * PER_MEMBER :]
    thin = rest[len(rest) - count :]
    chains = iter(rest[: len(rest) - count])
    members, here = [], []
    for n, maker in enumerate(makers):
        W, bias, R, L, C, _ = tensors[n * PER_MEMBER : (n + 1) * PER_MEMBER]
        chain = (next(chains),) if C is not None else ()
        at = 2 + n * PER_MEMBER
        if dys[n] is not None:
            members.append(Member(W, bias, R, L, chain, maker.layout, needs[at + 2], needs[at + 3]))
            here.append(n)
    out: list[Any] = [None] * len(needs)
    if not here:
        return tuple(out)
    flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys if dy is not None]
    kept = None if x is None else x.reshape(-1, x.shape[-1])
    dx, dRs, dLs, V = backward_all(flat, members, kept, [thin[n] for n in here], needs[0])
    out[0] = None if dx is None else dx.view(ctx.shape)
    for n, dR, dL, v in zip(here, dRs, dLs, V, strict=True):
        at = 2 + n * PER_MEMBER
        C, D = tensors[n * PER_MEMBER + 4 : n * PER_MEMBER + 6]
        out[at + 2], out[at + 3] = dR, dL
        if needs[at + 4]:
            out[at + 4], out[at + 5] = makers[n].collapse((v.t() @ thin[n]).to(C.dtype), C, D)
    return tuple(out)


@dataclass(frozen=True)
class _Call:
    """Under what a group's outputs were made: they are handed out only under the same."""

    grad: bool
    inference: bool
    version: int | None
    autocast: torch.dtype | None

    @classmethod
    def now(cls, x: Tensor) -> _Call:
        inference = torch.is_inference_mode_enabled()
        kind = x.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cls(torch.is_grad_enabled(), inference, None if x.is_inference() else x._version, cast)


class Group:
    """Layers that read one input, in the order of their calls.

    Args:
        layers: of the model; the first computes for all.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = [weakref.ref(layer) for layer in layers]
        self.waiting: dict[int, Tensor] = {}
        self.x: weakref.ref[Tensor] | None = None
        self.call: _Call | None = None

    def lead(self, layer: Layer, x: Tensor) -> Tensor | None:
        """The first layer's output, the others' kept; None where they can't be computed together now."""
        if self.layers[0]() is not layer:
            return None
        if self.waiting:
            self.dissolve()
            return None
        layers = [ref() for ref in self.layers]
        given = [_plain_form(other, x) for other in layers if other is not None]
        forms = [form for form in given if form is not None]
        if len(forms) != len(self.layers):
            return None
        ys = _run(x, [(other._modules["base_layer"], form) for other, form in zip(layers, forms, strict=True) if other])
        self.x, self.call = weakref.ref(x), _Call.now(x)
        self.waiting = {id(other): y for other, y in zip(layers[1:], ys[1:], strict=True)}
        return ys[0]

    def take(self, layer: Layer, x: Tensor) -> Tensor | None:
        """What was computed for a layer, if it was for this input."""
        y = self.waiting.pop(id(layer), None)
        if y is None:
            return None
        if self.x is not None and self.x() is x and _Call.now(x) == self.call:
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


def together(layer: Layer, x: Tensor) -> Tensor | None:
    """A layer's output, computed with those of its group; None where it has none, or computes alone.

    Args:
        layer: on its fused path.
        x: its input.
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
    return None if group is None else group.lead(layer, x)


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


def _plain_form(layer: Layer, x: Tensor) -> Form | None:
    """A layer's form for this input, if all of it is here: another layer's call may not gather what is sharded."""
    base = layer._modules["base_layer"]
    maker = layer.form_maker(x)
    if maker is None or base is None:
        return None
    form, weight = maker.make(), base._parameters["weight"]
    here = (weight, form.R, form.L, form.C, form.D)
    if any(t is not None and (type(t) not in PLAIN or t.device != x.device or hasattr(t, "ds_id")) for t in here):
        return None
    assert weight is not None
    return form if weight.shape[1] == x.shape[-1] else None


PLAIN = (Tensor, nn.Parameter)


def _run(x: Tensor, members: Sequence[tuple[Any, Form]]) -> tuple[Tensor, ...]:
    """The outputs, under autocast in its type."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return _apply(x, [(base.weight, base.bias, form) for base, form in members])
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        cast = [
            (base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype), form) for base, form in members
        ]
        return _apply(x.to(dtype), cast)


def _apply(x: Tensor, members: Sequence[tuple[Tensor, Tensor | None, Form]]) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():
        flat = x.reshape(-1, x.shape[-1])
        given = []
        for W, bias, (R, L, C, D, maker) in members:
            G = maker.expand(C, D)
            given.append(Member(W, bias, R, L, () if G is None else (G,), maker.layout))
        return tuple([y.view(*x.shape[:-1], y.shape[1]) for y in forward_all(flat, given)[0]])
    tensors = [t for W, bias, form in members for t in (W, bias, *form[:4])]
    return _Siblings.apply(x, [form.maker for _, _, form in members], *tensors)
