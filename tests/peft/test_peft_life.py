"""An adapter's life in PEFT: made, listed, switched, merged, copied, deleted; several on one base."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from peft_models import METHODS, SAFE_SPREAD, bert, config, convnet, gpt2, ids, layers, llama, logits, loss_of, train
from peft_models import trained as trained_model
from torch import nn
from transformers import LlamaForCausalLM

import corelora
from corelora.errors import CoreLoraError
from corelora.tuner_layer import CoreLoraLayer


@pytest.mark.parametrize("method", METHODS)
def test_disable_is_the_base_bit_for_bit(method):
    expected = logits(llama())
    model = trained_model(method)
    assert (logits(model) - expected).abs().max() > SAFE_SPREAD
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), expected)
    model.base_model.enable_adapter_layers()
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", METHODS)
def test_only_adapters_learn(method):
    model = get_peft_model(llama(), config(method))
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    assert learning
    assert all("corelora_" in n for n in learning)


def _bert_loss(model):
    return model(input_ids=ids(), labels=torch.tensor([0, 1])).loss


def _gpt2_loss(model):
    return loss_of(model, ids())


def _conv_loss(model):
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return nn.functional.cross_entropy(model(images), torch.tensor([0, 1]))


MODELS = {
    "bert": (bert, _bert_loss, ["query", "value", "dense", "word_embeddings"]),
    "gpt2": (gpt2, _gpt2_loss, ["c_attn", "c_proj", "wte"]),
    "convnet": (convnet, _conv_loss, ["plain", "point", "grouped", "head"]),
}


@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora", "pissa"])
@pytest.mark.parametrize("kind", MODELS)
def test_other_models_learn_merge_and_unmerge(kind, method):
    make, loss, targets = MODELS[kind]
    base = make()
    expected = {k: v.clone() for k, v in base.state_dict().items()}
    with torch.no_grad():
        first = float(loss(base))
    model = get_peft_model(base, config(method, r=2, target_modules=targets, task_type=None, start=None))
    model.eval()
    with torch.no_grad():
        assert float(loss(model)) == pytest.approx(first, abs=1e-5)  # default starts are the identity
    losses = train(model, lambda: loss(model), steps=3, lr=1e-2)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        after = float(loss(model))
        model.merge_adapter()
        assert float(loss(model)) == pytest.approx(after, abs=1e-5)
        model.unmerge_adapter()
    for layer in layers(model):
        torch.testing.assert_close(
            layer.get_base_layer().weight.data, expected[f"{layer.key}.weight"], atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("method", METHODS)
def test_merge_unmerge_and_unload(method):
    base = logits(llama())
    model = trained_model(method)
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=2e-5, rtol=0)
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers(merged)
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
def test_unload_gives_the_base_back(method):
    expected = logits(llama())
    plain = trained_model(method).unload()
    assert not layers(plain)
    assert torch.equal(logits(plain), expected)


def test_safe_merge_refuses_nan_and_leaves_the_weight():
    model = trained_model("nlora")
    before = layers(model)[0].get_base_layer().weight.clone()
    layers(model)[0].corelora_core["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity in the merged weight"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers(model)[0].get_base_layer().weight, before)


@pytest.mark.parametrize("method", METHODS)
def test_two_adapters_do_not_see_each_other(method):
    model = trained_model(method)
    first = logits(model)
    model.add_adapter("second", config(method))
    model.set_adapter("second")
    train(model, lambda: loss_of(model, ids(seed=9)), steps=2, lr=5e-2)
    model.eval()
    second = logits(model)
    assert (first - second).abs().max() > SAFE_SPREAD
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any("default" in n for n, _ in model.named_parameters())
    assert not any("default" in n for n, _ in model.named_buffers())


def test_two_methods_on_one_base():
    model = trained_model("nlora")
    first = logits(model)
    model.add_adapter("other", config("nora", target_modules=["q_proj"]))
    model.set_adapter("other")
    train(model, lambda: loss_of(model, ids()))
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), first)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    q = layers(model)[0]
    x = torch.randn(3, 16)
    with torch.no_grad():
        parts = q.adapter_output("default", x) + q.adapter_output("other", x)
        torch.testing.assert_close(q(x) - q.base_layer(x), parts, atol=1e-5, rtol=0)
    assert not torch.equal(both, first)


def test_deleting_a_merged_adapter_is_refused_or_harmless():
    model = trained_model("nlora")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


@pytest.mark.parametrize("other", ["nlora", "lora", "pissa"])
def test_adding_beside_a_merged_adapter_is_refused(other):
    """A Nystrom or SVD start would read merged weights, so nothing is added, and the model stays whole."""
    model = trained_model("nlora")
    expected = logits(model)
    model.merge_adapter()
    with pytest.raises(CoreLoraError, match="unmerge before adding an adapter"):
        model.add_adapter("second", config(other))
    assert list(model.peft_config) == ["default"]
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)


def test_merging_twice_or_two_adapters():
    model = trained_model("nlora")
    model.add_adapter("second", config("inttune"))
    model.set_adapter("second")
    train(model, lambda: loss_of(model, ids()), lr=5e-2)
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    expected = logits(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="following adapters were merged|Already following"):
        model.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_pickle_and_deepcopy(method):
    model = trained_model(method)
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        train(twin, lambda twin=twin: loss_of(twin, ids()), lr=5e-2)
        assert (logits(twin) - expected).abs().max() > SAFE_SPREAD
        assert torch.equal(logits(model), expected)  # the copy shares nothing that learns


def test_inject_adapter_in_model():
    model = inject_adapter_in_model(config("nlora", task_type=None), llama())
    assert isinstance(model, LlamaForCausalLM)
    assert len(layers(model)) == 14
    assert torch.equal(logits(model.eval()), logits(llama()))  # the default start is the identity
    losses = train(model, lambda: loss_of(model, ids()), steps=3)
    assert losses[-1] < losses[0]


def test_all_linear_leaves_the_head_alone():
    model = get_peft_model(llama(), config("nlora", target_modules="all-linear"))
    kinds = {layer.key.rsplit(".", 1)[-1] for layer in layers(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_targets_that_match_nothing_are_an_error():
    with pytest.raises(ValueError, match="'nowhere' matches no module"):
        get_peft_model(llama(), config("nlora", target_modules=["nowhere"]))


def test_target_parameters_are_refused():
    with pytest.raises(CoreLoraError, match="target_parameters is not supported: name modules in target_modules"):
        config("lora", target_parameters=["experts.w1"])


def test_repr_counts_and_status(capsys):
    model = get_peft_model(llama(), config("inttune"))
    text = repr(model)
    assert "corelora.CoreLoraLinear" in text
    assert "live rows of the base weight" in text
    model.print_trainable_parameters()
    assert f"trainable params: {14 * 4 * 4:,}" in capsys.readouterr().out
    status = get_model_status(model)
    assert status.peft_types == {"default": "CORELORA"}
    assert (status.adapter_model_type, status.trainable_params, status.num_adapter_layers) == ("CoreLoraModel", 224, 14)
    assert status.requires_grad == {"default": True}
    assert status.enabled is True
    status = get_layer_status(model)
    assert len(status) == 14
    assert status[0].available_adapters == ["default"]
    model.add_adapter("second", config("nora"))
    status = get_model_status(model)
    assert status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}


def test_set_adapter_moves_requires_grad():
    model = get_peft_model(llama(), config("nlora"))
    model.add_adapter("second", config("nlora"))
    for active, idle in (("default", "second"), ("second", "default")):
        model.set_adapter(active)
        learning = [n for n, p in model.named_parameters() if p.requires_grad]
        assert learning
        assert all(f".{active}." in n for n in learning)
        assert not any(f".{idle}." in n for n in learning)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_adapter_dtype(dtype):
    for asked, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(llama().to(dtype), config("nlora"), autocast_adapter_dtype=asked)
        found = {p.dtype for n, p in model.named_parameters() if "corelora_" in n}
        assert found == {expected}
        assert logits(model).dtype == dtype
        base = logits(llama().to(dtype))
        assert torch.equal(logits(model), base)  # the identity start, bit for bit in any type


@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
def test_bf16_base_and_autocast_train(method):
    model = get_peft_model(llama().to(torch.bfloat16), config(method))
    losses = train(model, lambda: loss_of(model, ids()), steps=4, lr=2e-2)
    assert losses[-1] < losses[0]
    model = get_peft_model(llama(), config(method))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, ids())

    losses = train(model, loss, steps=4, lr=2e-2)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("bias", ["none", "all", "corelora_only"])
def test_bias_as_in_lora(bias):
    model = get_peft_model(bert(), config("lora", target_modules=["query"], task_type=None, bias=bias))
    learning = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    every = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    expected = {"none": set(), "all": every, "corelora_only": {n for n in every if ".query." in n}}
    assert learning == expected[bias]


def test_modules_to_save():
    model = get_peft_model(bert(), config("nlora", target_modules=["query"], task_type="SEQ_CLS"))
    assert any("classifier.modules_to_save.default" in n for n, p in model.named_parameters() if p.requires_grad)


def test_layers_to_transform_and_exclude():
    model = get_peft_model(llama(), config("lora", target_modules=["q_proj", "v_proj"], layers_to_transform=[1]))
    assert {layer.key.split(".")[-3] for layer in layers(model)} == {"1"}
    model = get_peft_model(llama(), config("lora", exclude_modules=["q_proj"]))
    assert "q_proj" not in {layer.key.rsplit(".", 1)[-1] for layer in layers(model)}


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
@pytest.mark.parametrize("method", ["lora", "nlora"])
def test_tied_embeddings(method, targets, tmp_path):
    """A tied weight is one tensor under two layers: each adapter acts on its own side, and no merge leaks."""
    base = logits(llama(tied=True))
    model = get_peft_model(llama(tied=True), config(method, target_modules=targets))
    train(model, lambda: loss_of(model, ids()), lr=5e-2)
    model.eval()
    expected = logits(model)
    assert (expected - base).abs().max() > SAFE_SPREAD
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    model.unmerge_adapter()
    tied = [m.weight for n, m in model.named_modules() if n.endswith(("embed_tokens.base_layer", "lm_head.base_layer"))]
    assert len({id(weight) for weight in tied}) == 1
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=0)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected, atol=2e-5, rtol=0)


def test_layer_type():
    assert all(isinstance(layer, CoreLoraLayer) for layer in layers(get_peft_model(llama(), config("lora"))))
    assert corelora.CoreLoraConfig().peft_type.value == "CORELORA"
