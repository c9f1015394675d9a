"""Rows of like length in one batch: a step then works on tokens instead of padding."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import pyarrow.compute as pc
import torch
from torch.utils.data import Sampler

READ = 10_000  # rows read at once
WINDOW = 50  # steps whose rows are sorted together; within it rows stay where chance put them


def row_lengths(dataset: datasets.Dataset) -> list[int]:
    """Tokens of each row, read past Python, some thousands of rows at a time."""
    tables = dataset.select_columns("input_ids").with_format("arrow").iter(READ)
    return [length for table in tables for length in pc.list_value_length(table.column(0)).to_pylist()]


class LengthSampler(Sampler[int]):
    """Draws rows at random, sorts those of `WINDOW` steps by length, and gives the steps in random order.

    The step with the longest row comes first, so that memory that is too short shows at once. transformers' own
    sampler leaves the steps of a window sorted, longest first: the schedule's last steps would all be short rows.

    Args:
        lengths: of the rows.
        step_rows: rows of one step, of all processes and accumulated batches together.
        seed: with the epoch, decides the order, whatever was drawn before.
    """

    def __init__(self, lengths: list[int], step_rows: int, seed: int) -> None:
        self.lengths, self.step_rows, self.seed, self.epoch = lengths, step_rows, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate in front of each pass over the rows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order, n = torch.randperm(len(self.lengths), generator=generator).tolist(), self.step_rows
        for start in range(0, len(order), WINDOW * n):
            order[start : start + WINDOW * n] = sorted(order[start : start + WINDOW * n], key=self.lengths.__getitem__)
        steps = [order[start : start + n] for start in range(0, len(order), n)]
        rest = [steps.pop()] if len(order) % n else []  # the only one that is not full
        steps = [steps[k] for k in torch.randperm(len(steps), generator=generator).tolist()]
        steps.sort(key=lambda rows: max(self.lengths[row] for row in rows) < max(self.lengths, default=0))
        for rows in steps + rest:
            yield from rows
