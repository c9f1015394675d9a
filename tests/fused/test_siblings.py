"""Layers that read one input, computed together: the same outputs and gradients as apart, and when they are not."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from corelora import CoreLoraConfig
from corelora.kernels import form, groups, mixed, products, siblings
from corelora.kernels.fast import set_fast
from corelora.kernels.products import Order
from corelora.registry import METHODS, OUTERS
from fused.test_core_linear import CASES, _close, kept_by


class Attention(nn.Module):
    """Three layers on one input, of different widths, one with a bias; `seen` is what each was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(37, 53, bias=False), nn.Linear(37, 21), nn.Linear(37, 40, bias=False)

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
        source = x if other is None else other
        return self.q(x), self.k(source), self.v(source)


@contextmanager
def as_on_a_gpu(monkeypatch, edit_from: int) -> Iterator[None]:
    """Orders and groups of a GPU, on CPU tensors; edits beside stored factors from so many numbers on."""
    monkeypatch.setattr(products, "EDIT_FROM", edit_from)
    modes = set_fast("on"), products.set_order(Order.BEFORE), form.set_device("cuda")
    yield
    set_fast(modes[0])
    products.set_order(modes[1])
    form.set_device(modes[2])


@pytest.fixture(autouse=True, params=[0, products.EDIT_FROM], ids=["edits", "wide"])
def _as_on_a_gpu(request, monkeypatch):
    groups._seen.__dict__.clear()
    with as_on_a_gpu(monkeypatch, request.param):
        yield


def adapted(method: str = "slora", variant: str = "default", **extra) -> nn.Module:
    torch.manual_seed(0)
    stats = "weight" if OUTERS[METHODS[method].default.outer].needs_stats else None
    targets = extra.pop("target_modules", ["q", "k", "v"])
    config = CoreLoraConfig(
        method=method, variant=variant, r=8, alpha=12, target_modules=targets, stats=stats, init_weights=False, **extra
    )
    return get_peft_model(Attention(), config, autocast_adapter_dtype=False).base_model.model


def groups_of(model: nn.Module) -> list[groups.Group]:
    found = {id(g): g for m in (model.q, model.k, model.v) if (g := groups._groups.get(m)) is not None}
    return list(found.values())


def outcome(model: nn.Module, x: Tensor, used: str = "qkv", other: Tensor | None = None) -> list[Tensor]:
    """Outputs that are used, and the gradients of x and of everything that trains."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    ys = [y for name, y in zip("qkv", model(x, other), strict=True) if name in used]
    sum((y * torch.randn_like(y)).sum() for y in ys).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    for p in model.parameters():
        p.grad = None
    return [*ys, x.grad, *(g for g in grads if g is not None)]


def plain(model: nn.Module, *args, **options) -> list[Tensor]:
    before = set_fast("off")
    try:
        return outcome(model, *args, **options)
    finally:
        set_fast(before)


def check(model: nn.Module, x: Tensor, **options) -> None:
    for a, b in zip(outcome(model, x, **options), plain(model, x, **options), strict=True):
        _close(a, b, torch.float32)


def grouped(model: nn.Module, x: Tensor) -> groups.Group:
    """After one pass they are a group, which computes the second."""
    outcome(model, x)
    assert groups_of(model) == []
    outcome(model, x)
    [group] = groups_of(model)
    assert group.call is not None
    return group


@pytest.mark.parametrize(("method", "variant", "extra"), CASES, ids=str)
def test_together_as_apart(method, variant, extra):
    """Every serial method: outputs, and the gradients of x and every factor; x comes back bit for bit."""
    model, x = adapted(method, variant, **extra), torch.randn(3, 5, 37)
    before = x.clone()
    group = grouped(model, x)
    check(model, x)
    assert groups_of(model) == [group]
    assert not group.waiting
    assert torch.equal(x, before)
    with torch.no_grad():
        found, mode = model(x), set_fast("off")
        for a, b in zip(found, model(x), strict=True):
            _close(a, b, torch.float32)
        set_fast(mode)


@pytest.mark.parametrize(
    ("method", "extra", "times"),
    [("inttune", {}, 1), ("nlora", {}, 1), ("inttune", {"sampling": "random"}, 0), ("nora", {}, 0)],
    ids=str,
)
def test_leading_columns_are_put_back_once_for_all(method, extra, times, monkeypatch):
    """Columns of W write by an edit of x: where all edit the same ones, they are copied and put back once."""
    monkeypatch.setattr(products, "EDIT_FROM", 0)
    model, x = adapted(method, **extra), torch.randn(4, 37)
    grouped(model, x)
    held, hold = [], siblings.hold_columns
    monkeypatch.setattr(siblings, "hold_columns", lambda *given: held.append(1) or hold(*given))
    check(model, x)
    assert len(held) == times


@pytest.mark.parametrize("used", ["qkv", "kv"])
def test_orthonormal_slices_go_through_their_transforms_together(used):
    """Two batched products a pass, also where a part of the group is asked for; nothing relies on their symmetry."""
    model, x = adapted("inttune", slice_scale="orthonormal"), torch.randn(4, 37)
    grouped(model, x)
    check(model, x, used=used)
    layers = [getattr(model, name) for name in used]
    makers = [layer.form_maker(x) for layer in layers]
    cores = [maker.make()[2:4] for maker in makers]
    gradient = torch.randn(len(used), 8, 8)
    for own in (True, False):
        for maker in () if own else makers:
            maker.mixers = torch.randn(8, 8), torch.randn(8, 8)
        found = mixed.expand_all(makers, cores), mixed.collapse_all(makers, gradient, cores)
        assert makers[0].stacked_mixers is not None
        for n, (maker, core) in enumerate(zip(makers, cores, strict=True)):
            torch.testing.assert_close(found[0][n], maker.expand(*core))
            torch.testing.assert_close(found[1][n], maker.collapse(gradient[n], *core))
            assert makers[0].stacked_mixers[2][n] is maker.mixers


@pytest.mark.parametrize(("method", "variant", "extra"), CASES, ids=str)
def test_a_recording_keeps_nothing(method, variant, extra, monkeypatch):
    """Its memory is written over when it runs again, and what it reads must stay: it makes nothing that is kept, and
    nothing takes the place of what the pass before it has made."""
    model, x = adapted(method, variant, **extra), torch.randn(3, 5, 37)
    outcome(model, x)  # apart; the next pass is together, and recorded
    makers = [maker for layer in (model.q, model.k, model.v) if (maker := layer.form_maker(x)) is not None]
    kept = lambda: {tensor.data_ptr() for maker in makers for tensor in kept_by(maker)}  # noqa: E731
    before = kept()
    with monkeypatch.context() as patch:
        patch.setattr(mixed, "is_recording", lambda like: True)
        check(model, x)
        assert kept() == before
    check(model, x)
    assert before <= kept()


@pytest.mark.parametrize("used", ["qkv", "kv", "q"])
@pytest.mark.parametrize("method", ["lora", "slora", "nlora", "inttune", "nora", "pissa", "lora_fa"])
def test_factors_in_float32_beside_narrow_weights(method, used, monkeypatch):
    """All factors of a group are cast in one kernel a pass; gradients are in the factors' type."""
    model, x = adapted(method), torch.randn(4, 37, dtype=torch.bfloat16)
    for layer in (model.q, model.k, model.v):
        layer.base_layer.to(torch.bfloat16)
    grouped(model, x)
    casts, cast = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *given: casts.append(len(given[0])) or cast(*given))
    found = outcome(model, x, used)
    assert len(casts) == (1 if method == "inttune" and used == "q" else 2)
    expected = plain(model, x, used)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        _close(a.float(), b.float(), torch.bfloat16)


@pytest.mark.parametrize("used", ["q", "k", "qv", "kv"])
@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
def test_outputs_that_nobody_uses(method, used):
    """They have no gradient: theirs are not made up, the others' are right."""
    model, x = adapted(method), torch.randn(4, 37)
    grouped(model, x)
    found, expected = outcome(model, x, used), plain(model, x, used)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        _close(a, b, torch.float32)


def test_only_what_is_adapted_is_a_group():
    model, x = adapted(target_modules=["q", "v"]), torch.randn(4, 37)
    group = grouped(model, x)
    assert [ref() for ref in group.layers] == [model.q, model.v]
    check(model, x)


def test_another_input_ends_the_group():
    """Cross-attention: k and v read something else. Nothing wrong comes out, and it is not tried again."""
    model, x = adapted(), torch.randn(4, 37)
    grouped(model, x)
    check(model, x, other=torch.randn(6, 37))
    assert groups_of(model) == []
    check(model, x)
    assert groups_of(model) == []


def test_an_input_that_was_changed_meanwhile_is_read_anew():
    model, x = adapted(), torch.randn(4, 37)
    grouped(model, x)
    with torch.no_grad():
        model.q(x)
        x.mul_(2)
        found = model.k(x)
        set_fast("off")
        _close(found, model.k(x), torch.float32)


def test_gradients_are_wanted_by_some_alone():
    """What was computed without gradients is not handed to a call that wants them."""
    model, x = adapted(), torch.randn(4, 37)
    grouped(model, x)
    with torch.no_grad():
        model.q(x)
    assert model.k(x).requires_grad


@pytest.mark.parametrize("method", ["slora", "nlora", "inttune", "nora"])
def test_checkpoints_from_the_first_step_on(method):
    """The pass that is repeated must save what the first one saved, whatever was learned about groups between."""
    model, x = adapted(method), torch.randn(4, 37)
    twin = copy.deepcopy(model)
    for _ in range(3):
        for one in (model, twin):
            own = x.clone().requires_grad_()
            ys = checkpoint(one, own, use_reentrant=False) if one is model else one(own)
            sum((y**2).sum() for y in ys).backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            if a.requires_grad:
                _close(a.grad, b.grad, torch.float32)


def test_second_derivatives_are_refused():
    model, x = adapted(), torch.randn(4, 37, requires_grad=True)
    grouped(model, x.detach())
    y = sum(t.sum() for t in model(x))
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        dx.sum().backward()


def test_outputs_can_be_changed_in_place():
    """As those of a plain linear layer can: rotary embeddings and activations do."""
    model, x = adapted(), torch.randn(2, 3, 37)
    grouped(model, x)
    ys = model(x.clone().requires_grad_())
    for y in ys:
        y.mul_(2)
    sum(y.sum() for y in ys).backward()


def test_switches_between_passes_are_seen():
    """Another adapter, none, and a merged one: the group computes what the layers would."""
    model, x = adapted("slora"), torch.randn(4, 37)
    grouped(model, x)
    layers = [model.q, model.k, model.v]
    for layer in layers:
        layer.set_scale("default", 0.5)
    check(model, x)
    for layer in layers:
        layer.enable_adapters(False)
    with torch.no_grad():
        assert torch.equal(model(x)[0], model.q.base_layer(x))
    for layer in layers:
        layer.enable_adapters(True)
    model.k.merge()
    with torch.no_grad():
        _close(model(x)[1], model.k.base_layer(x), torch.float32)
    model.k.unmerge()
    check(model, x)


def test_models_are_not_kept_alive():
    gc.collect()  # what earlier tests have left
    model, x = adapted(), torch.randn(4, 37)
    grouped(model, x)
    before = len(groups._groups)
    del model
    gc.collect()
    assert len(groups._groups) == before - 3


def test_autocast():
    """One cast of the input for all; outputs in autocast's type, gradients in the factors'."""
    model, x = adapted(), torch.randn(4, 37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        group = grouped(model, x)
        found = outcome(model, x)
        assert groups_of(model) == [group]
        expected = plain(model, x)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        _close(a.float(), b.float(), torch.bfloat16)


def test_sharded_and_gathered_weights_stay_apart():
    """What another layer's call would have to gather is left to that call."""
    model, x = adapted(), torch.randn(4, 37)
    group = grouped(model, x)
    group.call = None
    model.k.base_layer.weight.ds_id = 7  # as DeepSpeed's ZeRO-3 marks a weight that is here for its own call alone
    check(model, x)
    assert group.call is None
