"""bitsandbytes on a CPU: bases in 8 and 4 bits, trained on, saved, loaded, disabled, merged."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft_models import SAFE_SPREAD, config, ids, layers, llama, logits, loss_of, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

METHODS = ["lora", "nlora", "inttune", "nora", "pissa", "slora"]


def _float():
    """Wide enough for the blocks of the 4-bit kernels."""
    return llama(width=128)


BITS = {
    8: BitsAndBytesConfig(load_in_8bit=True),
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """A function from bits to a freshly quantised tiny Llama, loaded as users do."""
    folder = tmp_path_factory.mktemp("base")
    _float().save_pretrained(folder)
    return lambda bits: AutoModelForCausalLM.from_pretrained(folder, quantization_config=BITS[bits]).eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", METHODS)
def test_train_disable_save_and_load(base_of, bits, method, tmp_path):
    base = base_of(bits)
    assert {p.dtype for p in base.parameters() if p.ndim == 2} >= {torch.int8 if bits == 8 else torch.uint8}
    first = logits(base)
    model = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), config(method))
    assert len(layers(model)) == 14
    torch.testing.assert_close(logits(model.eval()), first, atol=1e-5, rtol=0)  # default starts are the identity
    losses = train(model, lambda: loss_of(model, ids()), steps=3)
    assert losses[-1] < losses[0]
    model.eval()
    expected = logits(model)
    assert (expected - first).abs().max() > SAFE_SPREAD
    with model.disable_adapter():
        assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(bits), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    if method in ("nlora", "inttune"):  # slices of a quantised weight are kept in the file
        stored = [k for k in load_file(tmp_path / "adapter_model.safetensors") if k.endswith(".start")]
        assert len(stored) >= 28


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["lora", "nlora", "nora"])
def test_merge_rounds_the_sum_once(base_of, bits, method):
    """The merged weight is bitsandbytes' own rounding of W + delta; small changes vanish, hence the warning."""
    model = get_peft_model(base_of(bits), config(method))
    train(model, lambda: loss_of(model, ids()), steps=3)
    model.eval()
    expected = {}
    for layer in layers(model):
        total = layer.weight_access.full() + layer.get_delta_weight("default")
        if bits == 4:
            code, state = bnb.functional.quantize_4bit(total, quant_type="nf4", blocksize=64)
            expected[layer.key] = bnb.functional.dequantize_4bit(code, state)
        else:  # one scale a row
            scale = total.abs().amax(1, keepdim=True) / 127
            expected[layer.key] = (total / scale).round() * scale
    with pytest.warns(UserWarning, match="rounds the sum to that storage"):
        model.merge_adapter()
    for layer in layers(model):
        step = expected[layer.key].abs().amax() / (127 if bits == 8 else 1e4)
        torch.testing.assert_close(layer.weight_access.full(), expected[layer.key], atol=1.1 * step.item(), rtol=0)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not layers(merged)
    assert torch.equal(logits(merged), logits(model))


@pytest.mark.parametrize("method", ["lora", "nlora"])
def test_merge_and_unmerge_in_8_bits_are_near(base_of, method):
    base = base_of(8)
    first = logits(base)
    model = get_peft_model(base, config(method))
    train(model, lambda: loss_of(model, ids()), steps=3)
    expected = logits(model.eval())
    moved = (expected - first).norm()
    model.merge_adapter()
    assert (logits(model) - expected).norm() < 0.1 * moved
    model.unmerge_adapter()
    assert (logits(model) - expected).norm() < 0.1 * moved


@pytest.mark.parametrize("bits", [8, 4])
def test_a_float_adapter_loads_on_the_quantised_base(base_of, bits, tmp_path):
    """The fingerprint lets the same model in fewer bits pass."""
    model = get_peft_model(_float(), config("nlora"))
    train(model, lambda: loss_of(model, ids()))
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    base = base_of(bits)
    rounding = (logits(base) - logits(_float())).norm()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert (logits(loaded) - expected).norm() < 3 * rounding
