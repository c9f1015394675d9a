"""diffusers: a small UNet with adapters by its own add_adapter, weights through PEFT's state dict helpers, scales."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft_models import METHODS, SAFE_SPREAD, layers, train

import corelora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_shortcut"]


def unet() -> UNet2DConditionModel:
    """Two levels of 8 and 16 channels; the same at every call."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def _config(method, **changes):
    settings = {"r": 4, "target_modules": TARGETS, "stats": "weight"} | changes
    return corelora.CoreLoraConfig(method=method, **settings)


def _inputs():
    g = torch.Generator().manual_seed(4)
    return torch.randn(1, 2, 8, 8, generator=g), torch.tensor([3]), torch.randn(1, 5, 8, generator=g)


def _out(model):
    with torch.no_grad():
        return model(*_inputs()).sample


def _teach(model, steps=2):
    target = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(8))
    return train(model, lambda: (model(*_inputs()).sample - target).square().mean(), steps=steps)


def _trained(method):
    model = unet()
    model.add_adapter(_config(method), "first")
    _teach(model)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_add_adapter_train_save_and_load(method):
    base = _out(unet())
    model = _trained(method)
    expected = _out(model)
    assert (expected - base).abs().max() > SAFE_SPREAD
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name="first").items()}
    other = unet()
    other.add_adapter(_config(method), "loaded")
    set_peft_model_state_dict(other, state, adapter_name="loaded")
    torch.testing.assert_close(_out(other), expected, atol=1e-6, rtol=0)
    model.disable_adapters()
    assert torch.equal(_out(model), base)
    model.enable_adapters()
    assert torch.equal(_out(model), expected)


def test_state_dict_leaves_no_key_over():
    """Through the same helpers: only our keys, and each finds its place."""
    model = _trained("nlora")
    expected = _out(model)
    state = get_peft_model_state_dict(model, adapter_name="first")
    assert all("corelora_" in k for k in state)
    other = unet()
    other.add_adapter(_config("nlora"), "first")
    result = set_peft_model_state_dict(other, state, adapter_name="first")
    assert not result.unexpected_keys
    assert not [k for k in result.missing_keys if "corelora_" in k]
    torch.testing.assert_close(_out(other), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
def test_scales(method):
    model = _trained(method)
    layer = layers(model)[0]
    full = layer.get_delta_weight("first")
    layer.set_scale("first", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("first"), 0.5 * full)
    layer.scale_layer(4.0)
    torch.testing.assert_close(layer.get_delta_weight("first"), 2.0 * full)
    layer.unscale_layer(4.0)
    torch.testing.assert_close(layer.get_delta_weight("first"), 0.5 * full)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("first"), full)
    layer.set_scale("nobody", 3.0)  # an adapter that this layer lacks
    torch.testing.assert_close(layer.get_delta_weight("first"), full)


def test_set_adapters_with_weights():
    model = _trained("nlora")
    base, full = _out(unet()), _out(model)
    model.set_adapters("first", weights=[0.0])
    torch.testing.assert_close(_out(model), base, atol=1e-6, rtol=0)
    model.set_adapters("first", weights=[1.0])
    torch.testing.assert_close(_out(model), full, atol=1e-6, rtol=0)
    model.add_adapter(_config("nora", target_modules=["to_q"]), "second")
    model.set_adapters(["first", "second"], weights=[0.5, 2.0])
    layer = next(m for m in layers(model) if "second" in m.cores)
    assert layer.active_adapters == ["first", "second"]
    assert layer.scaling == {"first": 0.5, "second": 2.0}
    model.set_adapters(["first"], weights=[1.0])
    torch.testing.assert_close(_out(model), full, atol=1e-6, rtol=0)


def test_cross_attention_scale_argument():
    """diffusers scales the active adapters for one call (scale_layer, then unscale_layer) and puts them back."""
    model = _trained("inttune")
    base, full = _out(unet()), _out(model)
    with torch.no_grad():
        none = model(*_inputs(), cross_attention_kwargs={"scale": 0.0}).sample
        half = model(*_inputs(), cross_attention_kwargs={"scale": 0.5}).sample
    torch.testing.assert_close(none, base, atol=1e-6, rtol=0)
    assert (half - base).abs().max() > 1e-5
    assert (half - full).abs().max() > 1e-5
    torch.testing.assert_close(_out(model), full, atol=1e-6, rtol=0)


def test_fuse_and_unfuse():
    model = _trained("nlora")
    base, full = _out(unet()), _out(model)
    model.fuse_lora(adapter_names=["first"])
    torch.testing.assert_close(_out(model), full, atol=1e-5, rtol=0)
    model.unfuse_lora()
    torch.testing.assert_close(_out(model), full, atol=1e-5, rtol=0)
    model.delete_adapters("first")
    torch.testing.assert_close(_out(model), base, atol=1e-5, rtol=0)
