"""How many runs a GPU is given: by estimates, or by what the user says where nothing can be known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compare.helpers import opened
from corelora.compare import pool
from corelora.compare.devices import Memory
from corelora.compare.pool import Device, Task, threads_of
from corelora.compare.session import planned_runs
from corelora.compare.work import Work

GIB = 2**30
GROUP = {"name": "sizes", "axes": {"rank": [2, 8], "lr": [1e-4, 1e-3]}, "set": {"method": {"name": "lora"}}}


def works(folder, tmp_path):
    """Four runs of two sizes."""
    study = opened(tmp_path, folder, [GROUP])
    return [Work(recipe=run.recipe, folder=run.folder(study.root)) for run in planned_runs(study)]


def gpu(most=4):
    return Device(number=0, free=80 * GIB, most=most)


def test_estimates_are_of_the_setting(folder, tmp_path):
    """A rate changes nothing; a larger rank takes more; a process itself takes most of a tiny run."""
    found = Memory([gpu()], None).of(works(folder, tmp_path))
    assert found[0] == found[1] < found[2] == found[3]
    assert 0.8 * GIB < found[0] < 2 * GIB


def test_what_is_not_known_is_alone_or_a_share(folder, tmp_path):
    """Pictures can't be estimated: alone by default, an even share of the GPU where the user says how many."""
    unknown = [
        dataclasses.replace(w, recipe=dataclasses.replace(w.recipe, task="clip_few_shot"))
        for w in works(folder, tmp_path)
    ]
    assert Memory([gpu()], None).of(unknown) == [None] * 4
    shares = Memory([gpu()], 4).of(unknown)
    assert shares == [20 * GIB] * 4
    device = gpu()
    for work, memory in zip(unknown, shares, strict=True):
        task = Task(work=work, memory=memory)
        assert device.has_room(task)
        device.running.append(_Running(task))
    assert not device.has_room(Task(work=unknown[0], memory=shares[0]))


def test_no_run_counts_for_more_than_the_share_that_the_user_gives(folder, tmp_path):
    """Estimates are of the longest rows: who says how many run is believed, and a smaller estimate stays."""
    device = Device(number=0, free=2 * GIB, most=4)
    runs = works(folder, tmp_path)
    alone = Memory([device], None).of(runs)
    assert Memory([device], 4).of(runs) == [0.5 * GIB] * 4
    assert Memory([gpu()], 4).of(runs) == alone


def test_a_cpu_is_not_estimated(folder, tmp_path):
    memory = Memory([Device(number=None, free=float("inf"), most=2)], 2)
    assert memory.of(works(folder, tmp_path)) == [0.0] * 4


class _Running:
    """What a device remembers of a process."""

    def __init__(self, task):
        self.task = task


@pytest.mark.parametrize(
    ("allowed", "said", "runs", "each"),
    [(16, 96, 1, 16), (16, 96, 4, 4), (16, 2, 1, 2), (2, 96, 8, 1)],
    ids=["all", "a share", "OMP_NUM_THREADS", "more runs than cores"],
)
def test_threads_are_a_share_of_what_may_be_used(monkeypatch, allowed, said, runs, each):
    """Of a machine of 96 cores a container may use few: with a thread for each, runs would wait for one another."""
    monkeypatch.setattr(pool, "cpu_count", lambda: allowed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: said)
    assert threads_of(runs) == each
