"""The laws on bitsandbytes 8-bit and 4-bit Linear layers, on the CPU, for every method."""

from __future__ import annotations

import tempfile

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from corelora import CoreLoraConfig
from corelora.registry import METHODS
from laws.cases import K, close, layer_of, read_numbers, run_plain, stats_for, stir, variants
from laws.cases import explicit_delta as explicit

OUT, IN, R = 96, 64, 8  # 4-bit quantisation works in blocks of 64
# Of the weight's norm: what storing it in so many bits loses.
STEP = {"int8": 0.01, "nf4": 0.12}
STORAGES = list(STEP)


class Net(nn.Module):
    """One linear layer, quantised or not; the same seed gives the same weight before it is quantised."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        plain = nn.Linear(IN, OUT)
        with torch.no_grad():
            plain.weight.mul_(3)
        self.layer = plain
        if storage == "int8":
            self.layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=0.0)
        elif storage == "nf4":
            self.layer = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.float32)
        if storage != "plain":
            self.layer.load_state_dict(plain.state_dict())
            self.layer.to("cpu")  # quantises
        self.eval()

    def forward(self, x):
        return self.layer(x)


def stored(layer: nn.Module) -> torch.Tensor:
    """W[o,i] as bitsandbytes itself gives it back."""
    layer.state_dict()  # bitsandbytes undoes the packing of inference
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB  # the first pass moves it
        return weight.data.float() * scale[:, None] / 127
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()


def adapted(storage: str, method: str, variant: str, **settings):
    conf = CoreLoraConfig(
        method=method,
        variant=variant,
        r=R,
        inner_r=K,
        target_modules=["layer"],
        stats=stats_for(METHODS[method].default.outer, OUT, IN),
        **settings,
    )
    net = Net(storage)
    torch.manual_seed(3)
    return get_peft_model(net, conf).eval()


def batch() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(5, IN)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(params=[(s, m, v) for m, v in variants() for s in STORAGES], ids="-".join)
def case(request):
    """(storage, method, variant)."""
    return request.param


@torch.no_grad()
def test_path_equals_dense_delta(case):
    """The adapter's part is that of W + delta with W as bitsandbytes gives it back."""
    storage = case[0]
    model, x = adapted(*case), batch()
    stir(model, 0.02)
    layer = layer_of(model)
    W = stored(layer.get_base_layer())
    numbers = read_numbers(layer.factors("default"), W.double())
    delta = explicit(layer, numbers).detach()
    part = x.double() @ delta.T
    close(layer.adapter_output("default", x), part, torch.float32)
    close(layer.get_delta_weight("default"), delta, torch.float32)
    size = float(model(x).abs().max())
    close(model(x) - Net(storage)(x), part, torch.float32, size)


@torch.no_grad()
def test_first_output_and_disabled_are_the_quantised_models_bit_for_bit(case):
    """`zero` and `subtract` begin at the quantised model, exactly; disabling gives it back after training."""
    model, x = adapted(*case), batch()
    base = Net(case[0])(x)
    if layer_of(model).cores["default"].spec.choices.start != "as_is":
        assert torch.equal(model(x), base)
    stir(model)
    assert not torch.equal(model(x), base)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


@torch.no_grad()
def test_merge_and_unmerge_within_the_rounding_of_the_storage(case):
    """A merged weight and an unmerged one are each one quantisation away from where they should be."""
    storage = case[0]
    model, x = adapted(*case), batch()
    stir(model, 0.02)
    layer, expected = layer_of(model), model(x)
    W = stored(layer.get_base_layer())
    delta = layer.get_delta_weight("default")
    layer.merge(safe_merge=True)
    assert relative(stored(layer.get_base_layer()), W + delta) < STEP[storage]
    assert relative(model(x), expected) < 1.5 * STEP[storage]
    layer.unmerge()
    assert relative(stored(layer.get_base_layer()), W) < 2 * STEP[storage] * float((W + delta).norm() / W.norm())


def test_only_train_moves(case):
    """Optimiser steps leave the quantised weight and every start as they were."""
    model, x = adapted(*case).train(), batch()  # in eval mode some CPUs pack 4-bit weights anew at each pass
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    goal = torch.randn(5, OUT)
    for _ in range(3):
        (model(x) - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    assert {n for n in before if not torch.equal(after[n], before[n])} == trained


@torch.no_grad()
def test_save_and_load_change_nothing(case):
    """On the same quantised base: the same output bit for bit."""
    model, x = adapted(*case), batch()
    stir(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        net = Net(case[0])
        torch.manual_seed(99)
        assert torch.equal(PeftModel.from_pretrained(net, folder, is_trainable=True).eval()(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("way", ["plain_to_quantised", "quantised_to_plain"])
def test_quantised_stays_near_plain(case, way):
    """An adapter trained on one storage and loaded on the other does nearly the same there."""
    storage, method, variant = case
    here, there = ("plain", storage) if way == "plain_to_quantised" else (storage, "plain")
    model, x = adapted(here, method, variant), batch()
    stir(model, 0.02)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        net = Net(there)
        torch.manual_seed(99)
        loaded = PeftModel.from_pretrained(net, folder).eval()
        assert relative(loaded(x), model(x)) < 1.5 * STEP[storage]
        part, other = (layer_of(m).adapter_output("default", x) for m in (model, loaded))
        assert relative(other, part) < 2 * STEP[storage]


def test_weights_are_really_quantised():
    """The figures above are of this storage, not looser than it."""
    plain = Net("plain").layer.weight.detach()
    for storage, step in STEP.items():
        loss = relative(stored(Net(storage).layer), plain)
        assert step / 5 < loss < step, (storage, loss)
        assert run_plain(Net("plain").layer, plain, batch()).shape == (5, OUT)
