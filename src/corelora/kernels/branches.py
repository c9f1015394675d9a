"""Products that wait for nothing of one another, at the same time, in recorded graphs.

Narrow products, of thin features and of the gradients of factors, have few blocks of work each: one after the other
they leave most of a GPU idle. Beside each other, and beside the wide product of the input's gradient, they fill it. A
CUDA graph keeps what was launched on several streams as branches, which cost nothing when it is played again. In eager
code the host would have more to launch, so there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

STREAMS = 3  # beside the current one, 0: no branches; the matrix library keeps a workspace for each


def is_recording(like: Tensor) -> bool:
    """Whether the work on a tensor's device is being recorded."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def branches(like: Tensor) -> bool:
    """Whether it is being recorded, and may branch."""
    return STREAMS > 0 and is_recording(like)


def at_once(calls: Sequence[Callable[[], Any]], like: Tensor, *, alone: bool = False) -> list[Any]:
    """The result of each call.

    What one of the streams frees is safe from the others: each fork waits for all that came before it. Where a call
    fails, the streams are joined all the same: a recording that ends with work on another stream would report that, and
    not what failed.

    Args:
        calls: the first is what will be waited for longest.
        like: on the device of all.
        alone: one follows the other, since one changes for a while what another reads.
    """
    if alone or len(calls) < 2 or not branches(like):
        return [call() for call in calls]
    here = torch.cuda.current_stream(like.device)
    others = [_stream(like.device, n) for n in range(min(STREAMS, len(calls) - 1))]
    for other in others:
        other.wait_stream(here)
    try:
        made = [calls[0]()]
        for call, other in zip(calls[1:], cycle(others), strict=False):
            with torch.cuda.stream(other):
                made.append(call())
    finally:
        for other in others:
            here.wait_stream(other)
    return made


def nothing() -> None:
    """The call for what nobody asks for."""


@cache
def _stream(device: torch.device, n: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
