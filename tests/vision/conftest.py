"""Tiny models and generated pictures, and a cache of their own, for the tests of vision."""

import pytest

from train.helpers import surround_runs
from vision.helpers import save_clip, save_siglip, save_textures


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What is kept of these tests goes nowhere else; quiet loading; no curves."""
    surround_runs(monkeypatch, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Three classes of textures as folders."""
    return save_textures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A tiny CLIP."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def siglip(tmp_path_factory):
    """A tiny SigLIP."""
    return save_siglip(tmp_path_factory.mktemp("siglip"))
