"""The fused path of an adapted linear layer: y = W x + b + Lf G Rf x (form.py), and its gradients.

Forward and backward are one function: dx = W^T dy + Rf^T G^T Lf^T dy is the forward form of W^T with the factors
swapped. What that function can choose is the order of its products (products.py).

The gradients of the factors are products with the two thin features U = Rf x and V = Lf^T dy:

    dG = V^T U        dR = (V G)^T x        dL = dy^T F

with F = G U, so x is saved only where R learns, and U (T x p) otherwise. On a CPU, which has the memory and waits for
every small product, F is saved too where L learns, and G may stay the two matrices of a nested core.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from corelora.kernels.branches import at_once, branches, nothing
from corelora.kernels.form import Chain, Form, FormMaker, Layout, on_cpu, product
from corelora.kernels.narrow import narrowed
from corelora.kernels.products import Order, Side, Small, apply_form, choose_order, edits, through, write_form


def read_side(R: Tensor | None, layout: Layout) -> Side:
    """The reading side; R in the type of the features."""
    return Side(R, layout.rows, layout.row_index)


def write_side(L: Tensor | None, layout: Layout) -> Side:
    """The writing side, likewise."""
    return Side(L if L is None else L.t(), layout.cols, layout.col_index)


def run_forward(
    x: Tensor, W: Tensor, bias: Tensor | None, R: Tensor | None, L: Tensor | None, chain: Chain, layout: Layout
) -> tuple[Tensor, list[Tensor]]:
    """(y[..., o], [U[T,p], ..., F[T,q]]) as `apply_form` gives them."""
    R, L, chain = _narrow(R, L, chain, x.dtype)
    read, write, small = read_side(R, layout), write_side(L, layout), Small(chain, layout.scale)
    if x.dim() == 2:
        return apply_form(x, W, bias, read, write, small)
    y, features = apply_form(x.reshape(-1, x.shape[-1]), W, bias, read, write, small)
    return y.view(*x.shape[:-1], W.shape[0]), features


@dataclass(slots=True)
class Saved:
    """What a backward pass needs: x[..., i] only where R learns, the features from U[T,p] on (F the last, where there
    is F), and the form."""

    x: Tensor | None
    W: Tensor
    R: Tensor | None
    L: Tensor | None
    chain: Chain
    features: list[Tensor]
    layout: Layout
    has_F: bool = False


def run_backward(
    dy: Tensor, saved: Saved, needs: tuple[bool, ...] | list[bool]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """([dx, dR, dL, dG], [V[T,q], ...]) of the form: gradients, None where `needs` says that nobody asks, and the
    features of dy before and between the matrices of G^T, from which the gradients of a longer chain follow."""
    W, layout = saved.W, saved.layout
    flat = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
    R, L, chain = _narrow(saved.R, saved.L, saved.chain, dy.dtype)
    read, write = read_side(R, layout), write_side(L, layout)
    small = Small(tuple([matrix.t() for matrix in reversed(chain)]), layout.scale)
    if needs[0] and branches(flat) and choose_order(W.shape[1], W.shape[0], write, read, flat) is Order.BEFORE:
        out, rest, features = _in_branches(flat, saved, needs, chain, read, write, small)
    else:
        if needs[0]:
            out, features = apply_form(flat, W.t(), None, write, read, small)
        else:  # the first layer: no input gradient, only the factors'
            out, features = None, through(flat @ write.rows(W.t()).t(), small.chain)
        F = _writing_features(saved, chain, needs)
        rest = [gradient() for gradient in _others(flat, saved, needs, features, F)]
    dx = out if out is None or dy.dim() == 2 else out.view(*dy.shape[:-1], W.shape[1])
    return [dx, *rest], features


def _in_branches(
    dy: Tensor,
    saved: Saved,
    needs: tuple[bool, ...] | list[bool],
    chain: Chain,
    read: Side,
    write: Side,
    small: Small,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor]]:
    """(dx[T,i], [dR, dL, dG], features), with what waits for nothing of one another beside each other."""
    W = saved.W
    edited = edits(dy, read, bool(chain), W.shape[1])
    start, again = lambda: dy @ write.rows(W.t()).t(), partial(_writing_features, saved, chain, needs)
    V, F = at_once([start, again], dy)
    features = [V]
    if chain and (read.stored is not None or not edited):  # else an edit applies G itself
        features = through(V, small.chain)
        small.F = features[-1]
    main = partial(write_form, dy, W.t(), None, V, read, small)
    # An edit of dy is there until the base product has read it.
    (dx, _), *rest = at_once([main, *_others(dy, saved, needs, features, F)], dy, alone=edited and needs[2])
    return dx, rest, features


def _others(
    dy: Tensor, saved: Saved, needs: tuple[bool, ...] | list[bool], features: list[Tensor], F: Tensor | None
) -> list[Callable[[], Tensor | None]]:
    """What computes dR, dL and dG from dy[T,o], its features, and F where L learns; of G only if it is one matrix."""
    calls: list[Callable[[], Tensor | None]] = [nothing] * 3
    scale, kept = saved.layout.scale, saved.features
    if needs[1] and saved.x is not None and saved.R is not None:
        H = features[-1]  # R is stored, so its gradient's features stood alone
        H1 = H[:, : saved.R.shape[0]] if saved.layout.rows else H
        calls[0] = partial(product, H1.t(), saved.x.reshape(-1, saved.x.shape[-1]), saved.R.dtype, scale)
    if F is not None and saved.L is not None:
        calls[1] = partial(product, dy.t(), F, saved.L.dtype, scale)
    if needs[3] and saved.chain:
        calls[2] = partial(product, features[0].t(), kept[0], saved.chain[0].dtype)
    return calls


def _writing_features(saved: Saved, chain: Chain, needs: tuple[bool, ...] | list[bool]) -> Tensor | None:
    """F[T,n] of the n columns of L, where L learns."""
    if not needs[2] or saved.L is None:
        return None
    n, kept = saved.L.shape[1], saved.features
    return kept[-1][:, :n] if saved.has_F else through(kept[0], _rows_of(chain, n))[-1][:, :n]


def _rows_of(chain: Chain, count: int) -> Chain:
    """The first `count` rows of the product."""
    return (*chain[:-1], chain[-1][:count]) if chain else chain


def _prepared(form: Form, cpu: bool, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Chain, Layout]:
    """R, L, the chain of G and the layout that suit the device."""
    R, L, C, D, maker = form
    if not cpu:
        G = maker.expand(C, D)
        return R, L, () if G is None else (G,), maker.layout
    # Wider factors are made narrow once for both passes, which on a GPU would be kept memory.
    return *_narrow(R, L, maker.chain(C, D), dtype), maker.cpu_layout


def _narrow(
    R: Tensor | None, L: Tensor | None, chain: Chain, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Chain]:
    """R, L and the chain of G in the type of the features."""
    (R, L, *matrices), _ = narrowed((R, L, *chain), dtype)
    return R, L, tuple([m for m in matrices if m is not None])


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its search through all arguments for functorch's wrappers, of which there are none where
    no transform of functorch's is active. For a small model the search costs the host as much as a product."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def below_autograd() -> AbstractContextManager[Any]:
    """The time of an autograd function's own products: no product looks at what autograd would record of it.

    Nothing is recorded there anyway; a fifth of what a small product costs the host is that look.
    """
    transformed = torch._C._are_functorch_transforms_active()
    return nullcontext() if transformed else torch._C._AutoDispatchBelowAutograd()


class _CoreLinear(torch.autograd.Function):
    """The eager face: an autograd function costs the host far less than a registered operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Any, R: Any, L: Any, C: Any, D: Any, maker: FormMaker) -> Tensor:
        ctx.maker, ctx.on_cpu = maker, on_cpu(x)
        with below_autograd():
            R, L, chain, ctx.layout = _prepared(Form(R, L, C, D, maker), ctx.on_cpu, x.dtype)
            y, features = run_forward(x, W, bias, R, L, chain, ctx.layout)
        needs_x, needs_F = ctx.needs_input_grad[3:5]
        ctx.links = len(chain)
        if not (ctx.on_cpu and needs_F):
            # On a GPU F would cost as much memory as U, and making it again costs nothing that can be measured.
            features = features[: max(1, ctx.links) if ctx.on_cpu else 1]
        ctx.save_for_backward(x if needs_x else None, W, R, L, C, D, *chain, *features)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        # A second derivative would miss what goes through the features: it is refused, not wrong.
        return once_differentiable(_gradients)(ctx, dy) if torch.is_grad_enabled() else _gradients(ctx, dy)


_apply_core_linear = direct_apply(_CoreLinear)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors  # under checkpointing they are made again here, by passes that autograd must see
    with below_autograd():
        return _from_kept(ctx, kept, dy)


def _from_kept(ctx: Any, kept: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    x, W, R, L, C, D, *rest = kept
    n, maker, features = ctx.needs_input_grad, ctx.maker, rest[ctx.links :]
    saved = Saved(x, W, R, L, tuple(rest[: ctx.links]), features, ctx.layout, has_F=ctx.on_cpu)
    (dx, dR, dL, dG), V = run_backward(dy, saved, (n[0], n[3], n[4], n[5] and not ctx.on_cpu))
    dC = dD = None
    if n[5] and ctx.on_cpu:
        dC, dD = maker.core_gradients(V, features, C, D)
    elif dG is not None:
        dC, dD = maker.collapse(dG, C, D)
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
        _join_siblings()
        lay, G = maker.layout, maker.expand(C, D)
        return linear_op(x, W, bias, R, L, G, lay.rows, lay.row_index, lay.cols, lay.col_index, lay.scale)[0]
    if not torch.is_grad_enabled():
        R, L, chain, layout = _prepared(form, on_cpu(x), x.dtype)
        return run_forward(x, W, bias, R, L, chain, layout)[0]
    transformed = torch._C._are_functorch_transforms_active()
    apply = _CoreLinear.apply if transformed else _apply_core_linear
    return apply(x, W, bias, R, L, C, D, maker)


@torch.compiler.assume_constant_result
def _join_siblings() -> None:
    """Runs while a compiler looks at an adapted layer; until then nobody waits for inductor's import."""
    from corelora.kernels import compiled

    compiled.install()


def operation(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as an operation that compiled graphs hold as one node.

    `torch.library.custom_op` would look at every call for what the schema promises already, which takes the host as
    long as two products.
    """

    def define(run: Callable[..., Any]) -> Any:
        torch.library.define(name, torch.library.infer_schema(run, mutates_args=()))
        torch.library.impl(name, "default", run)
        return getattr(torch.ops.corelora, name.partition("::")[2]).default

    return define


@operation("corelora::linear")
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
    layout = Layout(rows, row_index, cols, col_index, scale)
    y, features = run_forward(x, W, bias, R, L, () if G is None else (G,), layout)
    return y, features[0]


@torch.library.register_fake("corelora::linear")
def _(x, W, bias, R, L, G, rows, row_index, cols, col_index, scale):
    y = x.new_empty(*x.shape[:-1], W.shape[0])
    T, p = x.numel() // x.shape[-1], (0 if R is None else R.shape[0]) + rows
    return y, x.new_empty(T, p)


@operation("corelora::linear_backward")
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
    grads, _ = run_backward(dy, Saved(x, W, R, L, () if G is None else (G,), [U], layout), needs)
    return [dy.new_empty(0) if g is None else g for g in grads]


@torch.library.register_fake("corelora::linear_backward")
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


torch.library.register_autograd("corelora::linear", _backward, setup_context=_setup)
