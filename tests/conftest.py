"""Strict, small surroundings for every test: one thread, no network, fixed seeds."""

import functools
import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jinja2
import pytest
import torch

from processes import Driver

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Each seed would be kept for a device that may come, with the stack of the call: milliseconds, many thousand times.
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = lambda seed: None
# PEFT writes a card beside each adapter, from one template: to compile it takes longer than all else of saving one.
jinja2.Environment.compile = functools.lru_cache(maxsize=16)(jinja2.Environment.compile)

TESTS = Path(__file__).parent


# The files that take longest, longest first.
LONGEST = (
    "train/test_devices.py",
    "compare/test_command.py",
    "fused/test_compiled.py",
    "vision/test_classification.py",
    "evaluate/test_code_tasks.py",
    "train/test_checkpoints.py",
    "test_plan.py",
    "laws/test_design_space.py",
    "evaluate/test_run.py",
    "train/test_kill.py",
    "train/test_memory.py",
    "train/test_run.py",
    "vision/test_few_shot.py",
    "peft/test_peft_files.py",
    "peft/test_peft_training.py",
    "diffusion/test_dreambooth.py",
    "vision/test_recipes.py",
    "run/test_models.py",
    "diffusion/test_whole.py",
)


def pytest_collection_modifyitems(items):
    """Long files begin first, then others with slow tests: of several workers none is left alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places)
    items.sort(key=lambda item: (places.get(item.path, len(places)), item.path not in slow))


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
