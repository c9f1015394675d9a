"""In which order the passes of an adapter's layers read and write what is larger than the L2 cache.

    python benchmarks/reuse.py >> docs/results/reuse-h200.jsonl

Backward, where each dy[T,o] is read for V = dy L, for dL = dy^T F and for dx: `apart` is all V, then dx, then all dL;
`beside` has the dL beside dx on other streams; `pairs` is V and dL of one layer after the other, then dx; `halves`
likewise, each in two halves of the rows; `thrice` V, dL and the base's product of one layer after the other, then the
adapters' part of dx. `base` is the base's products alone.

Forward, from F[T,r] on: `first` writes F L^T and adds x W^T to it, `beside` likewise with the later layers' F L^T on
other streams; `second` is the other way round; `rows` is `first` in two halves of the rows and `columns` of each
output's columns, as blocks.py has them; `wide` copies x beside F and multiplies both
with W beside L, as if those lay side by side in memory.

LLaMA-2-7B's shapes with 8 x 512 tokens in bfloat16, r = 128, layers that read one input together, recorded as CUDA
graphs. Prints one JSON object a group of layers and pass: microseconds, medians of six turns of ten passes each, all
orders in turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from blocks import in_columns, in_rows
from branches import GROUPS, graph_of
from torch import Tensor
from turns import in_turns

from corelora.kernels.branches import at_once

TOKENS, RANK = 4096, 128


@dataclass
class Layer:
    """x[T,i] and dy[T,o] of one layer, its W[o,i], L[o,r] and F[T,r], and [W L] in one."""

    x: Tensor
    dy: Tensor
    W: Tensor
    L: Tensor
    F: Tensor
    wide: Tensor


def main() -> None:
    """Measure every group."""
    for name, (i, widths) in GROUPS.items():
        layers, R = layers_of(i, widths)
        for which, orders in {"forward": forward, "backward": backward}.items():
            times = in_turns({order: graph_of(work) for order, work in orders(layers, R).items()})
            print(json.dumps({"layers": name, "pass": which, **times}), flush=True)


def layers_of(i: int, widths: tuple[int, ...]) -> tuple[list[Layer], Tensor]:
    """Layers on one x, and R of all."""
    new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x = new(TOKENS, i)
    layers = []
    for o in widths:
        wide = new(o, i + RANK)
        own = (wide[:, :i].contiguous(), new(o, RANK), new(TOKENS, RANK))
        layers.append(Layer(x, new(TOKENS, o), *own, wide))
    return layers, new(RANK * len(widths), i)


Works = dict[str, Callable[[], object]]


def backward(layers: Sequence[Layer], R: Tensor) -> Works:
    """The orders of a backward pass."""
    orders = {"apart": apart, "beside": beside, "pairs": pairs, "halves": halves, "thrice": thrice}
    works: Works = {name: lambda order=order: order(layers, R) for name, order in orders.items()}  # type: ignore[misc]
    return {"base": lambda: base_products(layers, None), **works}


def base_products(layers: Sequence[Layer], dx: Tensor | None) -> Tensor:
    """dx plus dy W of each layer."""
    for m in layers:
        dx = m.dy @ m.W if dx is None else dx.addmm_(m.dy, m.W)
    assert dx is not None
    return dx


def thin(m: Layer) -> tuple[Tensor, Tensor]:
    """V and dL of one layer."""
    return m.dy @ m.L, m.dy.t() @ m.F


def side_by_side(Vs: Sequence[Tensor]) -> Tensor:
    """V of all layers as one matrix."""
    return Vs[0] if len(Vs) == 1 else torch.cat(tuple(Vs), dim=1)


def apart(layers: Sequence[Layer], R: Tensor) -> object:
    """All V, then dx, then all dL."""
    H = side_by_side([m.dy @ m.L for m in layers])
    return base_products(layers, H @ R), [m.dy.t() @ m.F for m in layers]


def beside(layers: Sequence[Layer], R: Tensor) -> object:
    """All V on streams of their own, then dx and all dL so."""
    H = side_by_side(at_once([lambda m=m: m.dy @ m.L for m in layers], R))  # type: ignore[misc]
    others = [lambda m=m: m.dy.t() @ m.F for m in layers]  # type: ignore[misc]
    return at_once([lambda: base_products(layers, H @ R), *others], R)


def pairs(layers: Sequence[Layer], R: Tensor) -> object:
    """V and dL of one layer after the other, then dx."""
    both = [thin(m) for m in layers]
    return base_products(layers, side_by_side([V for V, _ in both]) @ R), both


def halves(layers: Sequence[Layer], R: Tensor) -> object:
    """The same, each in two halves of the rows."""
    Vs, dLs = [], []
    for m in layers:
        V, dL = torch.empty_like(m.F), None
        for dy, F, part in zip(m.dy.chunk(2), m.F.chunk(2), V.chunk(2), strict=True):
            torch.mm(dy, m.L, out=part)
            dL = dy.t() @ F if dL is None else dL.addmm_(dy.t(), F)
        Vs.append(V)
        dLs.append(dL)
    return base_products(layers, side_by_side(Vs) @ R), dLs


def thrice(layers: Sequence[Layer], R: Tensor) -> object:
    """V, dL and the base's product of one layer after the other, then the adapters' part of dx."""
    dx, both = None, []
    for m in layers:
        both.append(thin(m))
        dx = base_products([m], dx)
    assert dx is not None
    return dx.addmm_(side_by_side([V for V, _ in both]), R), both


def forward(layers: Sequence[Layer], R: Tensor) -> Works:
    """The orders of a forward pass."""
    orders = {"base": base, "first": first, "second": second, "rows": rows, "columns": columns, "beside": starts}
    works: Works = {name: lambda order=order: order(layers) for name, order in orders.items()}  # type: ignore[misc]
    return {**works, "wide": lambda: wide(layers)}


def base(layers: Sequence[Layer]) -> object:
    """The base's products alone."""
    return [m.x @ m.W.t() for m in layers]


def first(layers: Sequence[Layer]) -> object:
    """F L^T, then the base's product added to it."""
    return [(m.F @ m.L.t()).addmm_(m.x, m.W.t()) for m in layers]


def starts(layers: Sequence[Layer]) -> object:
    """The same, with the later layers' F L^T beside the first base product."""
    y = layers[0].F @ layers[0].L.t()
    calls = [lambda m=m: m.F @ m.L.t() for m in layers[1:]]  # type: ignore[misc]
    ys = at_once([lambda: y.addmm_(layers[0].x, layers[0].W.t()), *calls], y)
    return [y, *(start.addmm_(m.x, m.W.t()) for start, m in zip(ys[1:], layers[1:], strict=True))]


def second(layers: Sequence[Layer]) -> object:
    """The base's product, then F L^T added to it."""
    return [(m.x @ m.W.t()).addmm_(m.F, m.L.t()) for m in layers]


def rows(layers: Sequence[Layer]) -> object:
    """`first` in two halves of the rows."""
    return [in_rows(m.x, m.F, m.L.t(), m.W.t(), 2) for m in layers]


def columns(layers: Sequence[Layer]) -> object:
    """`first` in two halves of the columns."""
    return [in_columns(m.x, m.F, m.L.t(), m.W.t(), 2) for m in layers]


def wide(layers: Sequence[Layer]) -> object:
    """x and F in one matrix, times W and L in one."""
    ys = []
    for m in layers:
        both = torch.cat((m.x, m.F), dim=1)
        ys.append(both @ m.wide.t())
    return ys


if __name__ == "__main__":
    main()
