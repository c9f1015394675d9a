"""What `set_fast("auto")` takes on a CPU, and that it is right there: outputs and gradients beside the reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import corelora
from corelora.kernels import fast
from corelora.kernels.fast import CPU_ROWS, set_fast
from fused.test_core_linear import CASES, _close, _grads, _layer, _restore_modes  # noqa: F401

ROWS = [(CPU_ROWS, 37), (2, CPU_ROWS, 37), (3, 37), (0, 37), (2, 0, 37)]


@pytest.fixture
def fused(monkeypatch):
    """How often the fused path is taken, counted."""
    calls = []
    work = fast.fused_forward
    monkeypatch.setattr(fast, "fused_forward", lambda *args: calls.append(1) or work(*args))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "variant", "extra"), CASES, ids=str)
def test_auto_equals_the_reference(method, variant, extra, dtype):
    """Every serial method, with and without bias, 2-D, 3-D and empty, with gradients and without."""
    for bias, shape in [(True, shape) for shape in ROWS] + [(False, ROWS[1])]:
        layer = _layer(method, variant, extra, dtype, bias)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        results = []
        for mode in ("off", "auto"):
            set_fast(mode)
            y = layer(x)
            dy = torch.ones_like(y)
            with torch.no_grad():
                alone = layer(x)
            results.append([alone, y, *_grads(y, x, layer, dy)])
        for found, expected in zip(results[1], results[0], strict=True):
            _close(found, expected, dtype)


@pytest.mark.parametrize("scale", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("method", corelora.list_methods())
def test_wider_factors_and_scales(method, scale):
    """float32 factors over a bfloat16 base, as PEFT keeps them: gradients come in the factors' own type."""
    layer = _layer(method, "default", {}, torch.bfloat16)
    for parameter in layer.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    layer.set_scale("default", scale)
    x = torch.randn(CPU_ROWS, 37, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for mode in ("off", "auto"):
        set_fast(mode)
        y = layer(x)
        results.append([y, *_grads(y, x, layer, torch.ones_like(y))])
    for found, expected in zip(results[1], results[0], strict=True):
        assert found.dtype == expected.dtype
        _close(found, expected, torch.bfloat16)


def _taken(fused: list, layer: nn.Module, x: torch.Tensor) -> bool:
    fused.clear()
    layer(x)
    return bool(fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_where_auto_takes_the_fused_path(dtype, fused):
    """float32 and bfloat16: always without gradients, from CPU_ROWS rows on with them."""
    set_fast("auto")
    layer = _layer("nlora", "default", {}, dtype)
    narrow = dtype in (torch.float32, torch.bfloat16)
    for rows in (1, CPU_ROWS - 1, CPU_ROWS):
        x = torch.randn(1, rows, 37, dtype=dtype)
        assert _taken(fused, layer, x) == (narrow and rows >= CPU_ROWS)
        with torch.no_grad():
            assert _taken(fused, layer, x) == narrow


def test_auto_leaves_out_what_copies_its_factors(fused):
    """PiSSA keeps its start beside its offsets; with "on" it is fused all the same."""
    layer, x = _layer("pissa", "default", {}, torch.float32), torch.randn(CPU_ROWS, 37)
    set_fast("auto")
    assert not _taken(fused, layer, x)
    set_fast("on")
    assert _taken(fused, layer, x)


def test_auto_is_the_same_again():
    """The path follows from shapes alone: two passes agree bit for bit."""
    set_fast("auto")
    layer = _layer("nlora", "default", {}, torch.float32)
    x = torch.randn(CPU_ROWS, 37, requires_grad=True)
    first, second = ([y := layer(x), *_grads(y, x, layer, torch.ones_like(y))] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_per_sample_gradients():
    """torch.func goes through the reference path under auto."""
    set_fast("auto")
    layer = _layer("slora", "default", {}, torch.float32)
    x = torch.randn(3, CPU_ROWS, 37)
    found = torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(x)
    set_fast("off")
    x.requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    _close(found, expected, torch.float32)


def test_a_second_derivative_is_refused():
    """It would miss what goes through the kept features: an error, no wrong number. One with a graph is fine."""
    set_fast("auto")
    layer = _layer("slora", "default", {}, torch.float32)
    x = torch.randn(CPU_ROWS, 37, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("slice_scale", ["none", "unit", "orthonormal"])
@pytest.mark.parametrize("method", ["nlora", "inttune"])
def test_what_an_inference_made_does_not_stop_training(method, slice_scale):
    """What a form keeps from a pass in inference mode is used by passes that autograd records."""
    set_fast("on")
    layer = _layer(method, "default", {"slice_scale": slice_scale}, torch.float32)
    with torch.inference_mode():
        layer(torch.randn(70, 37))
    layer(torch.randn(70, 37)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
