"""In which order a backward pass reads the gradient dy[T,o] of each output: for V = dy L, for dL = dy^T F and for dx.

    python benchmarks/reuse.py >> docs/results/reuse-h200.jsonl

What is read twice in a row may still be in the L2 cache. `apart` is all V, then dx, then all dL; `pairs` V and dL of
one layer after the other, then dx; `halves` likewise, each in two halves of the rows; `thrice` V, dL and the base's
product of one layer after the other, then the adapters' part of dx. `base` is the base's products alone. LLaMA-2-7B's
shapes with 8 x 512 tokens in bfloat16, r = 128, layers that read one input together, recorded as CUDA graphs. Prints
one JSON object a group of layers: microseconds, medians of six turns of ten passes each, all orders in turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from branches import GROUPS, graph_of
from torch import Tensor
from turns import in_turns

TOKENS, RANK = 4096, 128


@dataclass
class Layer:
    """dy[T,o] of one layer, its W[o,i], L[o,r] and F[T,r]."""

    dy: Tensor
    W: Tensor
    L: Tensor
    F: Tensor


def main() -> None:
    """Measure every group."""
    for name, (i, widths) in GROUPS.items():
        print(json.dumps({"layers": name, **measure(i, widths)}), flush=True)


def measure(i: int, widths: tuple[int, ...]) -> dict[str, float]:
    """Microseconds of each order."""
    new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    layers = [Layer(new(TOKENS, o), new(o, i), new(o, RANK), new(TOKENS, RANK)) for o in widths]
    R = new(RANK * len(widths), i)
    orders: dict[str, Callable[[Sequence[Layer], Tensor], object]] = {
        "base": lambda layers, R: base_products(layers, None),
        "apart": apart,
        "pairs": pairs,
        "halves": halves,
        "thrice": thrice,
    }
    return in_turns({name: graph_of(lambda order=order: order(layers, R)) for name, order in orders.items()})  # type: ignore[misc]


def base_products(layers: Sequence[Layer], dx: Tensor | None) -> Tensor:
    """dx plus dy W of each layer."""
    for m in layers:
        dx = m.dy @ m.W if dx is None else dx.addmm_(m.dy, m.W)
    assert dx is not None
    return dx


def thin(m: Layer) -> tuple[Tensor, Tensor]:
    """V and dL of one layer."""
    return m.dy @ m.L, m.dy.t() @ m.F


def apart(layers: Sequence[Layer], R: Tensor) -> object:
    """All V, then dx, then all dL."""
    H = torch.cat([m.dy @ m.L for m in layers], dim=1)
    return base_products(layers, H @ R), [m.dy.t() @ m.F for m in layers]


def pairs(layers: Sequence[Layer], R: Tensor) -> object:
    """V and dL of one layer after the other, then dx."""
    both = [thin(m) for m in layers]
    return base_products(layers, torch.cat([V for V, _ in both], dim=1) @ R), both


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
    return base_products(layers, torch.cat(Vs, dim=1) @ R), dLs


def thrice(layers: Sequence[Layer], R: Tensor) -> object:
    """V, dL and the base's product of one layer after the other, then the adapters' part of dx."""
    dx, both = None, []
    for m in layers:
        both.append(thin(m))
        dx = base_products([m], dx)
    assert dx is not None
    return dx.addmm_(torch.cat([V for V, _ in both], dim=1), R), both


if __name__ == "__main__":
    main()
