"""A start in the base weight: the same numbers, the same files, and every way back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft_models import gpt2, ids, llama

import corelora
from corelora import CoreLoraConfig
from corelora.errors import CoreLoraError
from corelora.fold import folded_layers
from corelora.kernels.fast import set_fast
from corelora.tuner_layer import CoreLoraLayer

FOLDABLE = ["nlora", "pissa"]
LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


def adapted(method="nlora", dtype=torch.float32, **settings):
    """A tiny Llama whose adapter has been trained a little."""
    config = CoreLoraConfig(**{"method": method, "r": 4, "target_modules": LINEAR, **settings})
    model = get_peft_model(llama().to(dtype), config, autocast_adapter_dtype=False)
    random = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=random).to(p)
    return model


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=ids(), **options).logits


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}


def learned(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=["off", "on"])
def path(request):
    """Plain modules, and the fused operation."""
    before = set_fast(request.param)
    yield request.param
    set_fast(before)


@pytest.mark.parametrize("method", FOLDABLE)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["f32", "bf16"])
def test_the_same_outputs_and_gradients(method, dtype, close, path):
    """Within the rounding of a weight; the parameters are the same objects, and the base is another one meanwhile."""
    model = adapted(method, dtype)
    parameters = list(model.parameters())
    before, base = logits(model), weights(model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert corelora.fold(model) == 8
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(not torch.equal(base[n], w) for n, w in weights(model).items())
    assert not any(layer.cores["default"].has_offsets for layer in folded_layers(model))
    assert_close(logits(model), before, close)
    model(input_ids=ids(), labels=ids()).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(p.grad, gradients[name], 2 * close)


@pytest.mark.parametrize("method", FOLDABLE)
def test_both_train_along_one_curve(method, path):
    """Twenty steps of AdamW from the same start."""
    losses = []
    for folded in (False, True):
        model = adapted(method)
        if folded:
            corelora.fold(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
        losses.append([])
        for step in range(20):
            loss = model(input_ids=ids(seed=step), labels=ids(seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0][-1] != pytest.approx(losses[0][0], abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_way_back(dtype):
    """Unfolded, the base is what it was bit for bit, and the offsets within the rounding of a sum."""
    model = adapted(dtype=dtype)
    base, offsets, before = weights(model), learned(model), logits(model)
    corelora.fold(model)
    corelora.fold(model)  # again: nothing happens
    corelora.unfold(model)
    corelora.unfold(model)
    assert all(torch.equal(base[n], w) for n, w in weights(model).items())
    for name, value in learned(model).items():
        assert_close(value, offsets[name], 1e-5 if dtype == torch.float32 else 5e-2)
    assert_close(logits(model), before, 1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_disabled_is_the_pretrained_model(keep):
    """Bit for bit, again and again, and folded as before afterwards."""
    plain = llama()
    model = adapted()
    corelora.fold(model, keep=keep)
    before, inside = logits(model), weights(model)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(plain))
        assert torch.equal(logits(model), before)
    assert all(torch.equal(inside[n], w) for n, w in weights(model).items())


def test_files_know_nothing_of_it(tmp_path):
    """Saved while folded, loaded anywhere: the same logits; keys and values are those of an unfolded adapter."""
    model = adapted()
    before, state = logits(model), copy.deepcopy(get_peft_model_state_dict(model))
    corelora.fold(model)
    folded = get_peft_model_state_dict(model)
    assert folded.keys() == state.keys()
    for key, value in folded.items():
        assert_close(value, state[key], 1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(logits(again), before, 1e-5)
    assert corelora.fold(again) == 8
    assert_close(logits(again), before, 1e-5)


def test_a_whole_state_dict_goes_round():
    """Taken while folded it holds the pretrained weights and offsets; loaded while folded, the fold is made anew."""
    model, other = adapted(), adapted()
    state = copy.deepcopy(model.state_dict())
    corelora.fold(model)
    for key, value in model.state_dict().items():
        assert_close(value, state[key], 1e-5)
    corelora.fold(other)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.add_(0.1)
    other.load_state_dict(model.state_dict())
    assert len(folded_layers(other)) == 8
    assert_close(logits(other), logits(model), 1e-5)


def test_merged_exported_copied(tmp_path):
    """Each works on the adapter as it is without the fold."""
    model = adapted()
    base, before = weights(model), logits(model)
    corelora.fold(model)
    twin = copy.deepcopy(model)
    assert_close(logits(twin), before, 1e-5)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_close(logits(torch.load(buffer, weights_only=False)), before, 1e-5)
    corelora.export_lora(model, tmp_path / "lora")
    corelora.fold(model)
    model.merge_adapter()
    assert not folded_layers(model)
    assert_close(logits(model), before, 1e-5)
    model.unmerge_adapter()
    for name, weight in weights(model).items():
        assert_close(weight, base[name], 1e-6)
    assert_close(logits(twin.merge_and_unload()), before, 1e-5)


def test_another_adapter_does_not_see_it():
    """Adding, switching, mixing, deleting, scaling: each ends the fold or goes on rightly."""
    model = adapted()
    one = logits(model)
    model.add_adapter("other", CoreLoraConfig(method="nlora", r=2, target_modules=LINEAR))
    model.set_adapter("other")
    two = logits(model)
    model.set_adapter("default")
    corelora.fold(model)
    model.set_adapter("other")
    assert_close(logits(model), two, 1e-6)
    model.set_adapter("default")
    corelora.fold(model)
    model.eval()
    mixed = logits(model, adapter_names=["default", "__base__"])
    assert_close(mixed[0], one[0], 1e-5)
    assert_close(mixed[1], logits(llama())[1], 1e-6)
    corelora.fold(model)
    for module in model.modules():
        if isinstance(module, CoreLoraLayer):
            module.set_scale("default", 0.0)
    assert_close(logits(model), logits(llama()), 1e-6)
    corelora.fold(model)
    model.delete_adapter("default")
    assert_close(logits(model), two, 1e-6)


def test_a_move_keeps_the_fold():
    """A cast goes through offsets: the fold is made anew from the cast weights."""
    model = adapted()
    before = logits(model)
    corelora.fold(model)
    model.to(torch.float64)
    assert len(folded_layers(model)) == 8
    assert_close(logits(model).float(), before, 1e-5)


def test_what_has_nothing_to_fold_or_cannot():
    """Each by one clear sentence, all layers at once; nothing is changed."""
    with pytest.raises(CoreLoraError, match=r"nothing to fold.*start: zero.*nlora, pissa"):
        corelora.fold(adapted("lora"))
    with pytest.raises(CoreLoraError, match="nothing to fold"):
        corelora.fold(adapted("inttune"))
    model = adapted()
    with pytest.raises(CoreLoraError, match=r"no adapter is called 'defualt' here\. Adapters: default"):
        corelora.fold(model, "defualt")
    with pytest.raises(CoreLoraError, match="keep must be cpu or device, got 'disk'"):
        corelora.fold(model, keep="disk")
    model.merge_adapter()
    with pytest.raises(CoreLoraError, match=r"q_proj: an adapter is merged.*unmerge_adapter"):
        corelora.fold(model)
    model.unmerge_adapter()
    model.add_adapter("other", CoreLoraConfig(method="nlora", r=2, target_modules=LINEAR))
    model.set_adapter("other")
    with pytest.raises(CoreLoraError, match=r"active adapters are \['other'\]: call set_adapter\('default'\)"):
        corelora.fold(model)
    tied = get_peft_model(llama(tied=True), CoreLoraConfig(method="nlora", r=4, target_modules=["lm_head"]))
    with pytest.raises(CoreLoraError, match="its weight is another layer's, too"):
        corelora.fold(tied)
    assert not folded_layers(model) + folded_layers(tied)


def test_layers_of_other_kinds():
    """GPT-2's Conv1D stores its weight the other way round."""
    config = CoreLoraConfig(method="nlora", r=4, target_modules=["c_attn", "c_fc"])
    model = get_peft_model(gpt2(), config)
    before = logits(model)
    assert corelora.fold(model) == 2
    assert_close(logits(model), before, 1e-5)
    corelora.unfold(model)
    assert_close(logits(model), before, 1e-6)


def assert_close(one, other, tolerance):
    """By the largest difference, as a part of the larger tensor's largest entry."""
    error = float((one.float() - other.float()).abs().max())
    assert error <= tolerance * max(float(other.float().abs().max()), 1e-3), error
