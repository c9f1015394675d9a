"""Factors in the type of the features that they meet.

Adapters learn in float32 beside weights of half that width, so every pass begins by casting them. One kernel for all
factors of a call, instead of one for each, is a third fewer launches for a small model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def typed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a type; `Tensor.to` looks so long at one that has it already that small models would see it."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def narrowed(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[list[Tensor | None], Tensor | None]:
    """Tensors in a type, and the block of memory in which those that were cast follow one another.

    Args:
        tensors: of one device; None stays None.
        dtype: the type.

    Returns:
        The tensors, and the block, flat; None where fewer than two had another type.
    """
    wide = {n: t for n, t in enumerate(tensors) if t is not None and t.dtype != dtype}
    found, block = list(tensors), None
    if len(wide) < 2 or len({t.dtype for t in wide.values()}) > 1:
        parts = [t.to(dtype) for t in wide.values()]
    else:
        sizes = [t.numel() for t in wide.values()]
        block = torch.empty(sum(sizes), dtype=dtype, device=next(iter(wide.values())).device)
        parts = [part.view(t.shape) for part, t in zip(block.split(sizes), wide.values(), strict=True)]
        torch._foreach_copy_(parts, list(wide.values()))
    for n, part in zip(wide, parts, strict=True):
        found[n] = part
    return found, block
