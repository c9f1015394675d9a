"""Changing few columns of an input in place for the time of one product, and putting them back bit for bit.

W (x + scatter_J(f)) = W x + W[:, J] f, so a second pass over a wide output becomes an edit of r columns of x. The edit
is invisible from outside: it runs in the same stream, goes past autograd's version counter (`.data`), and the columns
are restored from a copy before the function returns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def can_edit(x: Tensor) -> bool:
    """Whether x[T,i] may be edited: its rows must not share memory (an expanded tensor has one row for all)."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def add_columns(x: Tensor, U: Tensor, G: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """x[:, index] += U G^T for x[T,i], U[T,p] and G[n,p] (None: the identity).

    Args:
        x: changed in place.
        U: thin features.
        G: applied to them; the sum is made in one product where the columns are the leading ones.
        index: which columns, int64; None for the leading n.

    Returns:
        What `put_back` needs: the tensor to write to, and the old columns.
    """
    data = x.data
    if index is None:
        head = data[:, : U.shape[1] if G is None else G.shape[0]]
        backup = head.clone()
        if G is None:
            head.add_(U)
        else:
            head.addmm_(U, G.t())
        return head, backup
    backup = data.index_select(1, index)
    data.index_copy_(1, index, backup + U if G is None else torch.addmm(backup, U, G.t()))
    return data, backup


def hold_columns(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading columns of x[T,i] and a copy of them: several edits in turn begin from the copy, and one `put_back`
    is enough for all.

    Args:
        x: to be edited.
        count: of the columns.
    """
    head = x.data[:, :count]
    return head, head.clone()


def set_columns(held: tuple[Tensor, Tensor], U: Tensor, G: Tensor | None) -> None:
    """Held columns become what they were plus U G^T, whatever the last edit left there.

    Args:
        held: as `hold_columns` gives them.
        U: thin features [T,p].
        G: [n,p]; None: the identity.
    """
    head, backup = held
    if G is None:
        torch.add(backup, U, out=head)
    else:
        torch.addmm(backup, U, G.t(), out=head)


def put_back(edited: tuple[Tensor, Tensor], index: Tensor | None) -> None:
    """Undo `add_columns`, exactly."""
    place, backup = edited
    if index is None:
        place.copy_(backup)
    else:
        place.index_copy_(1, index, backup)
