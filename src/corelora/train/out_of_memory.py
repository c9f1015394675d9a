"""Knowing an error that says that memory ran out: PyTorch, CUDA and its libraries each have words of their own."""

from __future__ import annotations

import re

import torch

_WORDS = re.compile("not enough memory|out of memory|allocate memory|ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_WORDS.search(str(error)))
