"""The layers of a group in one pass: their weights and factors, in the type of the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corelora.kernels.form import Layout
from corelora.kernels.narrow import narrowed
from corelora.kernels.products import Small


@dataclass(slots=True)
class Member:
    """One layer of a group in one pass.

    Attributes:
        W: [o,i].
        bias: [o] or None.
        R, L: as in core_linear.py, in the type of the features.
        small: G, likewise.
        layout: as in core_linear.py.
        wants_R, wants_L, wants_G: the types that their gradients have; None where they don't learn.
    """

    W: Tensor
    bias: Tensor | None
    R: Tensor | None
    L: Tensor | None
    small: Small
    layout: Layout
    wants_R: torch.dtype | None
    wants_L: torch.dtype | None
    wants_G: torch.dtype | None

    @property
    def width(self) -> int:
        """How many features it reads."""
        return _width(self.R, self.layout)


@dataclass(slots=True)
class Team:
    """The layers of a group in one pass.

    Attributes:
        members: in the order of their calls.
        stored: all their R, one below the other, where casting has put them so.
        grams: all their G [n,q,p], where they came so.
    """

    members: list[Member]
    stored: Tensor | None
    grams: Tensor | None = None

    @property
    def widths(self) -> list[int]:
        """How many features each reads."""
        return [m.width for m in self.members]

    def joined(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows that read the input as one matrix."""
        if self.stored is not None and [id(row) for row in rows] == [id(m.R) for m in self.members]:
            return self.stored
        return rows[0] if len(rows) == 1 else torch.cat(tuple(rows))


def make_team(
    given: Sequence[Sequence[Any]],
    grams: Sequence[Tensor | None],
    layouts: Sequence[Layout],
    dtype: torch.dtype,
    needs: Sequence[Sequence[bool]],
) -> Team:
    """The layers in one pass.

    Args:
        given: W, bias, R, L and the core (and what follows, which is not looked at) of each.
        grams: G of each, or None.
        layouts: of each.
        dtype: that all factors take.
        needs: whether R, L and the core of each learn.
    """
    count, stored = len(given), [t[2] for t in given]
    cast, block = narrowed([*stored, *(t[3] for t in given), *grams], dtype)
    members = [
        Member(
            *(t[0], t[1], R, L),
            Small(() if G is None else (G,), layout.scale),
            layout,
            t[2].dtype if need[0] and R is not None else None,
            t[3].dtype if need[1] and L is not None else None,
            t[4].dtype if need[2] and t[4] is not None else None,
        )
        for t, R, L, G, layout, need in zip(
            given, cast[:count], cast[count : 2 * count], cast[2 * count :], layouts, needs, strict=True
        )
    ]
    if block is None or any(R is None or R.dtype == dtype for R in stored):
        return Team(members, None)
    width = stored[0].shape[1]
    return Team(members, block[: sum(R.numel() for R in stored)].view(-1, width))


def widths_of(R: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[int]:
    """How many features layers read: stored rows [n,i], and those of W."""
    return [_width(*each) for each in zip(R, layouts, strict=True)]


def _width(R: Tensor | None, layout: Layout) -> int:
    return (0 if R is None else R.shape[0]) + layout.rows


def split_features(side_by_side: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """U[T,p] of each layer from those of all, [T, sum p]."""
    return side_by_side.split(list(widths), dim=1)
