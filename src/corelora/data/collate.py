"""Rows of tokens to one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that is not trained, as PyTorch's cross-entropy knows it


class ReplyCollator:
    """Pads a batch on the right; padding has no label and no attention.

    Packed rows (those with `position_ids`) go without an attention mask: transformers then tells the rows in a
    sequence apart by positions that begin anew, in any sequence of the batch. Their padding is one more row of its
    own. With a mask it would not look.
    """

    def __init__(self, pad_token_id: int, *, flatten: bool = False, multiple: int | None = None) -> None:
        """Args:
        pad_token_id: any token will do; it is never looked at.
        flatten: put the whole batch of packed rows into one sequence, without padding. Flash attention needs it: it
            finds borders only in a batch of one.
        multiple: what lengths are padded to a multiple of.
        """
        self.pad_token_id = pad_token_id
        self.multiple = multiple or 1
        self.flatten = flatten

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids[b, t], labels[b, t], and attention_mask[b, t] or, where rows are packed, position_ids[b, t]."""
        is_packed = "position_ids" in rows[0]
        names = ["input_ids", "labels", *(["position_ids"] if is_packed else [])]
        columns = {name: [list(row[name]) for row in rows] for name in names}
        if not is_packed:
            columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        elif self.flatten:
            columns = {name: [[n for values in lists for n in values]] for name, lists in columns.items()}
        return {name: self._padded(name, lists) for name, lists in columns.items()}

    def _padded(self, name: str, lists: list[list[int]]) -> Tensor:
        longest = max(map(len, lists))
        width = longest + -longest % self.multiple
        return torch.tensor([values + self._padding(name, width - len(values)) for values in lists])

    def _padding(self, name: str, count: int) -> list[int]:
        if name == "position_ids":
            return list(range(count))
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        return [fill[name]] * count
