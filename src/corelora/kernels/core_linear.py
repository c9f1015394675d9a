"""The fused path of an adapted linear layer: y = W x + b + Lf G Rf x (form.py), and its gradients.

Forward and backward are one function: dx = W^T dy + Rf^T G^T Lf^T dy is the forward form of W^T with the factors
swapped. What that function can choose is the order of its products (`Order`):

- AFTER   the base product first, the adapter added to its output: one more pass over the output. A slice of W that
          reads the input is then free, being some of the base product's own outputs.
- BEFORE  the adapter's part first, the base product accumulated into it (beta = 1 of the matrix product), and columns
          of W by an edit: W (x + scatter(f)) = W x + W[:, cols] f, so r columns of x change for the time of the base
          product and are put back bit for bit (edit.py).

The gradients of the factors are products with the two thin features U = Rf x and V = Lf^T dy:

    dG = V^T U        dR = (V G)^T x        dL = dy^T (U G^T)

so `x` is saved only where R learns, and U (T x p) otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    @property
    def n1(self) -> int:
        """How many stored rows there are."""
        return 0 if self.stored is None else self.stored.shape[0]

    def slice_of(self, W: Tensor) -> Tensor:
        """The slice W[index, :] of W[n, side]."""
        return W[: self.count] if self.index is None else W.index_select(0, self.index)


def choose_order(o: int, i: int, read: Side, write: Side, x: Tensor) -> Order:
    """The cheaper order for x[T,i] to y[T,o], by the bytes that each moves beyond the base product.

    Reading the input for a slice's U costs T i, a second pass over the output 2 T o (read and write); the columns of an
    edit are few. On a CPU the base product is not bound by memory and AFTER is never worse.
    """
    if write.count and not can_edit(x):
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(y[T,o], U[T,p], F[T,q]) with U = Rf x, F = G U and y = W x + b + Lf F.

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
    U = features(x, W, read)
    F = U if G is None else U @ G.T
    backup = add_columns(x, F[:, write.n1 :], write.index) if write.count else None
    if write.stored is not None:
        y = F[:, : write.n1] @ write.stored
        y = y if bias is None else y.add_(bias)
        y.addmm_(x, W.T)
    else:
        y = torch.mm(x, W.T) if bias is None else torch.addmm(bias, x, W.T)
    if backup is not None:
        put_back(x, backup, write.index)
    return y, U, F


def features(x: Tensor, W: Tensor, read: Side) -> Tensor:
    """U = Rf x: x[T,i] to [T,p], both parts into one buffer."""
    if not read.count:
        assert read.stored is not None
        return x @ read.stored.T
    if read.stored is None:
        return x @ read.slice_of(W).T
    U = x.new_empty(x.shape[0], read.n1 + read.count)
    torch.mm(x, read.stored.T, out=U[:, : read.n1])
    torch.mm(x, read.slice_of(W).T, out=U[:, read.n1 :])
    return U


def _after(
    x: Tensor, W: Tensor, bias: Tensor | None, read: Side, write: Side, G: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.mm(x, W.T) if bias is None else torch.addmm(bias, x, W.T)
    parts = [] if read.stored is None else [x @ read.stored.T]
    if read.count:  # W[rows] x is there already, plus the bias
        picked = y[:, : read.count].clone() if read.index is None else y.index_select(1, read.index)
        if bias is not None:
            picked -= bias[: read.count] if read.index is None else bias.index_select(0, read.index)
        parts.append(picked)
    U = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    F = U if G is None else U @ G.T
    if write.stored is not None:
        y.addmm_(F[:, : write.n1], write.stored)
    if write.count:
        y.addmm_(F[:, write.n1 :], write.slice_of(W.T))
    return y, U, F


def _sides(R: Tensor | None, L: Tensor | None, layout: Layout, dtype: torch.dtype) -> tuple[Side, Side]:
    """The reading and the writing side, in the type of the features."""
    R = R if R is None or R.dtype == dtype else R.to(dtype)
    L = L if L is None or L.dtype == dtype else L.to(dtype)
    read = Side(R, layout.rows, layout.row_index)
    write = Side(None if L is None else L.T, layout.cols, layout.col_index)
    return read, write if layout.scale == 1 or write.stored is None else replace(
        write, stored=write.stored * layout.scale
    )


def run_forward(
    x: Tensor, W: Tensor, bias: Tensor | None, R: Tensor | None, L: Tensor | None, G: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """(y[..., o], U[T,p])."""
    read, write = _sides(R, L, layout, x.dtype)
    g = G if G is None or G.dtype == x.dtype else G.to(x.dtype)
    y, U, _ = apply_form(x.reshape(-1, x.shape[-1]), W, bias, read, write, g)
    return y.view(*x.shape[:-1], W.shape[0]), U


@dataclass
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
    W, R, L, U = saved.W, saved.R, saved.L, saved.U
    flat = dy.reshape(-1, dy.shape[-1])
    read, write = _sides(R, L, saved.layout, dy.dtype)
    g = saved.G if saved.G is None or saved.G.dtype == dy.dtype else saved.G.to(dy.dtype)
    dx = dR = dL = dG = None
    if needs[0]:
        out, V, H = apply_form(flat, W.T, None, write, read, None if g is None else g.T)
        dx = out.view(*dy.shape[:-1], W.shape[1])
    else:  # the first layer: no input gradient, only the factors'
        V = features(flat, W.T, write)
        H = V if g is None else V @ g
    if needs[1] and saved.x is not None and R is not None:
        dR = (H[:, : read.n1].T @ saved.x.reshape(-1, saved.x.shape[-1])).to(R.dtype)
    if needs[2] and L is not None:
        F = U if g is None else U @ g[: write.n1].T
        dL = (flat.T @ F).to(L.dtype)
        dL = dL if saved.layout.scale == 1 else dL * saved.layout.scale
    if needs[3] and saved.G is not None:
        dG = (V.T @ U).to(saved.G.dtype)
    return [dx, dR, dL, dG]


class _CoreLinear(torch.autograd.Function):
    """The eager face: an autograd function costs the host far less than a registered operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Any, R: Any, L: Any, C: Any, maker: FormMaker) -> Tensor:
        G = maker.expand(C)
        y, U = run_forward(x, W, bias, R, L, G, maker.layout)
        keep_x = R is not None and ctx.needs_input_grad[3]
        ctx.save_for_backward(x if keep_x else None, W, R, L, G, U)
        ctx.maker = maker
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, R, L, G, U = ctx.saved_tensors
        n = ctx.needs_input_grad
        saved = Saved(x, W, R, L, G, U, ctx.maker.layout)
        dx, dR, dL, dG = run_backward(dy, saved, (n[0], n[3], n[4], n[5]))
        return dx, None, None, dR, dL, None if dG is None else ctx.maker.collapse(dG), None


def core_linear(x: Tensor, W: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """y = W x + b + Lf G Rf x, differentiable in x, R, L and the core.

    Args:
        x: [..., i].
        W: [o,i], frozen.
        bias: [o] or None, frozen.
        form: the adapter's form.
    """
    maker = form.maker
    if torch.compiler.is_compiling():
        lay, G = maker.layout, maker.expand(form.C)
        return linear_op(x, W, bias, form.R, form.L, G, lay.rows, lay.row_index, lay.cols, lay.col_index, lay.scale)[0]
    return _CoreLinear.apply(x, W, bias, form.R, form.L, form.C, maker)


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
    p = (0 if R is None else R.shape[0]) + rows
    return y, x.new_empty(x.numel() // x.shape[-1], p)


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
