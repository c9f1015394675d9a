"""Folders that are made once, for all processes and all later runs: whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState

from corelora.errors import CoreLoraError
from corelora.run.models import cache_root

FORMAT = 1  # of everything that is kept here; part of each key
ABANDONED = 7 * 24 * 3600  # seconds since a half-made folder last got a file


def key_of(*parts: Any) -> str:
    """A name for what is made from these parts (whatever JSON can hold); equal parts, equal name."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_of(path: Path) -> str:
    """Fingerprint of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def made_once(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name, made if it is not there.

    One process of a machine makes it while the others wait. It is written under a temporary name and renamed, so that
    a folder with its real name is whole.

    Args:
        kind: the folder above: "rows", "tokens".
        key: from `key_of`.
        make: fills an empty folder.

    Raises:
        CoreLoraError: the cache cannot be written; says how to move it.
    """
    folder = _folder(kind, key)
    with PartialState().local_main_process_first():
        if not folder.is_dir():
            _make(folder, make)
    return folder


def is_made(kind: str, key: str) -> bool:
    """Whether `made_once` would find this folder."""
    return _folder(kind, key).is_dir()


def _folder(kind: str, key: str) -> Path:
    return cache_root() / "data" / kind / key


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
        make(temporary)
        _move(temporary, folder)
    except OSError as error:
        full = "; the disk is full" if error.errno == errno.ENOSPC else ""
        raise CoreLoraError(
            f"the cache {folder.parent} cannot be written ({error.strerror or error}{full}). "
            "Set CORELORA_CACHE to a folder with room."
        ) from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half made; a folder that somebody still fills is younger."""
    for left in folder.glob(".making-*"):
        with suppress(FileNotFoundError):  # whoever fills it is done just now
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _move(temporary: Path, folder: Path) -> None:
    """Rename, unless another machine that shares the disk was faster."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
