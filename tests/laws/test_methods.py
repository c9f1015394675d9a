"""The laws for every registered method x layer kind x storage. A new method inherits them from the registry."""

from __future__ import annotations

import tempfile

import pytest
import torch
from peft import PeftModel

from corelora.registry import METHODS
from laws.cases import (
    KINDS,
    ODD_KINDS,
    ROUNDING,
    TOLERANCE,
    R,
    adapted,
    base_model,
    batch,
    close,
    config,
    explicit_delta,
    layer_of,
    matrix_of,
    numbers_of,
    run_plain,
    stir,
    variants,
)

DTYPES = [torch.float32, torch.bfloat16]
EVERY = [(m, v, k, d) for m, v in variants() for k in KINDS for d in DTYPES]
EVERY += [("nlora", "default", k, d) for k in ODD_KINDS for d in DTYPES]


def _name(case) -> str:
    method, variant, kind, dtype = case
    return f"{method}-{variant}-{kind}-{str(dtype).removeprefix('torch.')}"


def _opened(param):
    method, variant, kind, dtype = param
    choices = METHODS[method].choices(variant)

    def conf(**settings):
        return config(kind, choices, method=method, variant=variant, **settings)

    return conf, kind, dtype


@pytest.fixture(params=EVERY, ids=_name)
def case(request):
    """(config maker, layer kind, dtype): the config maker takes more settings."""
    return _opened(request.param)


@pytest.fixture(params=[c for c in EVERY if c[3] == torch.float32], ids=lambda c: _name((*c[:3], torch.float64)))
def case64(request):
    """(config maker, layer kind), for laws in float64."""
    return _opened(request.param)[:2]


def _expected(layer, W, x):
    """(output of the base, output with the adapter) in float64 by plain PyTorch."""
    W = W.double()
    delta = explicit_delta(layer, numbers_of(layer, W)).detach()
    return run_plain(layer.get_base_layer(), W, x), run_plain(layer.get_base_layer(), W + delta, x)


@torch.no_grad()
def test_factored_path_equals_dense_delta(case):
    """The path's output is that of plain PyTorch with W + scale * (B core A - B0 core0 A0)."""
    conf, kind, dtype = case
    model, x = adapted(kind, conf(), dtype), batch(kind, dtype)
    stir(model)
    layer = layer_of(model)
    plain, expected = _expected(layer, matrix_of(layer.get_base_layer()), x)
    close(model(x), expected, dtype)
    # The adapter's own part, which a large base output could hide.
    close(layer.adapter_output("default", x), expected - plain, dtype)
    W = matrix_of(layer.get_base_layer())
    delta = explicit_delta(layer, numbers_of(layer, W.double())).detach()
    close(layer.view.matrix(layer.get_delta_weight("default")), delta, dtype)


@torch.no_grad()
def test_first_output_is_what_start_says(case):
    """`zero` and `subtract` begin at the pretrained model, bit for bit; `as_is` at W + scale * B core A."""
    conf, kind, dtype = case
    model, x = adapted(kind, conf(), dtype), batch(kind, dtype)
    pretrained = base_model(kind, dtype)(x)
    layer = layer_of(model)
    if layer.cores["default"].spec.choices.start in ("zero", "subtract"):
        assert torch.equal(model(x), pretrained)
    else:
        plain, expected = _expected(layer, matrix_of(layer.get_base_layer()), x)
        assert float((expected - plain).abs().max()) > 0
        close(layer.adapter_output("default", x), expected - plain, dtype)


@torch.no_grad()
def test_merge_then_unmerge_gives_the_weight_back(case):
    """Merged outputs are the adapter's; unmerging loses no more than the storage rounds."""
    conf, kind, dtype = case
    model, x = adapted(kind, conf(), dtype), batch(kind, dtype)
    stir(model)
    layer = layer_of(model)
    before = layer.get_base_layer().weight.detach().clone()
    delta = layer.get_delta_weight("default")
    expected = model(x)
    layer.merge(safe_merge=True)
    merged = layer.get_base_layer().weight
    size = (before.float().abs() + delta.abs()).double()
    assert ((merged.double() - before.double() - delta.double()).abs() <= ROUNDING[dtype] * size).all()
    close(model(x), expected, dtype)
    layer.unmerge()
    assert ((layer.get_base_layer().weight.double() - before.double()).abs() <= 2 * ROUNDING[dtype] * size).all()
    assert not layer.merged


def test_only_train_moves_and_every_trained_factor_does(case):
    """After optimiser steps each trained factor differs; the base, the starts and the indices are bit for bit equal."""
    conf, kind, dtype = case
    model, x = adapted(kind, conf(), dtype).train(), batch(kind, dtype)
    layer = layer_of(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    goal = torch.randn_like(model(x))
    for _ in range(3):
        (model(x).float() - goal.float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    assert after.keys() == before.keys()
    moved = {n for n in after if not torch.equal(after[n], before[n].to(after[n].dtype))}
    assert moved == trained
    spec = layer.cores["default"].spec
    parts = {slot: slot if slot in "AB" else "core" for slot in layer.cores["default"].plans}
    learning = {slot for slot, part in parts.items() if part in spec.choices.train}
    assert trained == {f"base_model.model.layer.corelora_{slot}.default.weight" for slot in learning}


@torch.no_grad()
def test_save_and_load_change_nothing(case):
    """A PEFT folder, loaded on a fresh base under another random seed, gives the same output bit for bit."""
    conf, kind, dtype = case
    model, x = adapted(kind, conf(), dtype), batch(kind, dtype)
    stir(model)
    expected = model(x)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = base_model(kind, dtype)
        torch.manual_seed(12345)
        # Trainable as the saved one: PyTorch picks another convolution kernel for weights that need no gradient.
        loaded = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
        assert torch.equal(loaded(x), expected)


@torch.no_grad()
def test_disabled_is_pretrained_bit_for_bit(case):
    """Disabling gives the pretrained output, and enabling the adapter's again."""
    conf, kind, dtype = case
    model, x = adapted(kind, conf(), dtype), batch(kind, dtype)
    stir(model)
    expected = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base_model(kind, dtype)(x))
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_adapters_do_not_see_each_other(case):
    """A second adapter changes nothing of the first; alone it is what it is on a base without the first."""
    conf, kind, dtype = case
    model, x = adapted(kind, conf(), dtype), batch(kind, dtype)
    stir(model, seed=5)
    first = model(x)
    torch.manual_seed(3)
    model.add_adapter("second", conf())
    assert torch.equal(model(x), first)
    model.set_adapter("second")
    stir(model, seed=6)
    alone = adapted(kind, conf(), dtype)
    stir(alone, seed=6)
    assert torch.equal(model(x), alone(x))
    model.set_adapter("default")
    assert torch.equal(model(x), first)


@torch.no_grad()
def test_adapters_merged_one_by_one_add_up(case):
    """Merging one adapter and then another gives W + both deltas: a merged weight is nobody's start."""
    conf, kind, dtype = case
    model = adapted(kind, conf(), dtype)
    stir(model, seed=5)
    torch.manual_seed(9)
    model.add_adapter("second", conf(r=R - 1, inner_r=1))
    model.set_adapter("second")
    stir(model, seed=6)
    layer = layer_of(model)
    W = layer.get_base_layer().weight.detach().double().clone()
    first, second = (layer.get_delta_weight(n).double() for n in ("default", "second"))
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    size = W.abs() + first.abs() + second.abs()
    assert ((layer.get_base_layer().weight - W - first - second).abs() <= 2 * ROUNDING[dtype] * size).all()
    layer.unmerge()
    assert ((layer.get_base_layer().weight - W).abs() <= 4 * ROUNDING[dtype] * size).all()


@torch.no_grad()
def test_scale_is_alpha_over_r(case):
    """The adapter's part grows with alpha: alpha / r, or alpha / sqrt(r) under use_rslora, and 1 by default."""
    conf, kind, dtype = case
    x = batch(kind, dtype)
    parts = []
    for settings, scale in (({"alpha": None}, 1.0), ({"alpha": 8.0}, 2.0), ({"alpha": 8.0, "use_rslora": True}, 4.0)):
        model = adapted(kind, conf(**settings), dtype)
        stir(model)
        parts.append((layer_of(model).adapter_output("default", x), scale))
    unit = parts[0][0].double()
    for part, scale in parts[1:]:
        close(part, scale * unit, dtype)


def test_gradients_equal_those_of_the_explicit_formula(case64):
    """In float64, by autograd on W + scale * (B core A - B0 core0 A0); the input's gradient too."""
    conf, kind = case64
    model, x = adapted(kind, conf(), torch.float64), batch(kind, torch.float64)
    if not x.is_floating_point():
        x = x.masked_fill(x == 1, 0)  # no padding token: PyTorch gives its row of W no gradient, PEFT only A's column
    stir(model)
    layer = layer_of(model)
    base = layer.get_base_layer()
    W = matrix_of(base).clone()
    numbers = numbers_of(layer, W)
    x_ref = x.clone()
    if x.is_floating_point():
        x.requires_grad_()
        x_ref.requires_grad_()
    expected = run_plain(base, W + explicit_delta(layer, numbers), x_ref)
    out = model(x)
    close(out, expected, torch.float64)
    probe = torch.randn_like(expected)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    for slot, leaf in numbers.trained.items():
        assert leaf.grad is not None
        close(layer.factors("default")[slot].weight.grad, leaf.grad, torch.float64)
    if x.is_floating_point():
        close(x.grad, x_ref.grad, torch.float64)


def test_the_tolerances_are_tight_enough_to_see_an_error():
    """A core off by one part in ten in one entry is seen at every tolerance above."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert TOLERANCE[dtype] < 0.1
        with pytest.raises(AssertionError, match="relative"):
            close(torch.tensor([1.0, 0.9]), torch.tensor([1.0, 1.0]), dtype)
