"""A tiny model with rows, and a cache of its own, for the tests of training."""

import pytest
import transformers

from train.helpers import prepare_folder, without_curves


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Tokens and statistics of these tests go nowhere else; quiet loading; no curves."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    transformers.utils.logging.disable_progress_bar()
    without_curves(monkeypatch)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny Llama as `model`, train.jsonl and test.jsonl beside it."""
    return prepare_folder(tmp_path_factory.mktemp("train"))
