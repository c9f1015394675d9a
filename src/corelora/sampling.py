"""Which rows and columns of W[o,i] a Nyström start takes: functions (weight, axis, r, generator) -> indices[r].

`axis` 0 samples rows, 1 columns. Only `norm`, `leverage` and `kmeans` look at the whole weight. The indices are saved
with the adapter and never drawn again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from corelora.outer import Weight, check_finite, truncated_svd
from corelora.registry import SAMPLINGS

SamplingFunction = Callable[[Weight, int, int, torch.Generator], Tensor]


def sampling(name: str) -> Callable[[SamplingFunction], SamplingFunction]:
    """Decorator that adds a function to the SAMPLINGS table under `name`."""

    def add(sample: SamplingFunction) -> SamplingFunction:
        return SAMPLINGS.add(name, sample)

    return add


@sampling("first")
def first(weight: Weight, axis: int, r: int, generator: torch.Generator) -> Tensor:
    """The leading r, what the NLoRA authors' code takes."""
    return torch.arange(r)


@sampling("random")
def random(weight: Weight, axis: int, r: int, generator: torch.Generator) -> Tensor:
    """Uniform without replacement, seeded, sorted."""
    return torch.randperm(weight.shape[axis], generator=generator)[:r].sort().values


@sampling("norm")
def norm(weight: Weight, axis: int, r: int, generator: torch.Generator) -> Tensor:
    """Without replacement, with probabilities proportional to squared norms (Drineas 2006)."""
    scores = _lines(weight, axis).square().sum(dim=1)
    return _draw(scores, r, generator)


@sampling("leverage")
def leverage(weight: Weight, axis: int, r: int, generator: torch.Generator) -> Tensor:
    """Without replacement, with probabilities proportional to rank-r leverage scores (Mahoney 2009)."""
    U, _, _ = truncated_svd(_lines(weight, axis), r, "auto", generator)
    return _draw(U.square().sum(dim=1), r, generator)


@sampling("kmeans")
def kmeans(weight: Weight, axis: int, r: int, generator: torch.Generator, rounds: int = 8) -> Tensor:
    """The line nearest to each of r k-means centres (Zhang 2008), on a seeded random projection to 64 numbers."""
    lines = _lines(weight, axis)
    if lines.shape[1] > 64:
        lines = lines @ torch.randn(lines.shape[1], 64, generator=generator).to(lines) / 8
    centres = lines[torch.randperm(len(lines), generator=generator)[:r].to(lines.device)]
    for _ in range(rounds):
        owner = torch.cdist(lines, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, owner, lines)
        counts = torch.bincount(owner, minlength=r).to(lines)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return _nearest_lines(torch.cdist(centres, lines), r)


def _nearest_lines(distance: Tensor, r: int) -> Tensor:
    """For each centre in turn the nearest line that no earlier centre took: distance[r,n] -> sorted indices[r]."""
    taken: list[int] = []
    for row in distance:
        row = row.clone()
        row[taken] = float("inf")
        taken.append(int(row.argmin()))
    return torch.tensor(taken[:r]).sort().values


def _lines(weight: Weight, axis: int) -> Tensor:
    W = weight.full()
    check_finite(W)
    return W if axis == 0 else W.T


def _draw(scores: Tensor, r: int, generator: torch.Generator) -> Tensor:
    # A tiny floor keeps lines of zeros drawable: without it a weight with fewer than r live lines has no sample.
    scores = scores.cpu().double()
    scores = scores + 1e-12 * scores.sum().clamp(min=1e-300) / len(scores)
    return torch.multinomial(scores, r, replacement=False, generator=generator).sort().values
