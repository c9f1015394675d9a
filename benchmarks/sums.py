"""One product whose sums run over several pairs of matrices, y = A1 B1 + A2 B2 + .., beside the library's products.

    python benchmarks/sums.py >> docs/results/sums-h200.jsonl

An adapter's part of an output is written by one product of the library's and read back by the next one, which adds the
base's to it; an input gradient of three layers is written and read four times. A product that goes on with its sums
over the next pair writes once. The kernel is for Hopper, in Gluon (Triton's language of tiles in shared memory): a tile
of 128 x 256 numbers a multiprocessor at a time, whose operands the bulk copies bring ahead of the tensor cores.

Prints one JSON object a group of layers and pass: microseconds of `base` (the base's products alone), `library` (as
the adapter's path has it) and of each tile and band of tiles; medians of six turns of ten recorded plays, all in turns.
LLaMA-2-7B's shapes, 8 x 512 tokens, bfloat16, r = 128. Every variant is first held against the library's values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product as every
from typing import Any

import torch
import triton
from branches import GROUPS, graph_of
from reuse import Layer, base, base_products, first, layers_of, side_by_side
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from turns import in_turns

DEPTH, BUFFERS, WARPS, PAIRS = 64, 3, 8, 4
TILES = {"128 x 256": (128, 256), "256 x 128": (256, 128)}
BANDS = (4, 8, 16)  # rows of tiles that are gone through before the next ones
CLOSE = 0.02  # of the largest number, in bfloat16


@gluon.jit
def _place(t, down, across, BAND: gl.constexpr):
    """Row and column of the t-th tile: down each column of a band before the next column."""
    first_row = t // (BAND * across) * BAND
    height = gl.maximum(gl.minimum(down - first_row, BAND), 1)  # past the last tile nothing is asked for
    within = t - first_row * across
    return first_row + within % height, within // height


@gluon.jit
def _fetch(a, b, m, n, k, bar, to_a, to_b, pred, ALONG: gl.constexpr):
    """Ask for the tiles of one pair at depth k."""
    tma.async_copy_global_to_shared(a, [m, k], bar, to_a, pred)
    if ALONG:
        tma.async_copy_global_to_shared(b, [n, k], bar, to_b, pred)
    else:
        tma.async_copy_global_to_shared(b, [k, n], bar, to_b, pred)


@gluon.jit
def _fetch_step(step, m, n, bar, to_a, to_b, pred, pairs, ends, COUNT: gl.constexpr, ALONG: gl.constexpr):
    """Ask for the tiles of one step of the sums: it is of one pair, the others' copies are skipped."""
    DEPTH: gl.constexpr = pairs[0].block_type.shape[1]
    mbarrier.expect(bar, pairs[0].block_type.nbytes + pairs[1].block_type.nbytes, pred=pred)
    for i in gl.static_range(COUNT):
        begin = 0 if i == 0 else ends[i - 1]
        own = pred & (step >= begin) & (step < ends[i])
        _fetch(pairs[2 * i], pairs[2 * i + 1], m, n, (step - begin) * DEPTH, bar, to_a, to_b, own, ALONG)


@gluon.jit
def _onward(tile, step, m, n, steps, programs, down, across, BAND: gl.constexpr):
    """The next step: of the same tile, or the first one of this program's next tile."""
    step += 1
    if step == steps:
        step = 0
        tile += programs
        m, n = _place(tile, down, across, BAND)
    return tile, step, m, n


@gluon.jit
def _write(acc, out, y, m, n):
    """Send a finished tile, once the one before it is gone from `out`."""
    tma.store_wait(pendings=0)
    out.store(acc.to(y.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(y, [m * y.block_type.shape[0], n * y.block_type.shape[1]], out)


@gluon.jit
def _sums(a0, b0, a1, b1, a2, b2, a3, b3, end0, end1, end2, end3, y, COUNT: gl.constexpr, ALONG: gl.constexpr,
          BUFFERS: gl.constexpr, BAND: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """A multiprocessor's tiles, one after the other; the next one's first copies are asked for before its turn."""
    pairs, ends = (a0, b0, a1, b1, a2, b2, a3, b3), (end0, end1, end2, end3)
    ROWS: gl.constexpr = y.block_type.shape[0]
    COLUMNS: gl.constexpr = y.block_type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, COLUMNS, 16]
    )
    a, b = pairs[0], pairs[1]
    a_bufs = gl.allocate_shared_memory(a.dtype, [BUFFERS] + a.block_type.shape, a.layout)  # noqa: RUF005
    b_bufs = gl.allocate_shared_memory(b.dtype, [BUFFERS] + b.block_type.shape, b.layout)  # noqa: RUF005
    out = gl.allocate_shared_memory(y.dtype, y.block_type.shape, y.layout)
    bars = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(bars.index(i), count=1)
    down, across = gl.cdiv(y.shape[0], ROWS), gl.cdiv(y.shape[1], COLUMNS)
    programs, count = gl.num_programs(0), down * across
    steps = ends[COUNT - 1]
    # What is asked for next: which tile, and at which of its steps.
    ask, ask_step = gl.program_id(0), 0
    m, n = _place(ask, down, across, BAND)
    for i in gl.static_range(BUFFERS - 1):
        _fetch_step(ask_step, m * ROWS, n * COLUMNS, bars.index(i), a_bufs.index(i), b_bufs.index(i), ask < count,
                    pairs, ends, COUNT, ALONG)  # fmt: skip
        ask, ask_step, m, n = _onward(ask, ask_step, m, n, steps, programs, down, across, BAND)
    tile, slot, free, phase = gl.program_id(0), 0, BUFFERS - 1, 0
    acc = gl.zeros((ROWS, COLUMNS), dtype=gl.float32, layout=layout)
    for _ in range(gl.cdiv(count - tile, programs)):
        for step in range(steps):
            mbarrier.wait(bars.index(slot), phase)
            right = b_bufs.index(slot)
            if ALONG:
                right = right.permute((1, 0))
            acc = warpgroup_mma(a_bufs.index(slot), right, acc, use_acc=step > 0, is_async=True)
            # The product before this one is done: what it read is free.
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            _fetch_step(ask_step, m * ROWS, n * COLUMNS, bars.index(free), a_bufs.index(free), b_bufs.index(free),
                        ask < count, pairs, ends, COUNT, ALONG)  # fmt: skip
            ask, ask_step, m, n = _onward(ask, ask_step, m, n, steps, programs, down, across, BAND)
            free = gl.where(free == BUFFERS - 1, 0, free + 1)
            phase = gl.where(slot == BUFFERS - 1, phase ^ 1, phase)
            slot = gl.where(slot == BUFFERS - 1, 0, slot + 1)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        to_m, to_n = _place(tile, down, across, BAND)
        _write(acc, out, y, to_m, to_n)
        tile += programs
    tma.store_wait(pendings=0)


def sums(pairs: Sequence[tuple[Tensor, Tensor]], along: bool, tile: tuple[int, int], band: int) -> Tensor:
    """y[T,o], the sum of A B over up to four pairs.

    Args:
        pairs: A[T,k] and B, bfloat16, rows of which are contiguous.
        along: B is [o,k], as a weight lies; else [k,o].
        tile: rows and columns of y that a multiprocessor makes at a time.
        band: rows of tiles that are gone through before the next ones.
    """
    T, o = pairs[0][0].shape[0], pairs[0][1].shape[0 if along else 1]
    y = pairs[0][0].new_empty(T, o)
    rows, columns = tile
    words, ends = [], []
    for A, B in pairs:
        words += [_described(A, (rows, DEPTH)), _described(B, (columns, DEPTH) if along else (DEPTH, columns))]
        ends.append((ends[-1] if ends else 0) + triton.cdiv(A.shape[1], DEPTH))
    words += words[:2] * (PAIRS - len(pairs))
    ends += ends[-1:] * (PAIRS - len(pairs))
    programs = min(triton.cdiv(T, rows) * triton.cdiv(o, columns), _processors(y.device))
    _sums[(programs,)](*words, *ends, _described(y, tile), len(pairs), along, BUFFERS, band, num_warps=WARPS)
    return y


def _described(t: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, list(block), gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16))


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


Sums = Callable[[Sequence[tuple[Tensor, Tensor]], bool], Tensor]


def forward(layers: Sequence[Layer], one: Sums) -> list[Tensor]:
    """y = x W^T + F L^T of each layer."""
    return [one([(m.x, m.W), (m.F, m.L)], True) for m in layers]


def backward(layers: Sequence[Layer], R: Tensor, one: Sums) -> list[Tensor]:
    """dx = dy1 W1 + dy2 W2 + .. + [F1 F2 ..] R, with F in the place of H."""
    return [one([*((m.dy, m.W) for m in layers), (side_by_side([m.F for m in layers]), R)], False)]


def library(layers: Sequence[Layer], R: Tensor) -> list[Tensor]:
    """The same by products that are added to one another."""
    return [base_products(layers, side_by_side([m.F for m in layers]) @ R)]


def main() -> None:
    """Measure every group."""
    ways = {
        f"{label}, {band}": partial(sums, tile=tile, band=band) for (label, tile), band in every(TILES.items(), BANDS)
    }
    for name, (i, widths) in GROUPS.items():
        layers, R = layers_of(i, widths)
        forwards = {label: partial(forward, layers, one) for label, one in ways.items()}
        report(name, "forward", partial(base, layers), partial(first, layers), forwards)
        backwards = {label: partial(backward, layers, R, one) for label, one in ways.items()}
        report(name, "backward", partial(base_products, layers, None), partial(library, layers, R), backwards)


def report(
    name: str,
    which: str,
    alone: Callable[[], object],
    theirs: Callable[[], object],
    ours: dict[str, Callable[[], object]],
) -> None:
    """Hold every variant against the library's values, then time all."""
    errors = {label: _error(work(), theirs()) for label, work in ours.items()}
    print(json.dumps({"layers": name, "pass": which, "errors": errors}), flush=True)
    if max(errors.values()) > CLOSE:
        raise SystemExit("a variant's values are not the library's")
    times = in_turns({label: graph_of(work) for label, work in {"base": alone, "library": theirs, **ours}.items()})
    print(json.dumps({"layers": name, "pass": which, **times}), flush=True)


def _error(found: Any, known: Any) -> float:
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in zip(found, known, strict=True)
    )


if __name__ == "__main__":
    main()
