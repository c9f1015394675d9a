"""The fused path against the reference path: outputs and all gradients, every serial method, both orders."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import corelora
from corelora import CoreLoraConfig
from corelora.kernels import fast, products
from corelora.kernels.core_linear import linear_op
from corelora.kernels.fast import fused_forward, set_fast, suits
from corelora.kernels.form import FormMaker
from corelora.kernels.products import Order
from corelora.registry import METHODS, OUTERS
from corelora.tuner_layer import CoreLoraLayer

# One rounding of a sum in that type, relative to the largest entry; products of thin features lose a little more.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}

CASES = [(m, v, {}) for m in corelora.list_methods() for v in ("default", "published")]
CASES += [(m, "default", {"sampling": "random"}) for m in ("nlora", "inttune")]
CASES += [(m, "default", {"slice_scale": s}) for m in ("nlora", "inttune") for s in ("none", "unit", "orthonormal")]
CASES += [("nlora", "default", {"train": train}) for train in ("A", "B", "core", "A core", "core B", "A B")]
CASES += [
    ("nora", "default", {"position": "both"}),
    ("lora_xs", "default", {"core": "diagonal"}),
    ("pissa", "default", {"train": "B"}),
]


@pytest.fixture(autouse=True)
def _restore_modes():
    mode, order = set_fast("off"), products.set_order(None)
    yield
    set_fast(mode)
    products.set_order(order)


def _layer(method: str, variant: str, extra: dict, dtype: torch.dtype, bias: bool = True) -> CoreLoraLayer:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(37, 53, bias=bias)).to(dtype)
    stats = "weight" if OUTERS[METHODS[method].default.outer].needs_stats else None
    config = CoreLoraConfig(
        method=method, variant=variant, r=8, alpha=12, target_modules=["0"], stats=stats, init_weights=False, **extra
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model.base_model.model[0]


def _grads(y: Tensor, x: Tensor, layer: CoreLoraLayer, dy: Tensor) -> list[Tensor]:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return list(torch.autograd.grad(y, [x, *parameters], dy))


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    scale = float(b.detach().abs().max().clamp(min=1e-12)) if b.numel() else 1.0
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.fixture(params=[0, products.EDIT_FROM], ids=["edits", "wide"])
def edit_from(request, monkeypatch):
    """Beside a stored factor, a slice writes by an edit, or as a part of a wider product."""
    monkeypatch.setattr(products, "EDIT_FROM", request.param)


def kept_by(maker: FormMaker) -> list[Tensor]:
    """The tensors that a maker keeps between passes."""
    found = [value if isinstance(value, tuple) else (value,) for value in vars(maker).values()]
    return [one for several in found for one in several if isinstance(one, Tensor)]


def _maker(layer: CoreLoraLayer) -> FormMaker:
    return FormMaker(layer.cores["default"], layer.factors("default"), layer.scaling["default"])


@pytest.mark.usefixtures("edit_from")
@pytest.mark.parametrize("order", list(Order), ids=lambda o: o.value)
@pytest.mark.parametrize(("method", "variant", "extra"), CASES, ids=str)
def test_fused_equals_reference(method, variant, extra, order):
    """float32, odd sizes, with and without bias: outputs and gradients of x and of every trained factor."""
    for bias in (True, False):
        layer = _layer(method, variant, extra, torch.float32, bias)
        x = torch.randn(3, 5, 37, requires_grad=True)
        y = layer(x)
        dy = torch.randn_like(y)
        expected = [y, *_grads(y, x, layer, dy)]
        products.set_order(order)
        before = x.detach().clone(), dy.clone()
        fused = fused_forward(x, layer.base_layer, _maker(layer))
        found = [fused, *_grads(fused, x, layer, dy)]
        products.set_order(None)
        for a, b in zip(found, expected, strict=True):
            _close(a, b, torch.float32)
        assert torch.equal(x.detach(), before[0]), "the input must come back bit for bit"
        assert torch.equal(dy, before[1]), "the output's gradient must come back bit for bit"


def test_orthonormal_slices_cost_no_nodes_of_autograd():
    """Where the core is all of G its transforms are applied inside the operation, to which the form hands the core."""
    layer = _layer("inttune", "default", {"slice_scale": "orthonormal"}, torch.float32)
    form = _maker(layer).make()
    assert form.C is layer.factors("default")["core"].weight
    assert not _maker(_layer("nlora", "default", {"slice_scale": "orthonormal"}, torch.float32)).is_direct


@pytest.mark.usefixtures("edit_from")
@pytest.mark.parametrize("order", list(Order), ids=lambda o: o.value)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["lora", "slora", "nlora", "inttune", "nora"])
def test_fused_equals_reference_in_other_types(method, dtype, order):
    layer = _layer(method, "default", {}, dtype)
    x = torch.randn(4, 37, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    expected = [y, *_grads(y, x, layer, dy)]
    products.set_order(order)
    fused = fused_forward(x, layer.base_layer, _maker(layer))
    for a, b in zip([fused, *_grads(fused, x, layer, dy)], expected, strict=True):
        _close(a, b, dtype)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("types", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")], ids=str)
@pytest.mark.parametrize("method", ["lora", "slora", "nlora", "inttune", "nora"])
def test_under_autocast(method, types, narrow, monkeypatch):
    """Trainer's `bf16=True`: factors in float32, base and input in either type; the output is in autocast's."""
    weight, given = (getattr(torch, name) for name in types)
    layer = _layer(method, "default", {}, weight)
    for factor in layer.parameters():
        factor.data = factor.data.float() if factor.requires_grad else factor.data
    x = torch.randn(4, 37, dtype=given, requires_grad=True)
    taken, path = [], fast.fused_forward
    monkeypatch.setattr(fast, "fused_forward", lambda *args: taken.append(1) or path(*args))
    made = {}
    for mode in ("off", "on"):
        set_fast(mode)
        with torch.autocast("cpu", dtype=narrow):
            y = layer(x)
        made[mode] = [y, *_grads(y, x, layer, torch.ones_like(y))]
    assert taken == [1]
    for fused, plain in zip(made["on"], made["off"], strict=True):
        assert fused.dtype == plain.dtype
        _close(fused.float(), plain.float(), torch.bfloat16)
    assert made["on"][0].dtype == narrow


def test_autocast_leaves_float64_alone():
    layer = _layer("nlora", "default", {}, torch.float64)
    x = torch.randn(4, 37, dtype=torch.float64)
    set_fast("on")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float64


def test_a_cpu_under_autocast_keeps_the_plain_path(monkeypatch):
    """There W is made narrow each time, which costs more than anything that is saved."""
    layer = _layer("nlora", "default", {}, torch.float32)
    monkeypatch.setattr(fast, "fused_forward", lambda *args: pytest.fail("the fused path was taken"))
    set_fast("auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(200, 37, requires_grad=True))


@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
@pytest.mark.parametrize("shape", [(37,), (1, 37), (6, 37), (0, 37), (2, 0, 37), (2, 3, 4, 37)], ids=str)
def test_shapes_of_inputs(method, shape):
    """One vector, 2-D, 3-D, 4-D and empty batches."""
    layer = _layer(method, "default", {}, torch.float32)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    expected = [y, *_grads(y, x, layer, dy)]
    fused = fused_forward(x, layer.base_layer, _maker(layer))
    assert fused.shape == y.shape
    for a, b in zip([fused, *_grads(fused, x, layer, dy)], expected, strict=True):
        _close(a, b, torch.float32)


@pytest.mark.usefixtures("edit_from")
@pytest.mark.parametrize("order", list(Order), ids=lambda o: o.value)
@pytest.mark.parametrize("method", ["nlora", "inttune", "slora"])
def test_inputs_that_are_views(method, order):
    """Transposed, expanded and strided inputs and gradients: an edit must never touch memory that rows share."""
    layer = _layer(method, "default", {}, torch.float32)
    products.set_order(order)
    for x in (torch.randn(37, 6).T, torch.randn(1, 37).expand(6, 37), torch.randn(6, 74)[:, ::2]):
        x = x.detach().requires_grad_()
        y = layer(x)
        dy = torch.randn(1, y.shape[1]).expand_as(y)
        expected = [y, *_grads(y, x, layer, dy)]
        fused = fused_forward(x, layer.base_layer, _maker(layer))
        for a, b in zip([fused, *_grads(fused, x, layer, dy)], expected, strict=True):
            _close(a, b, torch.float32)


@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
def test_recomputed_passes(method):
    """Checkpointing makes saved tensors again inside the backward pass, where autograd must record as before."""
    layer = _layer(method, "default", {}, torch.float32)
    x = torch.randn(4, 37, requires_grad=True)
    maker, outcomes = _maker(layer), []

    def run(x: Tensor) -> Tensor:
        return fused_forward(x.tanh(), layer.base_layer, maker).tanh()

    for y in (run(x), checkpoint(run, x, use_reentrant=False)):
        outcomes.append([y, *_grads(y, x, layer, torch.ones_like(y))])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_x_is_saved_only_where_a_learns():
    """What the backward pass keeps: the input where A learns, only thin features elsewhere."""
    kept: dict[str, bool] = {}
    for method in ("lora", "slora", "nlora", "pissa", "inttune", "nora", "lora_xs", "lora_fa"):
        layer = _layer(method, "default", {}, torch.float32)
        x = torch.randn(11, 37, requires_grad=True)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            fused_forward(x, layer.base_layer, _maker(layer))
        kept[method] = any(t.data_ptr() == x.data_ptr() for t in saved)
        thin = max(t.shape[1] for t in saved if t.ndim == 2 and t.shape[0] == 11 and t.data_ptr() != x.data_ptr())
        assert thin <= 16
    assert kept == {m: m in ("lora", "slora", "nlora", "pissa") for m in kept}


def test_inttune_stores_no_outer_factors():
    layer = _layer("inttune", "default", {}, torch.float32)
    tensors = [t for n, t in layer.named_buffers() if not n.startswith(("base_layer", "corelora_fingerprint"))]
    assert sum(t.numel() for t in tensors) <= 2 * 8 * 8  # the transforms of rows and columns


def test_parallel_cores_take_the_reference_path():
    layer = _layer("lora_xs", "default", {"core": "parallel_b", "core_start": "zero_b"}, torch.float32)
    assert not suits(layer.view, layer.base_layer, layer.cores["default"])
    set_fast("on")
    assert layer(torch.randn(2, 37)).shape == (2, 53)


def losses_of(model, ids, steps, rate, around=nullcontext):
    """Losses of a language model trained on one batch by AdamW; `around` is the context of its forward passes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        with around():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", ["slora", "nlora", "inttune", "nora"])
def test_one_loss_curve(method):
    """A tiny Llama trained 50 steps on both paths follows one curve."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes))
    ids = torch.randint(0, 50, (4, 12))
    curves = []
    for mode in ("off", "on"):
        set_fast(mode)
        torch.manual_seed(1)
        config = CoreLoraConfig(method=method, r=8, target_modules="all-linear", stats="weight")
        model = get_peft_model(copy.deepcopy(base), config)
        curves.append(losses_of(model, ids, 50, 5e-3))
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=2e-3, atol=2e-3)
    assert curves[1][-1] < curves[1][0] - 0.05


@pytest.mark.parametrize("narrow", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora"])
def test_compiled_layer_is_one_graph(method, narrow):
    """torch.compile sees the adapter as one node: no graph break, the same numbers."""
    torch.compiler.reset()  # it allows eight compilations of one function
    layer = _layer(method, "default", {}, torch.float32)
    x = torch.randn(6, 37, requires_grad=True)
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow)
    with cast:
        y = layer(x)
    dy = torch.randn_like(y)
    expected = [y, *_grads(y, x, layer, dy)]
    set_fast("on")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with cast:
        found = compiled(x)
    for a, b in zip([found, *_grads(found, x, layer, dy)], expected, strict=True):
        _close(a, b, torch.bfloat16 if narrow else torch.float32)


def test_registered_operation_is_well_formed():
    """Fake tensors, autograd and aliasing of the registered operation, by PyTorch's own checker."""
    W, x = torch.randn(9, 7), torch.randn(4, 7, requires_grad=True)
    R, L = torch.randn(3, 7, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    G = torch.randn(5, 5, requires_grad=True)
    torch.library.opcheck(linear_op, (x, W, None, R, L, G, 2, None, 2, None, 1.0))
    index = torch.tensor([1, 4], dtype=torch.int32)
    torch.library.opcheck(linear_op, (x, W, torch.randn(9), None, None, G[:2, :2], 2, index, 2, index, 1.0))


def test_values_that_are_loaded_replace_what_the_path_keeps():
    """Loading another adapter's values over this one must reach the fused path's kept constants."""
    layer = _layer("nlora", "default", {"sampling": "random", "slice_scale": "unit"}, torch.float32)
    other = _layer("nlora", "default", {"sampling": "random", "slice_scale": "unit", "seed": 5}, torch.float32)
    x = torch.randn(4, 37)
    set_fast("on")
    layer(x)
    layer.load_state_dict(other.state_dict())
    set_fast("off")
    expected = other(x)
    _close(layer(x), expected, torch.float32)
    set_fast("on")
    _close(layer(x), expected, torch.float32)


@pytest.mark.parametrize("method", ["lora", "slora", "nlora", "inttune", "nora"])
def test_compiled_once(method):
    """The second step runs the code of the first: nothing that a pass leaves behind makes another necessary."""
    torch.compiler.reset()
    layer = _layer(method, "default", {}, torch.float32)
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer, count = torch.optim.SGD(trained, lr=0.1), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for _ in range(3):
        compiled(torch.randn(4, 37)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer(torch.randn(4, 37))  # eager, which keeps its own
    compiled(torch.randn(4, 37))
    assert count.frame_count == 1


@pytest.mark.parametrize("method", ["slora", "nlora", "inttune", "nora"])
def test_compiled_code_keeps_no_tensor(method, monkeypatch):
    """With CUDA graphs (mode reduce-overhead) what a graph makes is written over by its next launch: what makers keep
    is made before the compiler looks."""
    torch._dynamo.reset()
    layer = _layer(method, "default", {}, torch.float32)
    made, prepare = [], FormMaker.prepare

    def prepared(maker):
        prepare(maker)
        made.extend(kept_by(maker))

    monkeypatch.setattr(FormMaker, "prepare", prepared)
    set_fast("on")
    x = torch.randn(4, 37, requires_grad=True)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    [maker] = layer._makers.values()
    assert made or method in ("slora", "nora")
    assert [id(t) for t in kept_by(maker)] == [id(t) for t in made]
    assert torch.isfinite(layer(x)).all()
    assert list(layer._makers.values()) == [maker]


@pytest.mark.parametrize("method", ["slora", "nlora", "inttune", "nora"])
def test_compiled_code_follows_changes(method):
    """Another scale, other values and another type: compiled code computes what the layer has become."""
    torch._dynamo.reset()
    layer, other = (_layer(method, "default", {}, torch.float32) for _ in range(2))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 37)

    def check():
        set_fast("on")
        found, before = compiled(x), set_fast("off")
        _close(found, layer(x), x.dtype)
        set_fast(before)

    check()
    layer.set_scale("default", 0.5)
    check()
    layer.load_state_dict(other.state_dict())
    check()
    layer.double()
    x = x.double()
    check()


def test_outside_of_transforms_the_function_is_applied_directly():
    """And within them as torch does it: what functorch can't go through is refused by itself."""
    layer = _layer("slora", "default", {}, torch.float32)
    set_fast("on")
    x = torch.randn(4, 37)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda t: layer(t).sum())(x)
