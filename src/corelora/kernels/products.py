"""y = W x + b + Lf G Rf x as products of matrices, and their order.

What can be chosen is the order (`Order`):

- AFTER   the base product first, the adapter added to its output: one more pass over the output. A slice of W that
          reads the input is then free, being some of the base product's own outputs.
- BEFORE  the adapter's part first, the base product accumulated into it (beta = 1 of the matrix product). Columns of W
          write by an edit: W (x + scatter(f)) = W x + W[:, cols] f, so r columns of x change for the time of the base
          product and are put back bit for bit (edit.py). A trained L beside them takes half of the adapter's product,
          and where there is none, nothing is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from corelora.kernels.edit import add_columns, can_edit, put_back, set_columns
from corelora.kernels.form import Chain, scaled_product


class Order(Enum):
    """When the adapter's part is computed."""

    AFTER = "after"
    BEFORE = "before"


_order: Order | None = None
EDIT_FROM = 1 << 25  # numbers of an output, from which an edit beside a stored factor is cheaper than a wider product


def set_order(order: Order | None) -> Order | None:
    """Take `order` everywhere instead of the cheaper one; None chooses again. For measurements and tests.

    Returns:
        What was set before.
    """
    global _order
    before, _order = _order, order
    return before


@dataclass(slots=True)
class Side:
    """Factors on one side of G, as rows over the layer's input (or, for the writing side, over its output).

    Attributes:
        stored: [n1, side], or None.
        count: how many rows of W, or of W^T on the writing side, follow; 0 for none.
        index: which; None for the leading ones.
    """

    stored: Tensor | None
    count: int
    index: Tensor | None

    def cut(self, W: Tensor) -> Tensor:
        """The rows of W[n, side]."""
        return W[: self.count] if self.index is None else W.index_select(0, self.index)

    def is_cheaper_apart(self, x: Tensor) -> bool:
        """Whether stored rows and those of W are better multiplied one after the other than copied into one matrix.

        The copy moves (n1 + n2) side numbers, the second product T side of the output again. Here, on a CPU, only wide
        types gain: a product of narrow ones has a cost of its own there, larger than the copy's.
        """
        if not self.count or self.stored is None or x.element_size() < 4:
            return False
        return x.shape[0] < self.stored.shape[0] + self.count

    def rows(self, W: Tensor) -> Tensor:
        """All rows as one matrix; `W` is W[n, side]. One wide product is cheaper than two over the same features."""
        stored = self.stored
        if not self.count:
            assert stored is not None
            return stored
        cut = self.cut(W)
        if stored is None:
            return cut
        if stored.stride(1) == 1:
            return torch.cat((stored, cut))
        return torch.cat((stored.t(), cut.t()), dim=1).t()  # columns: joined as they lie in memory


@dataclass(slots=True)
class Small:
    """What stands between the two sides.

    Attributes:
        chain: G as a chain of matrices.
        scale: of all; 1 where it is in G.
        F: G U [T,q] in this pass, where it was made together with other layers'.
        y: Lf F [T,o] in this pass, where it was made beside another layer's base product; it is written to.
    """

    chain: Chain
    scale: float
    F: Tensor | None = None
    y: Tensor | None = None

    def last(self) -> Tensor | None:
        """The last matrix, with the scale; None for the identity."""
        if not self.chain:
            return None
        return self.chain[-1] if self.scale == 1 else self.chain[-1] * self.scale


def choose_order(o: int, i: int, read: Side, write: Side, x: Tensor) -> Order:
    """The cheaper order for x[T,i] to y[T,o], by the bytes that each moves beyond the base product.

    Reading the input for a slice's U costs T i, a second pass over the output 2 T o (read and write); the columns of an
    edit are few. On a CPU the base product is not bound by memory and AFTER is never worse.
    """
    if write.stored is None and not can_edit(x):
        return Order.AFTER
    if _order is not None:
        return _order
    if not x.is_cuda:
        return Order.AFTER
    if write.stored is None and read.stored is None:
        return Order.BEFORE if i <= 2 * o else Order.AFTER
    return Order.BEFORE


def apply_form(
    x: Tensor, W: Tensor, bias: Tensor | None, read: Side, write: Side, small: Small
) -> tuple[Tensor, list[Tensor]]:
    """(y[T,o], [U[T,p], ..., F[T,q]]) with U = Rf x, F = G U and y = W x + b + scale Lf F.

    The features are those between the matrices of G. Of F, what columns of W wrote by an edit is left out.

    Args:
        x: [T,i].
        W: [o,i].
        bias: [o] or None.
        read: rows of Rf.
        write: columns of Lf, as rows.
        small: G as a chain, and the scale.
    """
    if choose_order(W.shape[0], x.shape[1], read, write, x) is Order.AFTER:
        return _after(x, W, bias, read, write, small)
    return write_form(x, W, bias, x @ read.rows(W).t(), write, small)


def write_form(
    x: Tensor, W: Tensor, bias: Tensor | None, U: Tensor, write: Side, small: Small, held: Held = None
) -> tuple[Tensor, list[Tensor]]:
    """The same from U = Rf x on, in the order BEFORE.

    Args:
        x, W, bias, write, small: as in `apply_form`.
        U: [T,p].
        held: x's leading columns, if others edit them too; they are left as this edit has them.
    """
    if not edits(x, write, bool(small.chain), W.shape[0]):
        features = through(U, small.chain) if small.F is None else [U, small.F]
        y = small.y if small.y is not None else scaled_product(features[-1], write.rows(W.t()), small.scale)
        if bias is not None:
            y.add_(bias)
        return y.addmm_(x, W.t()), features
    features, last = through(U, small.chain[:-1]), small.last()
    if write.stored is None:
        edited = _edited(x, features[-1], last, write, held)
        y = torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())
    else:
        assert last is not None
        n = write.stored.shape[0]
        both = features[-1] @ last.t() if small.F is None else small.F
        y = both[:, :n] @ write.stored
        if bias is not None:
            y.add_(bias)
        edited = _edited(x, both[:, n:], None, write, held)
        y.addmm_(x, W.t())
        features = [*features, both[:, :n]]
    if edited is not None:
        put_back(edited, write.index)
    return y, features


Held = tuple[Tensor, Tensor] | None  # columns and what they were (edit.py)


def _edited(x: Tensor, U: Tensor, G: Tensor | None, write: Side, held: Held) -> Held:
    """Edit x; what is to be put back afterwards, None where that is for others to do."""
    if held is None:
        return add_columns(x, U, G, write.index)
    set_columns(held, U, G)
    return None


def edits(x: Tensor, write: Side, has_chain: bool, o: int) -> bool:
    """Whether columns of W write by an edit of x.

    Alone they always do where they can: nothing is left of the adapter's product. Beside a stored L they are half of
    it, and the edit's three passes over r columns are paid for from some size of the output on (`EDIT_FROM`); the last
    matrix of G must be there to be split.

    Args:
        x: [T,i].
        write: columns of Lf, as rows.
        has_chain: whether there is a G.
        o: width of the output.
    """
    if not write.count or not can_edit(x):
        return False
    return write.stored is None or (has_chain and x.shape[0] * o >= EDIT_FROM)


def _after(
    x: Tensor, W: Tensor, bias: Tensor | None, read: Side, write: Side, small: Small
) -> tuple[Tensor, list[Tensor]]:
    y = torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())
    if read.count:  # W[rows] x is there already, plus the bias
        U = y[:, : read.count].clone() if read.index is None else y.index_select(1, read.index)
        if bias is not None:
            U -= bias[: read.count] if read.index is None else bias.index_select(0, read.index)
        if read.stored is not None:
            U = torch.cat((x @ read.stored.t(), U), dim=1)
    else:
        assert read.stored is not None
        U = x @ read.stored.t()
    features = through(U, small.chain)
    F, scale = features[-1], small.scale
    if write.stored is not None and write.is_cheaper_apart(x):
        n = F.shape[1] - write.count
        y.addmm_(F[:, :n], write.stored, alpha=scale).addmm_(F[:, n:], write.cut(W.t()), alpha=scale)
    else:
        y.addmm_(F, write.rows(W.t()), alpha=scale)
    return y, features


def through(U: Tensor, chain: Chain) -> list[Tensor]:
    """[U, ..., G U] for features U[T,p] as rows: after each matrix of the chain."""
    features = [U]
    for matrix in chain:
        U = U @ matrix.t()
        features.append(U)
    return features
