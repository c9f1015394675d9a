"""Changing few columns of an input in place for the time of one product, and putting them back bit for bit.

W (x + scatter_J(f)) = W x + W[:, J] f, so a second pass over a wide output becomes an edit of r columns of x. The edit
is invisible from outside: it runs in the same stream, goes past autograd's version counter (`.data`), and the columns
are restored from a copy before the function returns.
"""

from __future__ import annotations

from torch import Tensor


def can_edit(x: Tensor) -> bool:
    """Whether x[T,i] may be edited: its rows must not share memory (an expanded tensor has one row for all)."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def add_columns(x: Tensor, f: Tensor, index: Tensor | None) -> Tensor:
    """x[:, index] += f for x[T,i] and f[T,n]; `index` None means the leading n columns. Returns the old columns."""
    if index is None:
        head = x.data[:, : f.shape[1]]
        backup = head.clone()
        head.add_(f)
    else:
        backup = x.data.index_select(1, index)
        x.data.index_copy_(1, index.long(), backup + f)
    return backup


def put_back(x: Tensor, backup: Tensor, index: Tensor | None) -> None:
    """Undo `add_columns`, exactly."""
    if index is None:
        x.data[:, : backup.shape[1]].copy_(backup)
    else:
        x.data.index_copy_(1, index.long(), backup)
