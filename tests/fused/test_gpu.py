"""The fused path on a GPU: `make test-gpu`. Everything here also has a CPU test; what differs is types and orders."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch._inductor.config as inductor
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from corelora import CoreLoraConfig
from corelora.kernels import compiled, form, groups, products
from corelora.kernels.fast import set_fast
from corelora.kernels.products import Order
from fused.test_core_linear import losses_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = ["lora", "slora", "nlora", "inttune", "nora", "pissa", "lora_xs", "lora_fa"]
# Relative to the norm of the answer in float64; thin features are rounded once more than a plain product's.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _restore_modes():
    mode, order = set_fast("auto"), products.set_order(None)
    yield
    set_fast(mode)
    products.set_order(order)


def _model(method: str, dtype: torch.dtype, **extra) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(330, 270)).cuda()
    config = CoreLoraConfig(method=method, r=24, target_modules=["0"], stats="weight", init_weights=False, **extra)
    return get_peft_model(base, config).to(dtype)


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("edit_from", [0, products.EDIT_FROM], ids=["edits", "wide"])
@pytest.mark.parametrize("order", [None, *Order], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_fused_against_float64(method, dtype, order, edit_from, monkeypatch):
    """Outputs and all gradients against the reference path in float64; the input comes back bit for bit."""
    monkeypatch.setattr(products, "EDIT_FROM", edit_from)
    for extra in [{}] if method not in ("nlora", "inttune") else [{}, {"sampling": "random"}]:
        model = _model(method, dtype, **extra)
        exact = copy.deepcopy(model).double()
        x = torch.randn(5, 77, 330, device="cuda", dtype=dtype, requires_grad=True)
        dy = torch.randn(5, 77, 270, device="cuda", dtype=dtype)
        set_fast("off")
        x64 = x.detach().double().requires_grad_()
        y64 = exact(x64)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        expected = torch.autograd.grad(y64, [x64, *(exact.get_parameter(n) for n in names)], dy.double())
        set_fast("on")
        products.set_order(order)
        before = x.detach().clone(), dy.clone()
        y = model(x)
        found = torch.autograd.grad(y, [x, *(model.get_parameter(n) for n in names)], dy)
        assert torch.equal(x.detach(), before[0])
        assert torch.equal(dy, before[1])
        assert _error(y, y64) < TOLERANCE[dtype]
        for name, a, b in zip(["x", *names], found, expected, strict=True):
            assert _error(a, b) < 2 * TOLERANCE[dtype], name


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_float32(dtype, scale):
    """A gradient of float32 factors is not rounded to the narrow type on its way, where torch can help it."""
    a, b = (torch.randn(77, n, device="cuda", dtype=dtype).t() for n in (24, 40))
    found = form.product(a, b.t(), torch.float32, scale)
    exact = scale * (a.double() @ b.t().double())
    assert found.dtype == torch.float32
    written = scale == 1 and form._writes_wide(dtype)
    assert _error(found, exact) < (1e-6 if written else TOLERANCE[dtype])


@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
def test_compiled_by_inductor(method):
    model = _model(method, torch.bfloat16)
    x = torch.randn(64, 330, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    expected = torch.autograd.grad(y.float().square().sum(), x)[0]
    z = torch.compile(model, fullgraph=True)(x)
    found = torch.autograd.grad(z.float().square().sum(), x)[0]
    assert _error(z, y) < 2e-2
    assert _error(found, expected) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_branches_of_a_recorded_graph(method, dtype):
    """Played again with other numbers, both passes over a group and a layer give what eager code gives."""
    model = _adapted_llama(method, dtype, wide=dtype == torch.bfloat16).base_model.model.model.layers[0]
    attention, x = model.self_attn, torch.randn(77, 128, device="cuda", dtype=dtype, requires_grad=True)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    learned = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    dy = torch.randn(77, 128 + 64 + 64 + 128, device="cuda", dtype=dtype)

    def work() -> list[torch.Tensor]:
        y = torch.cat([layer(x) for layer in layers[:3]], dim=1)
        return [y, *torch.autograd.grad(torch.cat((y, layers[3](x.sin())), dim=1), [x, *learned], dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        again = [t.clone() for t in found]
        for a, b in zip(again, work(), strict=True):
            assert _error(a, b) < TOLERANCE[dtype]


def _llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=2, **sizes)).cuda()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
def test_training_follows_the_reference(method, autocast, checkpointing):
    """50 steps of a small Llama with a bfloat16 base and float32 adapters, both paths, with and without autocast."""
    curves = []
    ids = torch.randint(0, 100, (4, 32), device="cuda")
    for mode in ("off", "on"):
        set_fast(mode)
        base = _llama().to(torch.float32 if autocast else torch.bfloat16)
        torch.manual_seed(1)
        model = get_peft_model(base, CoreLoraConfig(method=method, r=8, target_modules="all-linear", stats="weight"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            model.train()
        rate = (
            2e-2 if method == "nora" else 3e-3
        )  # a core between singular vectors of a small random model moves slowly
        cast = partial(torch.autocast, "cuda", torch.bfloat16, enabled=autocast)
        curves.append(torch.tensor(losses_of(model, ids, 50, rate, cast)))
    assert float((curves[0] - curves[1]).abs().max()) < 0.06
    assert curves[1][-1] < curves[1][0] - 0.1


def _adapted_llama(method: str, dtype: torch.dtype, wide: bool = False) -> nn.Module:
    torch.manual_seed(1)
    config = CoreLoraConfig(method=method, r=8, target_modules="all-linear", stats="weight", init_weights=False)
    return get_peft_model(_llama().to(dtype), config, autocast_adapter_dtype=wide)


@pytest.mark.parametrize("wide", [False, True], ids=["factors in its type", "factors in float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_layers_of_one_input_together(method, dtype, wide):
    """q, k and v, gate and up as one operation each: gradients are as near to float64's as those of layers apart."""
    model = _adapted_llama(method, dtype, wide)
    exact = copy.deepcopy(model).double()
    ids = torch.randint(0, 100, (4, 33), device="cuda")
    set_fast("off")
    exact(input_ids=ids, labels=ids).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in exact.parameters() if p.requires_grad])
    errors = {}
    for mode in ("off", "on"):
        set_fast(mode)
        for _ in range(3):  # the first pass sees what belongs together
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        errors[mode] = _error(found, expected)
    attention = model.base_model.model.model.layers[1].self_attn
    shared = {groups._groups.get(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(shared) == 1
    assert None not in shared
    assert errors["on"] < max(2 * errors["off"], TOLERANCE[dtype])


@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
def test_compiled_as_cuda_graphs(method, monkeypatch):
    """torch.compile's mode reduce-overhead over some steps: one curve with eager, no graph overwrites another, and the
    layers that read one input are one operation."""
    ids = torch.randint(0, 100, (4, 32), device="cuda")
    curves, joined, join = [], [], compiled.join
    monkeypatch.setattr(compiled, "join", lambda graph: joined.append(join(graph)) or joined[-1])
    for compiles in (False, True):
        model = _adapted_llama(method, torch.bfloat16)
        inner = model.get_base_model()
        if compiles:
            inner.compile(dynamic=False, mode="reduce-overhead")
        with inductor.patch(force_disable_caches=True):  # a graph from the cache is joined already
            curves.append(losses_of(inner, ids, 8, 1e-3))
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=2e-2, atol=2e-2)
    assert joined == [4]  # of two layers, q k v and gate up
