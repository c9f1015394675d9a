"""A tiny model with rows, and a cache of its own, for the tests of training."""

import pytest

from train.helpers import prepare_folder, surround_runs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Tokens and statistics of these tests go nowhere else; quiet loading; no curves."""
    surround_runs(monkeypatch, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny Llama as `model`, train.jsonl and test.jsonl beside it."""
    return prepare_folder(tmp_path_factory.mktemp("train"))
