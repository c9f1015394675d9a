"""The operation of several layers that read one input (q, k and v; gate and up), on a GPU.

Apart, each of them reads x for its own thin features, makes an input gradient of its own that autograd adds to the
others', and costs the host a node of autograd's graph in each pass. Together:

    [U1 U2 ..] = x [Rf1 ; Rf2 ; ..]^T                            one product, which reads x once
    dx = [H1 H2 ..] [Rf1 ; Rf2 ; ..] + dy1 W1 + dy2 W2 + ..      accumulated in one tensor, H = V G
    [dR1 ; dR2 ; ..] = [H1 H2 ..]^T x                            likewise

Which layers these are: groups.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from corelora.kernels.core_linear import below_autograd, direct_apply, read_side, write_side
from corelora.kernels.edit import add_columns, hold_columns, put_back
from corelora.kernels.form import Form, FormMaker, Layout, product
from corelora.kernels.narrow import narrowed, typed
from corelora.kernels.products import Order, Side, Small, apply_form, choose_order, edits, through, write_form


@dataclass(slots=True)
class Member:
    """One layer of a group in one pass.

    Attributes:
        W: [o,i].
        bias: [o] or None.
        R, L: as in core_linear.py, in the type of the features.
        small: G, likewise.
        layout: as in core_linear.py.
        wants_R, wants_L: the types that their gradients have; None where they don't learn.
    """

    W: Tensor
    bias: Tensor | None
    R: Tensor | None
    L: Tensor | None
    small: Small
    layout: Layout
    wants_R: torch.dtype | None
    wants_L: torch.dtype | None


@dataclass(slots=True)
class Team:
    """The layers of a group in one pass.

    Attributes:
        members: in the order of their calls.
        stored: all their R, one below the other, where casting has put them so.
    """

    members: list[Member]
    stored: Tensor | None

    def joined(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows that read the input as one matrix."""
        if self.stored is not None and [id(row) for row in rows] == [id(m.R) for m in self.members]:
            return self.stored
        return rows[0] if len(rows) == 1 else torch.cat(tuple(rows))


def forward_all(x: Tensor, team: Team) -> tuple[list[Tensor], list[Tensor]]:
    """([y[T,o], ...], [U[T,p], ...]) for x[T,i]."""
    members = team.members
    rows, writes, apart = [], [], []
    for m in members:
        read, write = read_side(m.R, m.layout), write_side(m.L, m.layout)
        writes.append(write)
        apart.append(choose_order(m.W.shape[0], x.shape[1], read, write, x) is not Order.BEFORE)
        if not apart[-1]:
            rows += _rows(read, m.W)
    parts: Any = ()
    if rows:
        thin = x @ team.joined(rows).t()
        parts = iter(thin.split([_count(m) for m, alone in zip(members, apart, strict=True) if not alone], dim=1))
    count = None if any(apart) else _edited_columns(x, members, writes)
    held = None if count is None else hold_columns(x, count)
    ys, features = [], []
    for m, write, alone in zip(members, writes, apart, strict=True):
        if alone:
            y, own = apply_form(x, m.W, m.bias, read_side(m.R, m.layout), write, m.small)
        else:
            y, own = write_form(x, m.W, m.bias, next(parts), write, m.small, held)
        ys.append(y)
        features.append(own[0])
    if held is not None:
        put_back(held, None)
    return ys, features


def _edited_columns(x: Tensor, members: Sequence[Member], writes: Sequence[Side]) -> int | None:
    """How many leading columns of x all members edit; None where they don't all edit the same ones."""
    counts = {
        write.count if write.index is None and edits(x, write, bool(m.small.chain), m.W.shape[0]) else 0
        for m, write in zip(members, writes, strict=True)
    }
    return counts.pop() or None if len(counts) == 1 else None


def _rows(read: Side, W: Tensor) -> list[Tensor]:
    """Stored rows and those of W, still apart."""
    cut = [read.cut(W)] if read.count else []
    return cut if read.stored is None else [read.stored, *cut]


def _count(m: Member) -> int:
    """How many features a member reads."""
    return (0 if m.R is None else m.R.shape[0]) + m.layout.rows


def backward_all(
    dys: Sequence[Tensor], team: Team, x: Tensor | None, thin: Sequence[Tensor], needs_x: bool
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor]]:
    """(dx[T,i], [dR, ...], [dL, ...], [V[T,q], ...]); None where nobody asks.

    Args:
        dys: gradients [T,o] of the outputs.
        team: whose they are.
        x: [T,i], where some R learns.
        thin: U of each member.
        needs_x: whether dx is wanted.
    """
    members = team.members
    V = [dy @ write_side(m.L, m.layout).rows(m.W.t()).t() for dy, m in zip(dys, members, strict=True)]
    # H = V G, where more is done with it than one edit, which applies G itself.
    thick = [
        None if m.R is None and m.layout.rows and m.small.chain else _thick(v, m)
        for v, m in zip(V, members, strict=True)
    ]
    dx = _input_gradient(dys, team, V, thick) if needs_x else None
    dRs = _reading_gradients(members, thick, x)
    dLs = [_writing_gradient(dy, m, U) for dy, m, U in zip(dys, members, thin, strict=True)]
    return dx, dRs, dLs, V


def _thick(V: Tensor, m: Member) -> Tensor:
    """H[T,p] from V[T,q]."""
    H = V @ m.small.chain[0] if m.small.chain else V
    return H if m.small.scale == 1 else H * m.small.scale


def _input_gradient(dys: Sequence[Tensor], team: Team, V: Sequence[Tensor], thick: Sequence[Tensor | None]) -> Tensor:
    """dx: stored and copied rows in one product, slices by an edit of dy, the base products added to it."""
    members = team.members
    columns, rows = [], []
    edited: list[tuple[Tensor, Tensor | None] | None] = []
    for dy, m, v, H in zip(dys, members, V, thick, strict=True):
        read = read_side(m.R, m.layout)
        by_edit = edits(dy, read, bool(m.small.chain), m.W.shape[1])
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
        dx = (columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)) @ team.joined(rows)
    for dy, m, part in zip(dys, members, edited, strict=True):
        place = None if part is None else add_columns(dy, *part, m.layout.row_index)
        dx = dy @ m.W if dx is None else dx.addmm_(dy, m.W)
        if place is not None:
            put_back(place, m.layout.row_index)
    assert dx is not None
    return dx


def _reading_gradients(
    members: Sequence[Member], thick: Sequence[Tensor | None], x: Tensor | None
) -> list[Tensor | None]:
    """[dR[n,i], ...] where R learns: one product, whose rows are theirs."""
    own = [
        (H[:, : m.R.shape[0]], m.wants_R)
        for m, H in zip(members, thick, strict=True)
        if m.wants_R is not None and m.R is not None and H is not None
    ]
    if not own or x is None:
        return [None] * len(members)
    H = own[0][0] if len(own) == 1 else torch.cat([H for H, _ in own], dim=1)
    types = {dtype for _, dtype in own}
    whole = product(H.t(), x, types.pop() if len(types) == 1 else x.dtype)
    parts = iter(whole.split([H.shape[1] for H, _ in own]))
    return [None if m.R is None or m.wants_R is None else typed(next(parts), m.wants_R) for m in members]


def _writing_gradient(dy: Tensor, m: Member, U: Tensor) -> Tensor | None:
    """dL[o,n] = dy^T F where L learns, with F made again."""
    if m.L is None or m.wants_L is None:
        return None
    n, chain = m.L.shape[1], m.small.chain
    F = through(U, (*chain[:-1], chain[-1][:n]) if chain else ())[-1][:, :n]
    return product(dy.t(), F, m.wants_L, m.small.scale)


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
            grams = [maker.expand(C, D) for maker, (*_, C, D) in zip(makers, given, strict=True)]
            team = _team(
                given, grams, makers, x.dtype, [needs[4 + n : 6 + n] for n in range(0, len(tensors), PER_MEMBER)]
            )
            ys, thin = forward_all(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), team)
        ctx.makers, ctx.shape = makers, x.shape
        keeps_x = any(m.wants_R is not None for m in team.members)
        ctx.save_for_backward(x if keeps_x else None, *tensors, *grams, *thin)
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
    thin, grams = rest[-count:], rest[-2 * count : -count]
    here = [n for n in range(count) if dys[n] is not None]
    out: list[Any] = [None] * len(needs)
    if not here:
        return tuple(out)
    flat = [dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1]) for dy in dys if dy is not None]
    team = _team(
        [rest[PER_MEMBER * n : PER_MEMBER * (n + 1)] for n in here],
        [grams[n] for n in here],
        [makers[n] for n in here],
        flat[0].dtype,
        [needs[4 + PER_MEMBER * n : 6 + PER_MEMBER * n] for n in here],
    )
    kept = x if x is None or x.dim() == 2 else x.reshape(-1, x.shape[-1])
    dx, dRs, dLs, V = backward_all(flat, team, kept, [thin[n] for n in here], needs[0])
    out[0] = None if dx is None else dx.view(ctx.shape)
    for n, dR, dL, v in zip(here, dRs, dLs, V, strict=True):
        at = 2 + PER_MEMBER * n
        out[at + 2], out[at + 3] = dR, dL
        if needs[at + 4]:
            C, D = rest[at + 2 : at + 4]  # `rest` begins with the first member, two places before the inputs
            out[at + 4], out[at + 5] = makers[n].collapse(product(v.t(), thin[n], C.dtype), C, D)
    return tuple(out)


def _team(
    given: Sequence[Sequence[Any]],
    grams: Sequence[Tensor | None],
    makers: Sequence[FormMaker],
    dtype: torch.dtype,
    needs: Sequence[Sequence[bool]],
) -> Team:
    """Members of W, bias, R, L and what follows, with G, all factors in one type; `needs` is of R and L."""
    count, stored = len(given), [t[2] for t in given]
    cast, block = narrowed([*stored, *(t[3] for t in given), *grams], dtype)
    members = [
        Member(
            *(t[0], t[1], R, L),
            Small(() if G is None else (G,), maker.layout.scale),
            maker.layout,
            t[2].dtype if need[0] and R is not None else None,
            t[3].dtype if need[1] and L is not None else None,
        )
        for t, R, L, G, maker, need in zip(
            given, cast[:count], cast[count : 2 * count], cast[2 * count :], makers, needs, strict=True
        )
    ]
    if block is None or any(R is None or R.dtype == dtype for R in stored):
        return Team(members, None)
    width = stored[0].shape[1]
    return Team(members, block[: sum(R.numel() for R in stored)].view(-1, width))


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
    team = _team(
        [(W, bias, form.R, form.L) for W, bias, form in members],
        [form.maker.expand(form.C, form.D) for form in forms],
        [form.maker for form in forms],
        x.dtype,
        [(False, False)] * len(members),
    )
    return tuple([y.view(*x.shape[:-1], y.shape[1]) for y in forward_all(flat, team)[0]])
