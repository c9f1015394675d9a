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
        G: [n,q,p], where it is there already.
    """

    def __init__(self, chains: Sequence[Tensor], side_by_side: Tensor, G: Tensor | None) -> None:
        self.chains = chains
        self.side_by_side = side_by_side
        self.U = columns_of(side_by_side, len(chains))
        self._given = G

    @cached_property
    def G(self) -> Tensor:
        """[n,q,p]."""
        return torch.stack(tuple(self.chains)) if self._given is None else self._given

    @cached_property
    def V(self) -> Tensor:
        """The features of the outputs' gradients side by side, [T, n q]; memory that the caller fills."""
        return self.U.new_empty(self.U.shape[1], len(self.chains) * self.chains[0].shape[0])

    def forward(self) -> Tensor:
        """F[n,T,q] = U G^T."""
        return torch.bmm(self.U, self.G.transpose(1, 2))

    def backward(self) -> Tensor:
        """H = V G of all, side by side [T, n p]."""
        H, n = torch.empty_like(self.side_by_side), len(self.chains)
        torch.bmm(columns_of(self.V, n), self.G, out=columns_of(H, n))
        return H

    def gradients(self, dtype: torch.dtype) -> Tensor:
        """dG[n,q,p] = V^T U.

        The blocks on the diagonal of one product over all: its sums run over T, which a product of few rows and columns
        splits among the processors of a GPU and a batched one leaves to n of them.
        """
        n, (q, p) = len(self.chains), self.chains[0].shape
        every = product(self.V.t(), self.side_by_side, dtype).view(n, q, n, p)
        return every.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def stack_of(smalls: Sequence[Small], side_by_side: Tensor | None, grams: Tensor | None) -> Stack | None:
    """The stack of a group; None for layers whose G differ in shape, or are none.

    Args:
        smalls: of each layer.
        side_by_side: their features [T, n p]; None where they are apart.
        grams: G [n,q,p] of all, where it is there already.
    """
    chains = [small.chain for small in smalls]
    if side_by_side is None or any(len(chain) != 1 for chain in chains):
        return None
    if any(small.scale != 1 for small in smalls) or len({chain[0].shape for chain in chains}) > 1:
        return None
    return Stack([chain[0] for chain in chains], side_by_side, grams)


def columns_of(side_by_side: Tensor, count: int) -> Tensor:
    """[n,T,p] as a view of [T, n p]."""
    return side_by_side.view(side_by_side.shape[0], count, -1).transpose(0, 1)
