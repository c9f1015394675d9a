"""The operation of several layers that read one input (q, k and v; gate and up), on a GPU.

Apart, each of them reads x for its own thin features, makes an input gradient of its own that autograd adds to the
others', and costs the host a node of autograd's graph in each pass. Together:

    [U1 U2 ..] = x [Rf1 ; Rf2 ; ..]^T                            one product, which reads x once
    dx = [H1 H2 ..] [Rf1 ; Rf2 ; ..] + dy1 W1 + dy2 W2 + ..      accumulated in one tensor, H = V G
    [dR1 ; dR2 ; ..] = [H1 H2 ..]^T x                            likewise

Which layers these are: groups.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from corelora.kernels.branches import at_once, branches, nothing
from corelora.kernels.core_linear import below_autograd, direct_apply, read_side, write_side
from corelora.kernels.edit import add_columns, hold_columns, put_back
from corelora.kernels.form import Form, FormMaker, product
from corelora.kernels.mixed import collapse_all, expand_all
from corelora.kernels.narrow import typed
from corelora.kernels.products import Order, Side, apply_form, choose_order, edits, through, write_form
from corelora.kernels.stacked import Stack, stack_of
from corelora.kernels.team import Member, Team, make_team, split_features, widths_of


def forward_all(x: Tensor, team: Team) -> tuple[list[Tensor], list[Tensor]]:
    """([y[T,o], ...], features) for x[T,i]: [U1 U2 ..][T, sum p] alone, or each U where some were made apart."""
    members = team.members
    rows, writes, apart = [], [], []
    for m in members:
        read, write = read_side(m.R, m.layout), write_side(m.L, m.layout)
        writes.append(write)
        apart.append(choose_order(m.W.shape[0], x.shape[1], read, write, x) is not Order.BEFORE)
        if not apart[-1]:
            rows += _rows(read, m.W)
    if any(apart):
        return _some_apart(x, team, writes, apart, x @ team.joined(rows).t() if rows else None)
    thin = x @ team.joined(rows).t()
    wants_F = any(write.stored is not None for write in writes)  # an edit applies G itself
    stack = stack_of([m.small for m in members], thin, team.grams) if wants_F else None
    if stack is not None:
        for m, F in zip(members, stack.forward(), strict=True):
            m.small.F = F
    by_edit = [edits(x, write, bool(m.small.chain), m.W.shape[0]) for m, write in zip(members, writes, strict=True)]
    count = _edited_columns(writes, by_edit)
    held = None if count is None else hold_columns(x, count)
    calls = [
        partial(write_form, x, m.W, m.bias, U, write, m.small, held)
        for m, write, U in zip(members, writes, split_features(thin, team.widths), strict=True)
    ]
    ahead = []
    if stack is not None and branches(x):
        ahead = [m for m, edit in zip(members[1:], by_edit[1:], strict=True) if not edit]
    # The adapters' own products write much and compute little: beside the first base product.
    first, *starts = at_once([calls[0], *(partial(_start, m) for m in ahead)], x)
    for m, y in zip(ahead, starts, strict=True):
        m.small.y = y
    ys = [first[0], *(call()[0] for call in calls[1:])]
    if held is not None:
        put_back(held, None)
    return ys, [thin]


def _start(m: Member) -> Tensor:
    """Lf F [T,o], into which the base product is accumulated."""
    assert m.small.F is not None
    return m.small.F @ write_side(m.L, m.layout).rows(m.W.t())


def _some_apart(
    x: Tensor, team: Team, writes: Sequence[Side], apart: Sequence[bool], thin: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The same where some layers take the other order; `thin` is of the rest."""
    own = [m for m, alone in zip(team.members, apart, strict=True) if not alone]
    parts = iter(() if thin is None else split_features(thin, [m.width for m in own]))
    ys, features = [], []
    for m, write, alone in zip(team.members, writes, apart, strict=True):
        if alone:
            y, found = apply_form(x, m.W, m.bias, read_side(m.R, m.layout), write, m.small)
        else:
            y, found = write_form(x, m.W, m.bias, next(parts), write, m.small)
        ys.append(y)
        features.append(found[0])
    return ys, features


def _edited_columns(writes: Sequence[Side], by_edit: Sequence[bool]) -> int | None:
    """How many leading columns of the input all members edit; None where they don't all edit the same ones."""
    counts = {w.count if w.index is None and edit else 0 for w, edit in zip(writes, by_edit, strict=True)}
    return counts.pop() or None if len(counts) == 1 else None


def _rows(read: Side, W: Tensor) -> list[Tensor]:
    """Stored rows and those of W, still apart."""
    cut = [read.cut(W)] if read.count else []
    return cut if read.stored is None else [read.stored, *cut]


def backward_all(
    dys: Sequence[Tensor], team: Team, x: Tensor | None, features: Sequence[Tensor], needs_x: bool
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], Tensor | list[Tensor | None]]:
    """(dx[T,i], [dR1 ; dR2 ; ..], [dL, ...], dG[n,q,p] or a list of each); None where nobody asks.

    Args:
        dys: gradients [T,o] of the outputs.
        team: whose they are.
        x: [T,i], where some R learns.
        features: as `forward_all` gives them.
        needs_x: whether dx is wanted.
    """
    found = _features_of(dys, team, features)
    # An edit of a dy is there until the base product has read it.
    edited = any(edit and m.wants_L is not None for edit, m in zip(found.by_edit, team.members, strict=True))
    calls: list[Callable[[], Any]] = [
        partial(_input_gradient, dys, team, found) if needs_x else nothing,
        partial(_reading_gradient, team.members, found, x),
        partial(_core_gradients, team.members, found),
        *(partial(_writing_gradient, *each) for each in zip(dys, team.members, found.U, found.F, strict=True)),
    ]
    dx, dR, dG, *dLs = at_once(calls, dys[0], alone=edited)
    return dx, dR, dLs, dG


@dataclass(slots=True)
class _Features:
    """The thin features of a backward pass, of each layer.

    Attributes:
        U: [T,p], of the input.
        F: U G^T [T,q] where they were made together for the gradients of L.
        V: [T,q], of the output's gradient.
        H: V G [T,p]; None where nothing is done with it but one edit, which applies G itself.
        by_edit: whether a slice that reads writes its part of dx by an edit of the output's gradient.
        whole: H of all side by side, where it was made so.
        stack: of the group, if it has one.
    """

    U: Sequence[Tensor]
    F: Sequence[Tensor | None]
    V: Sequence[Tensor]
    H: Sequence[Tensor | None]
    by_edit: Sequence[bool]
    whole: Tensor | None
    stack: Stack | None


def _features_of(dys: Sequence[Tensor], team: Team, features: Sequence[Tensor]) -> _Features:
    members = team.members
    together = features[0] if len(features) < len(members) else None
    U = features if together is None else split_features(together, team.widths)
    stack = stack_of([m.small for m in members], together, team.grams)
    places: Any = [None] * len(members) if stack is None else stack.V.chunk(len(members), dim=1)
    starts: list[Callable[[], Any]] = [
        partial(torch.mm, dy, write_side(m.L, m.layout).rows(m.W.t()).t(), out=place)
        for dy, m, place in zip(dys, members, places, strict=True)
    ]
    again = stack.forward if stack is not None and any(m.wants_L for m in members) else nothing
    *V, F = at_once([*starts, again], dys[0])
    F = [None] * len(members) if F is None else F
    by_edit = [
        edits(dy, read_side(m.R, m.layout), bool(m.small.chain), m.W.shape[1])
        for dy, m in zip(dys, members, strict=True)
    ]
    plain = [m.R is not None or not m.layout.rows or not m.small.chain for m in members]
    if stack is not None and all(plain):
        whole = stack.backward()
        return _Features(U, F, V, split_features(whole, team.widths), by_edit, whole, stack)
    H = [_thick(v, m) if more else None for v, m, more in zip(V, members, plain, strict=True)]
    return _Features(U, F, V, H, by_edit, None, stack)


def _thick(V: Tensor, m: Member) -> Tensor:
    """H[T,p] from V[T,q]."""
    H = V @ m.small.chain[0] if m.small.chain else V
    return H if m.small.scale == 1 else H * m.small.scale


def _input_gradient(dys: Sequence[Tensor], team: Team, found: _Features) -> Tensor:
    """dx: stored and copied rows in one product, slices by an edit of dy, the base products added to it."""
    members = team.members
    columns, rows = [], []
    edited: list[tuple[Tensor, Tensor | None] | None] = []
    for m, v, H, by_edit in zip(members, found.V, found.H, found.by_edit, strict=True):
        read = read_side(m.R, m.layout)
        if H is None and by_edit:
            edited.append((v, m.small.chain[0].t()))
            continue
        H = _thick(v, m) if H is None else H
        own = H.shape[1] - m.layout.rows if by_edit else H.shape[1]
        edited.append((H[:, own:], None) if by_edit else None)
        if own:
            columns.append(H[:, :own])
            rows += [m.R] if by_edit and m.R is not None else _rows(read, m.W)
    dx: Tensor | None = None
    if columns:
        dx = _side_by_side(columns, found.whole) @ team.joined(rows)
    for dy, m, part in zip(dys, members, edited, strict=True):
        place = None if part is None else add_columns(dy, *part, m.layout.row_index)
        dx = dy @ m.W if dx is None else dx.addmm_(dy, m.W)
        if place is not None:
            put_back(place, m.layout.row_index)
    assert dx is not None
    return dx


def _side_by_side(columns: Sequence[Tensor], whole: Tensor | None) -> Tensor:
    """Columns as one matrix: `whole` itself where they are all of its."""
    if whole is not None and sum(c.shape[1] for c in columns) == whole.shape[1]:
        return whole
    return columns[0] if len(columns) == 1 else torch.cat(tuple(columns), dim=1)


def _reading_gradient(members: Sequence[Member], found: _Features, x: Tensor | None) -> Tensor | None:
    """The gradients [n,i] of every R that learns in one product, one below the other."""
    own = [
        (H[:, : m.R.shape[0]], m.wants_R)
        for m, H in zip(members, found.H, strict=True)
        if m.wants_R is not None and m.R is not None and H is not None
    ]
    if not own or x is None:
        return None
    types = {dtype for _, dtype in own}
    H = _side_by_side([H for H, _ in own], found.whole)
    return product(H.t(), x, types.pop() if len(types) == 1 else x.dtype)


def _by_member(dR: Tensor | None, members: Sequence[Member]) -> list[Tensor | None]:
    """Each member's rows of it."""
    if dR is None:
        return [None] * len(members)
    parts = iter(dR.split([m.R.shape[0] for m in members if m.R is not None and m.wants_R is not None]))
    return [None if m.R is None or m.wants_R is None else typed(next(parts), m.wants_R) for m in members]


def _writing_gradient(dy: Tensor, m: Member, U: Tensor, F: Tensor | None) -> Tensor | None:
    """dL[o,n] = dy^T F where L learns, with F made again where it isn't there."""
    if m.L is None or m.wants_L is None:
        return None
    n, chain = m.L.shape[1], m.small.chain
    if F is None:
        F = through(U, (*chain[:-1], chain[-1][:n]) if chain else ())[-1]
    return product(dy.t(), F[:, :n], m.wants_L, m.small.scale)


def _core_gradients(members: Sequence[Member], found: _Features) -> Tensor | list[Tensor | None]:
    """dG[q,p] = V^T U of each layer whose core learns."""
    types = {m.wants_G for m in members}
    if found.stack is not None and len(types) == 1 and (dtype := types.pop()) is not None:
        return found.stack.gradients(dtype)
    return [
        None if m.wants_G is None else product(v.t(), u, m.wants_G)
        for m, v, u in zip(members, found.V, found.U, strict=True)
    ]


PER_MEMBER = 6  # W, bias, R, L, C, D
_unsafe_view = torch.ops.aten._unsafe_view.default


class _Siblings(torch.autograd.Function):
    """All layers of a group: x and, of each, W, bias, R, L, C, D."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, makers: Sequence[FormMaker], *tensors: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad
        given = [tensors[at : at + PER_MEMBER] for at in range(0, len(tensors), PER_MEMBER)]
        with below_autograd():
            grams = expand_all(makers, [(C, D) for *_, C, D in given])
            layouts = [maker.layout for maker in makers]
            learn = [needs[4 + n : 7 + n] for n in range(0, len(tensors), PER_MEMBER)]
            team = make_team(given, grams, layouts, x.dtype, learn)
            ys, features = forward_all(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), team)
        ctx.makers, ctx.shape = makers, x.shape
        keeps_x = any(m.wants_R is not None for m in team.members)
        ctx.save_for_backward(x if keeps_x else None, *tensors, *grams, *features)
        # No views: views among several outputs must not be changed in place, and what follows may want to.
        return tuple(ys) if x.dim() == 2 else tuple([_unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in ys])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        run = once_differentiable(_gradients) if torch.is_grad_enabled() else _gradients
        return run(ctx, *dys)


_apply_siblings = direct_apply(_Siblings)


def _gradients(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
    kept = ctx.saved_tensors  # outside, as in core_linear.py
    with below_autograd():
        return _from_kept(ctx, kept, dys)


def _from_kept(ctx: Any, saved: tuple[Any, ...], dys: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, *rest = saved
    makers, needs = ctx.makers, ctx.needs_input_grad
    count = len(makers)
    at = PER_MEMBER * count
    given, grams, features = (
        [rest[n : n + PER_MEMBER] for n in range(0, at, PER_MEMBER)],
        rest[at : at + count],
        rest[at + count :],
    )
    here = [n for n in range(count) if dys[n] is not None]
    out: list[Any] = [None] * len(needs)
    if not here:
        return tuple(out)
    flat = [dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1]) for dy in dys if dy is not None]
    layouts = [maker.layout for maker in makers]
    learn = [needs[4 + n : 7 + n] for n in range(0, at, PER_MEMBER)]
    if len(here) < count:  # what is of no use to the others' gradients is left out
        if len(features) < count:
            features = list(split_features(features[0], widths_of([t[2] for t in given], layouts)))
        features, given, grams, layouts, learn = (
            [of[n] for n in here] for of in (features, given, grams, layouts, learn)
        )
    team = make_team(given, grams, layouts, flat[0].dtype, learn)
    kept = x if x is None or x.dim() == 2 else x.reshape(-1, x.shape[-1])
    dx, dR, dLs, dGs = backward_all(flat, team, kept, features, needs[0])
    out[0] = None if dx is None else dx.view(ctx.shape)
    cores = collapse_all([makers[n] for n in here], dGs, [(C, D) for *_, C, D in given])
    for n, own, dL, core in zip(here, _by_member(dR, team.members), dLs, cores, strict=True):
        to = 2 + PER_MEMBER * n
        out[to + 2 : to + 6] = own, dL, *core
    return tuple(out)


def siblings(x: Tensor, members: Sequence[tuple[Tensor, Tensor | None, Form]]) -> tuple[Tensor, ...]:
    """The outputs of layers that read one input.

    Args:
        x: [..., i].
        members: weight [o,i], bias and form of each.
    """
    if torch.is_grad_enabled():
        tensors = [t for W, bias, form in members for t in (W, bias, *form[:4])]
        return _apply_siblings(x, [form.maker for _, _, form in members], *tensors)
    flat, forms = x.reshape(-1, x.shape[-1]), [form for _, _, form in members]
    team = make_team(
        [(W, bias, form.R, form.L, form.C) for W, bias, form in members],
        expand_all([form.maker for form in forms], [(form.C, form.D) for form in forms]),
        [form.maker.layout for form in forms],
        x.dtype,
        [(False, False, False)] * len(members),
    )
    return tuple([y.view(*x.shape[:-1], y.shape[1]) for y in forward_all(flat, team)[0]])
