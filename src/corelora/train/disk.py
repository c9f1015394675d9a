"""A disk that is full or can't be written, whichever library ran into it, as one clear error."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from corelora.errors import CoreLoraError
from corelora.train.checkpoints import newest_checkpoint

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
LITTLE = 1 << 20  # bytes; a write of torch's that failed with less than this left failed for want of room


@contextlib.contextmanager
def disk_errors(folder: Path, checkpoints: Path) -> Iterator[None]:
    """Turn failed writes into a CoreLoraError that says what is kept and what to do.

    Python and datasets raise OSError, safetensors its own error with the system's text in it, and torch a RuntimeError
    that names no cause; for the last one the disk is asked.

    Args:
        folder: the run folder.
        checkpoints: the folder of its checkpoints.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error, folder)
        if reason is None:
            raise
        kept = newest_checkpoint(checkpoints)
        lost = f"{kept} is whole and the run goes on from there" if kept else "no checkpoint was written yet"
        raise CoreLoraError(
            f"{folder}: {reason}. Nothing that was written is lost: {lost} with the same command"
        ) from error


def _reason(error: Exception, folder: Path) -> str | None:
    """What the disk did, or None where the error is of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number in FULL or "No space left" in text or "os error 28" in text:
        return f"the disk is full ({_free(folder)} bytes free); make room, or give another --output"
    if number in REFUSED:
        return f"can't be written ({text})"
    failed = isinstance(error, RuntimeError) and any(w in text for w in ("PytorchStreamWriter", "file write failed"))
    if failed and _free(folder) < LITTLE:
        return f"the disk is full ({_free(folder)} bytes free); make room, or give another --output"
    return None


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
