"""The cores of layers that read one input, between orthonormal slices: [r,r] transforms on both sides, batched.

A product of [r,r] matrices keeps a GPU busy for less time than it takes to start: three layers' cores go through their
transforms in two products instead of six.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from corelora.kernels.branches import is_recording
from corelora.kernels.form import FormMaker, between

Core = tuple[Tensor | None, Tensor | None]  # C and D of a form


def expand_all(makers: Sequence[FormMaker], cores: Sequence[Core]) -> list[Tensor | None]:
    """G[q,p] of each layer, as `FormMaker.expand` makes it.

    Args:
        makers: of each layer.
        cores: C and D of each layer's form.
    """
    found = _same_cores(makers, [C for C, _ in cores])
    if found is None:
        return [maker.expand(*core) for maker, core in zip(makers, cores, strict=True)]
    return list(between(*_transforms(makers, found[0]), torch.stack(found)).unbind())


def collapse_all(
    makers: Sequence[FormMaker], dG: Tensor | Sequence[Tensor | None], cores: Sequence[Core]
) -> list[Core]:
    """The gradients of C and D of each layer, as `FormMaker.collapse` makes them; None where there is no dG.

    Args:
        makers: of each layer.
        dG: [n,q,p], or one of each layer.
        cores: as for `expand_all`.
    """
    found = _same_cores(makers, [C for C, _ in cores])
    if found is None or not isinstance(dG, Tensor):
        each = zip(makers, dG, cores, strict=True)
        return [(None, None) if d is None else maker.collapse(d, *core) for maker, d, core in each]
    return [(dC, None) for dC in between(*_transforms(makers, dG), dG, transposed=True).unbind()]


def _same_cores(makers: Sequence[FormMaker], cores: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Dense cores of one shape and type, all of which go through transforms; None where some differ."""
    if len(makers) < 2 or not all(maker.mixes and maker.is_direct for maker in makers):
        return None
    found = [C for C in cores if C is not None]
    alike = len(found) == len(cores) and len({(C.shape, C.dtype, C.device) for C in found}) == 1
    return found if alike else None


def _transforms(makers: Sequence[FormMaker], like: Tensor) -> tuple[Tensor, Tensor]:
    """[n,q,q] and [n,p,p]: the transforms of each layer, kept beside its own.

    A recording that kept them would leave later passes with memory of its own, and one that read kept ones would need
    them for good: it makes them anew, from each layer's, which stay.
    """
    pairs, records = [maker.mixing(like) for maker in makers], is_recording(like)
    kept = makers[0].stacked_mixers
    if not records and kept is not None and len(kept[2]) == len(pairs) and all(map(is_, kept[2], pairs)):
        return kept[:2]
    with torch.inference_mode(False):  # a later pass may train with them
        left, right = (torch.stack(side) for side in zip(*pairs, strict=True))
    if not records:
        makers[0].stacked_mixers = left, right, pairs
    return left, right
