"""y = F L, then y += x W^T: whole, or in blocks of rows or columns that would stay in the L2 cache between the two.

    python benchmarks/blocks.py >> docs/results/blocks-h200.jsonl

LLaMA-2-7B's shapes with 8 x 512 tokens in bfloat16, q columns of F; `trans` is the backward direction, whose weight
lies the other way in memory. `after` multiplies x W^T first and adds F L to it. Prints one JSON object a shape:
microseconds, medians of six turns of ten products each, all variants in turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor
from turns import in_turns

TOKENS = 4096
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
BLOCKS = (2, 3, 4)
ROW_TILE, COLUMN_TILE = 128, 256  # of a large product on this GPU: a block is a multiple


def main() -> None:
    """Measure every shape."""
    for o, i in SHAPES:
        for trans in (False, True):
            for q in (128, 256):
                print(json.dumps({"o": o, "i": i, "trans": trans, "q": q, **measure(o, i, trans, q)}), flush=True)


def measure(o: int, i: int, trans: bool, q: int) -> dict[str, float]:
    """Microseconds of each variant for W[o,i]."""
    new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, F, L = new(TOKENS, i), new(TOKENS, q), new(q, o)
    Wt = new(i, o) if trans else new(o, i).t()
    variants: dict[str, Callable[[], Tensor]] = {
        "base": lambda: torch.mm(x, Wt),
        "whole": lambda: torch.mm(F, L).addmm_(x, Wt),
        "after": lambda: torch.mm(x, Wt).addmm_(F, L),
    }
    for n in BLOCKS:
        variants[f"rows{n}"] = lambda n=n: in_rows(x, F, L, Wt, n)  # type: ignore[misc]
    for n in BLOCKS:
        variants[f"cols{n}"] = lambda n=n: in_columns(x, F, L, Wt, n)  # type: ignore[misc]
    return in_turns(variants)


def in_rows(x: Tensor, F: Tensor, L: Tensor, Wt: Tensor, count: int) -> Tensor:
    """Both products for one block of tokens after another."""
    y = x.new_empty(x.shape[0], Wt.shape[1])
    for rows in blocks(x.shape[0], count, ROW_TILE):
        torch.mm(F[rows], L, out=y[rows])
        y[rows].addmm_(x[rows], Wt)
    return y


def in_columns(x: Tensor, F: Tensor, L: Tensor, Wt: Tensor, count: int) -> Tensor:
    """Both products for one block of outputs after another."""
    y = x.new_empty(x.shape[0], Wt.shape[1])
    for columns in blocks(Wt.shape[1], count, COLUMN_TILE):
        part = y[:, columns]
        torch.mm(F, L[:, columns], out=part)
        part.addmm_(x, Wt[:, columns])
    return y


def blocks(length: int, count: int, tile: int) -> list[slice]:
    """About `count` parts of a side, each a multiple of the tile."""
    step = -(-length // (count * tile)) * tile
    return [slice(begin, begin + step) for begin in range(0, length, step)]


if __name__ == "__main__":
    main()
