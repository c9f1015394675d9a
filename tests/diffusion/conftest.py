"""Tiny pipelines and a cache of their own, for the tests of diffusion."""

import diffusers
import pytest

from diffusion.helpers import save_pictures, save_pipeline
from train.helpers import surround_runs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Latents and class pictures of these tests go nowhere else; quiet loading; no curves."""
    surround_runs(monkeypatch, tmp_path_factory.getbasetemp())
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with the pipelines `xl` and `sd`, and `pictures`."""
    folder = tmp_path_factory.mktemp("diffusion")
    save_pipeline(folder / "xl", xl=True)
    save_pipeline(folder / "sd", xl=False)
    save_pictures(folder / "pictures")
    return folder
