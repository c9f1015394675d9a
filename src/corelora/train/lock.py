"""One run a folder: a lock that the system takes back when its process ends, however that happens."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from corelora.errors import CoreLoraError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder; it is made where it is missing.

    The lock is a record lock on a file: it goes with the process, so that a run that was killed blocks nothing, and
    processes that were forked from it do not hold it on. The file stays and says who had it last.

    Raises:
        CoreLoraError: another process holds it (its number, host and start are named), or the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise CoreLoraError(
            f"the run folder {folder} can't be written ({error.strerror}): give another --output"
        ) from None
    with file:
        _take(file, folder)
        yield


def _take(file: IO[str], folder: Path) -> None:
    if fcntl is None:
        warnings.warn("this system has no file locks: a second run in the same folder is not noticed", stacklevel=4)
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CoreLoraError(f"{folder}: {_holder(file)}. Wait for it, or give another --output") from None
    except OSError as error:  # a file system without locks
        warnings.warn(
            f"{folder}: no lock ({error.strerror}), so a second run in it is not noticed", UserWarning, stacklevel=4
        )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": now}) + "\n")
    file.flush()


def _holder(file: IO[str]) -> str:
    """Who holds the lock, as a half sentence. The open file is read, for closing another one would end our locks."""
    file.seek(0)
    try:
        data: dict[str, Any] = json.loads(file.read())
        return f"process {data['pid']} on {data['host']} trains in this folder since {data['start']}"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock
        return "another process trains in this folder"
