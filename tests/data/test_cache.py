"""Folders that are whole or not there."""

import errno
import os
import time
from pathlib import Path

import pytest

from corelora.data.cache import key_of, made_once
from corelora.errors import CoreLoraError


def folder_of(cache, key):
    return cache / "data" / "rows" / key


def fill(out: Path):
    (out / "file").write_text("whole")


def test_a_folder_has_its_name_once_it_is_whole(cache):
    def make(out):
        assert not folder_of(cache, "k").exists()
        fill(out)

    assert made_once("rows", "k", make) == folder_of(cache, "k")
    assert (folder_of(cache, "k") / "file").read_text() == "whole"
    assert made_once("rows", "k", lambda _: pytest.fail("made again")) == folder_of(cache, "k")
    assert os.listdir(folder_of(cache, "k").parent) == ["k"]


def test_a_failure_leaves_nothing(cache):
    def make(out):
        fill(out)
        raise CoreLoraError("bad data")

    with pytest.raises(CoreLoraError, match="bad data"):
        made_once("rows", "k", make)
    assert os.listdir(folder_of(cache, "k").parent) == []


def test_another_machine_may_be_faster(cache):
    """Both make it, on a disk that they share; the first one's stays."""

    def make(out):
        fill(out)
        folder_of(cache, "k").mkdir()
        (folder_of(cache, "k") / "file").write_text("the other's")

    folder = made_once("rows", "k", make)
    assert (folder / "file").read_text() == "the other's"
    assert os.listdir(folder.parent) == ["k"]


def test_what_killed_processes_left_is_swept_after_a_week(cache):
    for name, days in (("old", 8), ("young", 6)):
        left = folder_of(cache, f".making-{name}")
        left.mkdir(parents=True)
        fill(left)
        os.utime(left, (time.time() - days * 24 * 3600,) * 2)
    made_once("rows", "k", fill)
    assert sorted(os.listdir(folder_of(cache, "k").parent)) == [".making-young", "k"]


def test_a_full_disk_is_one_sentence(cache):
    def make(out):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CoreLoraError, match=r"the disk is full.*Set CORELORA_CACHE"):
        made_once("rows", "k", make)


def test_keys():
    assert key_of("a", 1, {"x": [1], "y": 2}) == key_of("a", 1, {"y": 2, "x": [1]})
    assert len({key_of("a", 1), key_of("a", "1"), key_of("a1"), key_of(["a", 1])}) == 4
