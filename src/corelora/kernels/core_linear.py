"""The fused path of an adapted linear layer: y = W x + b + Lf G Rf x (form.py), and its gradients.

Forward and backward are one function: dx = W^T dy + Rf^T G^T Lf^T dy is the forward form of W^T with the factors
swapped. What that function can choose is the order of its products (`Order`):

- AFTER   the base product first, the adapter added to its output: one more pass over the output. A slice of W that
          reads the input is then free, being some of the base product's own outputs.
- BEFORE  the adapter's part first, the base product accumulated into it (beta = 1 of the matrix product). Where only
          columns of W write, there is no part at all but an edit: W (x + scatter(f)) = W x + W[:, cols] f, so r columns
          of x change for the time of the base product and are put back bit for bit (edit.py).

The gradients of the factors are products with the two thin features U = Rf x and V = Lf^T dy:

    dG = V^T U        dR = (V G)^T x        dL = dy^T F

with F = G U, so x is saved only where R learns, and U (T x p) otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from corelora.kernels.edit import add_columns, can_edit, put_back
from corelora.kernels.form import Form, FormMaker, Layout


class Order(Enum):
    """When the adapter's part is computed."""

    AFTER = "after"
    BEFORE = "before"


_order: Order | None = None


def set_order(order: Order | None) -> Order | None:
    """Take `order` everywhere instead of the cheaper one; None chooses again. For measurements and tests.

    Returns:
        What was set before.
    """
    global _order
    before, _order = _order, order
    return before


@dataclass(slots=True)
class Side:
    """Factors on one side of G, as rows over the layer's input (or, for the writing side, over its output).

    Attributes:
        stored: [n1, side], or None.
        count: how many rows of W, or of W^T on the writing side, follow; 0 for none.
        index: which; None for the leading ones.
    """

    stored: Tensor | None
    count: int
    index: Tensor | None

    def rows(self, W: Tensor) -> Tensor:
        """All rows as one matrix; `W` is W[n, side]. One wide product is cheaper than two over the same features."""
        stored = self.stored
        if not self.count:
            assert stored is not None
            return stored
        cut = W[: self.count] if self.index is None else W.index_select(0, self.index)
        if stored is None:
            return cut
        if stored.stride(1) == 1:
            return torch.cat((stored, cut))
        return torch.cat((stored.t(), cut.t()), dim=1).t()  # columns: joined as they lie in memory


def choose_order(o: int, i: int, read: Side, write: Side, x: Tensor) -> Order:
    """The cheaper order for x[T,i] to y[T,o], by the bytes that each moves beyond the base product.

    Reading the input for a slice's U costs T i, a second pass over the output 2 T o (read and write); the columns of an
    edit are few. On a CPU the base product is not bound by memory and AFTER is never worse.
    """
    if write.stored is None and not can_edit(x):
        return Order.AFTER
    if _order is not None:
        return _order
    if not x.is_cuda:
        return Order.AFTER
    if write.stored is None and read.stored is None:
        return Order.BEFORE if i <= 2 * o else Order.AFTER
    return Order.BEFORE


def apply_form(
    x: Tensor, W: Tensor, bias: Tensor | None, read: Side, write: Side, G: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y[T,o], U[T,p], F[T,q]) with U = Rf x, F = G U and y = W x + b + Lf F; F None where it never stood alone.

    Args:
        x: [T,i].
        W: [o,i].
        bias: [o] or None.
        read: rows of Rf.
        write: columns of Lf, as rows.
        G: [q,p], None for the identity.
    """
    if choose_order(W.shape[0], x.shape[1], read, write, x) is Order.AFTER:
        return _after(x, W, bias, read, write, G)
    U = x @ read.rows(W).t()
    if write.stored is None:
        edited = add_columns(x, U, G, write.index)
        y = torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())
        put_back(edited, write.index)
        return y, U, None
    F = U if G is None else U @ G.t()
    y = F @ write.rows(W.t())
    if bias is not None:
        y.add_(bias)
    return y.addmm_(x, W.t()), U, F


def _after(
    x: Tensor, W: Tensor, bias: Tensor | None, read: Side, write: Side, G: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    y = torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())
    if read.count:  # W[rows] x is there already, plus the bias
        U = y[:, : read.count].clone() if read.index is None else y.index_select(1, read.index)
        if bias is not None:
            U -= bias[: read.count] if read.index is None else bias.index_select(0, read.index)
        if read.stored is not None:
            U = torch.cat((x @ read.stored.t(), U), dim=1)
    else:
        assert read.stored is not None
        U = x @ read.stored.t()
    F = U if G is None else U @ G.t()
    y.addmm_(F, write.rows(W.t()))
    return y, U, F


def _read_side(R: Tensor | None, layout: Layout, dtype: torch.dtype) -> Side:
    """The reading side, in the type of the features."""
    return Side(R if R is None or R.dtype == dtype else R.to(dtype), layout.rows, layout.row_index)


def _write_side(L: Tensor | None, layout: Layout, dtype: torch.dtype) -> Side:
    """The writing side, likewise, with the scale of an identity G."""
    if L is not None:
        L = (L if L.dtype == dtype else L.to(dtype)).t()
        L = L if layout.scale == 1 else L * layout.scale
    return Side(L, layout.cols, layout.col_index)


def run_forward(
    x: Tensor, W: Tensor, bias: Tensor | None, R: Tensor | None, L: Tensor | None, G: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """(y[..., o], U[T,p])."""
    dtype = x.dtype
    read, write = _read_side(R, layout, dtype), _write_side(L, layout, dtype)
    g = G if G is None or G.dtype == dtype else G.to(dtype)
    if x.dim() == 2:
        return apply_form(x, W, bias, read, write, g)[:2]
    y, U, _ = apply_form(x.reshape(-1, x.shape[-1]), W, bias, read, write, g)
    return y.view(*x.shape[:-1], W.shape[0]), U


@dataclass(slots=True)
class Saved:
    """What a backward pass needs: x[..., i] only where R learns, U[T,p], and the form."""

    x: Tensor | None
    W: Tensor
    R: Tensor | None
    L: Tensor | None
    G: Tensor | None
    U: Tensor
    layout: Layout


def run_backward(dy: Tensor, saved: Saved, needs: tuple[bool, ...] | list[bool]) -> list[Tensor | None]:
    """[dx, dR, dL, dG] of the form; None where `needs` says that nobody asks."""
    W, R, L, G, dtype = saved.W, saved.R, saved.L, saved.G, dy.dtype
    flat = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
    read, write = _read_side(R, saved.layout, dtype), _write_side(L, saved.layout, dtype)
    g = G if G is None or G.dtype == dtype else G.to(dtype)
    dx = dR = dL = dG = None
    if needs[0]:
        out, V, H = apply_form(flat, W.t(), None, write, read, None if g is None else g.t())
        dx = out if dy.dim() == 2 else out.view(*dy.shape[:-1], W.shape[1])
    else:  # the first layer: no input gradient, only the factors'
        V = flat @ write.rows(W.t()).t()
        H = V if g is None else V @ g
    if needs[1] and saved.x is not None and R is not None:
        assert H is not None  # R is stored, so its gradient's features stood alone
        H1 = H[:, : R.shape[0]] if read.count else H
        dR = H1.t() @ saved.x.reshape(-1, saved.x.shape[-1])
        dR = dR if dR.dtype == R.dtype else dR.to(R.dtype)
    if needs[2] and L is not None:
        # F again: keeping it would cost as much memory as U, and making it costs nothing that can be measured.
        dL = flat.t() @ (saved.U if g is None else saved.U @ g[: L.shape[1]].t())
        dL = dL if dL.dtype == L.dtype else dL.to(L.dtype)
        dL = dL if saved.layout.scale == 1 else dL * saved.layout.scale
    if needs[3] and G is not None:
        dG = V.t() @ saved.U
        dG = dG if dG.dtype == G.dtype else dG.to(G.dtype)
    return [dx, dR, dL, dG]


class _CoreLinear(torch.autograd.Function):
    """The eager face: an autograd function costs the host far less than a registered operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Any, R: Any, L: Any, C: Any, D: Any, maker: FormMaker) -> Tensor:
        G = maker.expand(C, D)
        y, U = run_forward(x, W, bias, R, L, G, maker.layout)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, W, R, L, G, U, C, D)
        ctx.maker = maker
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, R, L, G, U, C, D = ctx.saved_tensors
        n, maker = ctx.needs_input_grad, ctx.maker
        saved = Saved(x, W, R, L, G, U, maker.layout)
        dx, dR, dL, dG = run_backward(dy, saved, (n[0], n[3], n[4], n[5]))
        dC, dD = (None, None) if dG is None else maker.collapse(dG, C, D)
        return dx, None, None, dR, dL, dC, dD, None


def core_linear(x: Tensor, W: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """y = W x + b + Lf G Rf x, differentiable in x, R, L and the core.

    Args:
        x: [..., i].
        W: [o,i], frozen.
        bias: [o] or None, frozen.
        form: the adapter's form.
    """
    R, L, C, D, maker = form
    if torch.compiler.is_compiling():
        lay, G = maker.layout, maker.expand(C, D)
        return linear_op(x, W, bias, R, L, G, lay.rows, lay.row_index, lay.cols, lay.col_index, lay.scale)[0]
    return _CoreLinear.apply(x, W, bias, R, L, C, D, maker)


@torch.library.custom_op("corelora::linear", mutates_args=())
def linear_op(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    R: Tensor | None,
    L: Tensor | None,
    G: Tensor | None,
    rows: int,
    row_index: Tensor | None,
    cols: int,
    col_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same as one node of a compiled graph: (y[..., o], U[T,p])."""
    return run_forward(x, W, bias, R, L, G, Layout(rows, row_index, cols, col_index, scale))


@linear_op.register_fake
def _(x, W, bias, R, L, G, rows, row_index, cols, col_index, scale):
    y = x.new_empty(*x.shape[:-1], W.shape[0])
    T, p = x.numel() // x.shape[-1], (0 if R is None else R.shape[0]) + rows
    return y, x.new_empty(T, p)


@torch.library.custom_op("corelora::linear_backward", mutates_args=())
def linear_backward_op(
    dy: Tensor,
    x: Tensor | None,
    W: Tensor,
    R: Tensor | None,
    L: Tensor | None,
    G: Tensor | None,
    U: Tensor,
    rows: int,
    row_index: Tensor | None,
    cols: int,
    col_index: Tensor | None,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """[dx, dR, dL, dG]; an empty tensor where `needs` says that nobody asks."""
    layout = Layout(rows, row_index, cols, col_index, scale)
    grads = run_backward(dy, Saved(x, W, R, L, G, U, layout), needs)
    return [dy.new_empty(0) if g is None else g for g in grads]


@linear_backward_op.register_fake
def _(dy, x, W, R, L, G, U, rows, row_index, cols, col_index, scale, needs):
    made = [dy.new_empty(*dy.shape[:-1], W.shape[1]) if needs[0] else dy.new_empty(0)]
    for wanted, like in zip(needs[1:], (R, L, G), strict=True):
        made.append(torch.empty_like(like) if wanted and like is not None else dy.new_empty(0))
    return made


def _setup(ctx, inputs, output):
    x, W, _, R, L, G, rows, row_index, cols, col_index, scale = inputs
    ctx.set_materialize_grads(False)
    keep_x = R is not None and R.requires_grad
    ctx.save_for_backward(x if keep_x else None, W, R, L, G, output[1], row_index, col_index)
    ctx.numbers = (rows, cols, scale)


def _backward(ctx, dy, _):
    x, W, R, L, G, U, row_index, col_index = ctx.saved_tensors
    rows, cols, scale = ctx.numbers
    n = ctx.needs_input_grad
    needs = [n[0], n[3], n[4], n[5]]
    grads = linear_backward_op(dy, x, W, R, L, G, U, rows, row_index, cols, col_index, scale, needs)
    dx, dR, dL, dG = (g if wanted else None for g, wanted in zip(grads, needs, strict=True))
    return dx, None, None, dR, dL, dG, None, None, None, None, None


linear_op.register_autograd(_backward, setup_context=_setup)
