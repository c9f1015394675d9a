"""The small products of layers that read one input, as batched ones.

Features of T rows with G[q,p], p and q at most a few hundred, keep a GPU busy for less time than it takes to start the
next kernel. Where all layers of a group have a G of one shape, one batched product does what one a layer did. The
features that read the input lie side by side in one tensor [T, n p], which batched products read and write where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from corelora.kernels.form import product
from corelora.kernels.products import Small


class Stack:
    """The G of a group's layers, and their features.

    Args:
        chains: G[q,p] of each of n layers, of one shape.
        side_by_side: U of all, [T, n p].
    """

    def __init__(self, chains: Sequence[Tensor], side_by_side: Tensor) -> None:
        self.chains = chains
        self.U = columns_of(side_by_side, len(chains))

    @cached_property
    def G(self) -> Tensor:
        """[n,q,p]."""
        return torch.stack(tuple(self.chains))

    def forward(self) -> Tensor:
        """F[n,T,q] = U G^T."""
        return torch.bmm(self.U, self.G.transpose(1, 2))

    def room(self) -> Tensor:
        """Memory for V[n,T,q]."""
        n, T, _ = self.U.shape
        return self.U.new_empty(n, T, self.chains[0].shape[0])

    def backward(self, V: Tensor) -> Tensor:
        """H = V G for V[n,T,q], side by side [T, n p]."""
        n, T, p = self.U.shape
        H = V.new_empty(T, n * p)
        torch.bmm(V, self.G, out=columns_of(H, n))
        return H

    def gradients(self, V: Tensor, dtype: torch.dtype) -> Tensor:
        """dG[n,q,p] = V^T U for V[n,T,q]."""
        return product(V.transpose(1, 2), self.U, dtype)


def stack_of(smalls: Sequence[Small], side_by_side: Tensor | None) -> Stack | None:
    """The stack of a group; None for layers whose G differ in shape, or are none.

    Args:
        smalls: of each layer.
        side_by_side: their features [T, n p]; None where they are apart.
    """
    chains = [small.chain for small in smalls]
    if side_by_side is None or any(len(chain) != 1 for chain in chains):
        return None
    if any(small.scale != 1 for small in smalls) or len({chain[0].shape for chain in chains}) > 1:
        return None
    return Stack([chain[0] for chain in chains], side_by_side)


def columns_of(side_by_side: Tensor, count: int) -> Tensor:
    """[n,T,p] as a view of [T, n p]."""
    return side_by_side.view(side_by_side.shape[0], count, -1).transpose(0, 1)
