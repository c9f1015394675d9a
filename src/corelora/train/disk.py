"""A disk that is full or can't be written, whichever library ran into it, as one clear error."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from corelora.errors import CoreLoraError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
PROBE = 1 << 20  # bytes


@contextlib.contextmanager
def disk_errors(folder: Path, kept: Callable[[], Path | None]) -> Iterator[None]:
    """Turn a failed write into a CoreLoraError that says what is kept and what to do.

    Args:
        folder: the run folder.
        kept: finds its newest checkpoint.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _reason(error, folder)
        if reason is None:
            raise
        found = kept()
        state = f"nothing is lost: the same command goes on after {found}" if found else "no checkpoint was written yet"
        raise CoreLoraError(f"{reason}; {state}") from error


def raise_if_full(folder: Path, error: Exception) -> None:
    """Raise OSError where `error` came from a disk without room; to be called before anything is cleaned up.

    torch's writer says only that its position is unexpected, so the disk is asked: can it take one more MiB?

    Args:
        folder: where the write failed.
        error: what was raised.
    """
    if isinstance(error, OSError) or not isinstance(error, (RuntimeError, SafetensorError)):
        return
    probe = folder / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(PROBE))
            os.fsync(file.fileno())
    except OSError as refusal:
        if refusal.errno in FULL:
            raise OSError(refusal.errno, refusal.strerror, str(folder)) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _reason(error: OSError | SafetensorError, folder: Path) -> str | None:
    """What the disk did, or None where the error is of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    named = error.filename if isinstance(error, OSError) else None
    where = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else folder
    if number in FULL or "No space left" in str(error):  # safetensors has the system's words
        return f"the disk is full: {where} can't be written. Make room"
    if number is not None and number in REFUSED and where.is_relative_to(folder):
        return f"{where} can't be written ({os.strerror(number).lower()})"
    return None
