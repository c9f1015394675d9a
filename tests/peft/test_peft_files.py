"""Adapters in files: saved and loaded by every door that PEFT and transformers have, in this process and in others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_models import METHODS, SAFE_SPREAD, bert, config, ids, layers, llama, logits, loss_of, train, trained
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import corelora
from corelora.errors import CoreLoraError
from processes import Driver

HERE = Path(__file__).parent


def child(driver: Driver, *arguments: str) -> str:
    """Run a task of peft_child.py in another process, which has not imported corelora, and return what it printed."""
    done = driver.call(HERE / "peft_child.py", *arguments, plain=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def saved(tmp_path):
    """(folder of a base model, folder of an adapter on it, the adapter's logits)."""
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained("nlora", base, sampling="random")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", logits(model)


@pytest.mark.slow
def test_another_process_with_another_seed(tmp_path, driver):
    """Every method and variant: identical logits, bit for bit."""
    expected = {}
    for method in METHODS:
        for variant in ("default", "published"):
            sampling = {"sampling": "random"} if variant == "published" else {}
            model = trained(method, variant=variant, **sampling)
            expected[f"{method}-{variant}"] = logits(model)
            model.save_pretrained(tmp_path / f"{method}-{variant}")
    child(driver, "reload_all", str(tmp_path))
    found = torch.load(tmp_path / "logits.pt")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(method, low_cpu_mem_usage, tmp_path):
    model = trained(method)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), expected)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(llama()))
    # loading it trains on from there, and a second save is the same file
    loaded.save_pretrained(tmp_path / "again")
    one, two = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_is_trainable_after_loading(saved):
    base, adapter, _ = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    losses = train(model, lambda: loss_of(model, ids()), steps=3)
    assert losses[-1] < losses[0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert not any(p.requires_grad for p in model.parameters())


def test_ephemeral_folder(saved, tmp_path):
    """The folder may vanish after loading: nothing is read late."""
    _, adapter, expected = saved
    copy = tmp_path / "ephemeral"
    copy.mkdir()
    for file in adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = PeftModel.from_pretrained(llama(), copy, low_cpu_mem_usage=True).eval()
    for file in copy.iterdir():
        file.unlink()
    copy.rmdir()
    assert torch.equal(logits(model), expected)


def test_ephemeral_gpu_offload_is_accepted(saved):
    _, adapter, expected = saved
    model = PeftModel.from_pretrained(llama(), adapter, ephemeral_gpu_offload=True).eval()
    assert torch.equal(logits(model), expected)


def test_auto_peft_model(saved):
    _, adapter, expected = saved
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter).eval()), expected)


def test_transformers_from_pretrained_adapter_folder(saved):
    _, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(adapter).eval()
    assert isinstance(model, LlamaForCausalLM)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", METHODS)
def test_transformers_add_load_switch_and_delete(method, tmp_path):
    model = llama()
    base = logits(model)
    model.add_adapter(config(method, task_type=None), "first")
    train(model, lambda: loss_of(model, ids()))
    model.eval()
    expected = logits(model)
    assert (expected - base).abs().max() > SAFE_SPREAD
    model.save_pretrained(tmp_path)
    other = llama()
    other.load_adapter(str(tmp_path), "loaded")
    assert torch.equal(logits(other.eval()), expected)
    other.add_adapter(config(method, task_type=None, r=2), "second")
    other.set_adapter("second")
    train(other, lambda: loss_of(other, ids(seed=9)))
    other.set_adapter("loaded")
    assert torch.equal(logits(other.eval()), expected)
    other.disable_adapters()
    assert torch.equal(logits(other), base)
    other.enable_adapters()
    other.delete_adapter("second")
    other.set_adapter("loaded")
    assert torch.equal(logits(other), expected)
    # PEFT reads what transformers wrote, and the other way round (test_transformers_from_pretrained_adapter_folder)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), expected)


def test_two_adapters_in_one_save(tmp_path):
    model = trained("nora")
    model.add_adapter("second", config("inttune"))
    model.set_adapter("second")
    train(model, lambda: loss_of(model, ids()))
    model.eval()
    second = logits(model)
    model.set_adapter("default")
    first = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(loaded.eval()), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded.eval()), second)


def test_modules_to_save_come_back(tmp_path):
    model = get_peft_model(bert(), config("nlora", target_modules=["query"], task_type="SEQ_CLS"))
    train(model, lambda: model(input_ids=ids(), labels=torch.tensor([0, 1])).loss, lr=5e-2)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path).eval()), expected)


def test_config_round_trip(tmp_path):
    given = config(
        "nora", r=6, inner_r=2, alpha=3.0, dropout=0.1, rank_pattern={"q_proj": 3}, exclude_modules=["k_proj"]
    )
    given.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (data["peft_type"], data["adapter_format"]) == ("CORELORA", 1)
    for loaded in (PeftConfig.from_pretrained(tmp_path), corelora.CoreLoraConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, corelora.CoreLoraConfig)
        assert loaded.choices() == given.choices()
        for name in ("r", "inner_r", "alpha", "dropout", "rank_pattern", "exclude_modules", "method", "variant"):
            assert getattr(loaded, name) == getattr(given, name), name
        assert loaded.to_dict() == given.to_dict() | {"inference_mode": loaded.inference_mode}


# -- files that do not fit ---------------------------------------------------------------------------------------------


def _renamed(folder: Path, change) -> None:
    """Rewrite an adapter file with its keys changed; a new name of None drops the tensor."""
    path = folder / "adapter_model.safetensors"
    tensors = {change(k): v for k, v in load_file(path).items()}
    tensors.pop(None, None)
    save_file(tensors, path)


def test_a_file_with_no_matching_key_is_an_error(saved):
    _, adapter, _ = saved
    _renamed(adapter, lambda k: k.replace(".layers.", ".blocks."))
    with pytest.raises(CoreLoraError, match=r"no values for 14 of 14 adapted layers .*blocks.*another model"):
        PeftModel.from_pretrained(llama(), adapter)


def test_a_file_without_some_layers_is_an_error(saved):
    _, adapter, _ = saved
    _renamed(adapter, lambda k: None if ".1.mlp.up_proj." in k else k)
    with pytest.raises(CoreLoraError, match=r"no values for 1 of 14 adapted layers \(.*layers.1.mlp.up_proj"):
        PeftModel.from_pretrained(llama(), adapter)


def test_a_file_without_some_factors_is_an_error(saved):
    _, adapter, _ = saved
    _renamed(adapter, lambda k: None if "layers.0.self_attn.q_proj.corelora_B" in k else k)
    with pytest.raises(CoreLoraError, match=r"q_proj: no values were loaded for corelora_B.weight"):
        PeftModel.from_pretrained(llama(), adapter)


def test_transformers_and_no_matching_key(saved):
    """Where the loader is not PEFT's, the first use refuses at the latest."""
    _, adapter, _ = saved
    _renamed(adapter, lambda k: k.replace(".layers.", ".blocks."))
    model = llama()
    model.load_adapter(str(adapter))
    with pytest.raises(CoreLoraError, match="no values were loaded for"):
        logits(model)


def test_an_injected_adapter_that_got_nothing(saved):
    _, adapter, _ = saved
    loaded = PeftConfig.from_pretrained(adapter)
    model = get_peft_model(llama(), loaded)
    set_peft_model_state_dict(model, {})
    with pytest.raises(CoreLoraError, match=r"no values were loaded for .*set the config's adapter_format to None"):
        logits(model)


def test_another_base_is_refused(saved):
    _, adapter, _ = saved
    torch.manual_seed(99)
    other = LlamaForCausalLM(llama().config)
    with pytest.raises(CoreLoraError, match="made on another base model"):
        PeftModel.from_pretrained(other, adapter)


def test_the_same_base_in_bf16_passes(saved):
    _, adapter, expected = saved
    model = PeftModel.from_pretrained(llama().to(torch.bfloat16), adapter).eval()
    assert (logits(model).float() - expected).abs().max() < 0.05 * expected.abs().max()


# -- the card ----------------------------------------------------------------------------------------------------------


def test_model_card(tmp_path):
    model = trained("inttune")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\n")
    for part in (
        "library_name: peft",
        "- corelora",
        "import corelora",
        "corelora export",
        "**inttune**",
        "### Framework",
    ):
        assert part in text, part
    own = "A line that the user wrote."
    (tmp_path / "README.md").write_text(text + own + "\n")
    model.save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert own in again
    assert again.count("corelora: begin") == 1
    assert again.count("library_name") == 1


def test_card_beside_a_named_adapter_and_from_transformers(tmp_path):
    model = trained("nora")
    model.add_adapter("second", config("lora"))
    model.save_pretrained(tmp_path)
    assert "**lora**" in (tmp_path / "second" / "README.md").read_text()
    plain = llama()
    plain.add_adapter(config("nlora", task_type=None))
    plain.save_pretrained(tmp_path / "plain")
    assert "import corelora" in (tmp_path / "plain" / "README.md").read_text()


def test_without_corelora_the_name_is_in_the_message(saved, driver):
    _, adapter, _ = saved
    assert child(driver, "without_corelora", str(adapter)).strip() == "KeyError 'CORELORA'"
    assert "`KeyError: 'CORELORA'`" in (adapter / "README.md").read_text()


def test_push_to_hub_uploads_the_card(saved, monkeypatch):
    """What would be uploaded: the adapter, its config and the card (the hub itself is stood in for)."""
    import transformers.utils.hub

    _, adapter, _ = saved
    model = PeftModel.from_pretrained(llama(), adapter)
    uploaded = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return SimpleNamespace(repo_id=name)

        def create_commit(self, operations, **kwargs):
            uploaded.extend(o.path_in_repo for o in operations)

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    model.push_to_hub("me/it")
    assert set(uploaded) >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_layers_are_few_files(saved):
    _, adapter, _ = saved
    assert not list(adapter.glob("*.bin"))
    assert layers(PeftModel.from_pretrained(llama(), adapter))[0].cores["default"].spec.r == 4


@pytest.mark.parametrize("scale", ["unit", "orthonormal"])
def test_weights_loaded_over_an_adapter_that_drew_other_indices(scale):
    """Sampled indices come with the weights, and the scalings that belong to them are made again."""
    settings = {"sampling": "random", "slice_scale": scale, "r": 3}
    model = trained("inttune", **settings, seed=1)
    other = get_peft_model(llama(), config("inttune", **settings, seed=2))
    ours, theirs = (layers(m)[0].factors("default")["A"].index for m in (model, other))
    assert not torch.equal(ours, theirs)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(logits(other.eval()), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_modules_without_values_take_a_state(method):
    """get_peft_model(low_cpu_mem_usage=True) makes modules on the meta device; a state dict then fills them."""
    torch.manual_seed(1)
    source = get_peft_model(llama(), config(method, init_weights=False)).eval()
    target = get_peft_model(llama(), config(method), low_cpu_mem_usage=True).eval()
    assert all(p.is_meta for n, p in target.named_parameters() if "corelora_" in n)
    set_peft_model_state_dict(target, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert torch.equal(logits(target), logits(source))
