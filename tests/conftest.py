"""Strict, small surroundings for every test: one thread, no network, fixed seeds."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from processes import Driver

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files with slow tests begin first: of several workers none is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What libraries and tests hold stays: it is not gone through each time that a Trainer has garbage collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """Starts Python programs in processes of their own without the seconds that their imports take."""
    made = Driver(tmp_path_factory.mktemp("driver"))
    yield made
    made.end()
