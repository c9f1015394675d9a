"""A tiny model with rows, and a cache of its own, for the tests of studies."""

import pytest
import transformers

from train.helpers import prepare_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Tokens of these tests go nowhere else; quiet loading."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny Llama as `model`, train.jsonl and test.jsonl beside it."""
    return prepare_folder(tmp_path_factory.mktemp("train"))
