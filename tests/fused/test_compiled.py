"""Layers that read one input, joined in compiled code: the same outputs and gradients, and when they are left apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from corelora.kernels import compiled, products
from corelora.kernels.compiled import JoinSiblings, join, siblings_op
from corelora.kernels.core_linear import linear_op
from corelora.kernels.fast import set_fast
from fused.test_core_linear import CASES, _close
from fused.test_siblings import Attention, adapted, as_on_a_gpu, outcome, plain

EDITS = (0, products.EDIT_FROM)  # beside a stored factor a slice writes by an edit, or as a part of a wider product


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(compiled, "_suits", lambda x: True)
    torch.compiler.reset()
    with as_on_a_gpu(monkeypatch, EDITS[0]):
        yield


@pytest.fixture
def outcomes(monkeypatch):
    """The outcome of a compiled model either way: what it calls asks anew each time, so that it is compiled once."""

    def ask(model: nn.Module, x: Tensor, **options) -> Iterator[list[Tensor]]:
        for edit_from in EDITS:
            monkeypatch.setattr(products, "EDIT_FROM", edit_from)
            yield outcome(model, x, **options)

    return ask


def follows(found: Iterable[list[Tensor]], expected: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Each outcome is the expected one."""
    for one in found:
        for a, b in zip(one, expected, strict=True):
            assert a.dtype == b.dtype
            _close(a, b, dtype)


class Joined:
    """A backend that runs the pass and leaves the rest to eager; counts groups and operations."""

    def __init__(self) -> None:
        self.groups = self.alone = 0
        self.run = JoinSiblings()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.run(graph.graph)
        graph.graph.lint()
        graph.recompile()
        targets = [node.target for node in graph.graph.nodes]
        self.groups += targets.count(siblings_op)
        self.alone += targets.count(linear_op)
        return aot_eager(graph, inputs)


@pytest.mark.parametrize(("method", "variant", "extra"), CASES, ids=str)
def test_joined_as_apart(outcomes, method, variant, extra):
    """Every serial method: outputs, and the gradients of x and every factor; x comes back bit for bit."""
    model, x = adapted(method, variant, **extra), torch.randn(3, 5, 37)
    before, expected, backend = x.clone(), plain(model, x), Joined()
    model.compile(fullgraph=True, backend=backend)
    follows(outcomes(model, x), expected)
    assert torch.equal(x, before)
    assert backend.groups + backend.alone > 0


@pytest.mark.parametrize("method", ["lora", "slora", "nlora", "inttune", "nora", "lora_xs"])
def test_which_are_joined(method):
    """k has a bias and stays alone; q and v are one operation."""
    model, backend = adapted(method), Joined()
    model.compile(fullgraph=True, backend=backend)
    outcome(model, torch.randn(4, 37))
    assert (backend.groups, backend.alone) == (1, 1)


class Normed(Attention):
    """What follows the first layer at once is in float32 under autocast."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
        q = self.q(x).pow(2)
        return q, self.k(x), self.v(x)


@pytest.mark.parametrize("kind", [Attention, Normed])
def test_under_autocast(outcomes, kind):
    """Each layer casts the input for itself, and the casts are alike; what follows stays under autocast."""
    model, x, backend = adapted("slora"), torch.randn(4, 37), Joined()
    model.__class__ = kind
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(model, x)
        model.compile(fullgraph=True, backend=backend)
        follows(outcomes(model, x), expected, torch.bfloat16)
    assert (backend.groups, backend.alone) == (1, 1)


def test_factors_that_do_not_all_learn(outcomes):
    model, x = adapted("slora"), torch.randn(4, 37)
    for name, p in model.named_parameters():
        p.requires_grad_("corelora_B" in name or ("corelora" in name and name.startswith("q.")))
    expected, backend = plain(model, x), Joined()
    model.compile(fullgraph=True, backend=backend)
    follows(outcomes(model, x), expected)
    assert backend.groups == 1


def test_an_output_that_nobody_uses(outcomes):
    model, x = adapted("slora"), torch.randn(4, 37)
    expected, backend = plain(model, x, used="q"), Joined()
    model.compile(fullgraph=True, backend=backend)
    # Beyond these two: the other layers' gradients, which may be zeros or none.
    follows((found[:2] for found in outcomes(model, x, used="q")), expected[:2])


class Between(Attention):
    """Two layers on one input, with something between their calls."""

    def __init__(self, between) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
        x = x * 1
        first = self.q(x)
        self.between(x)
        return first, self.k(x), self.v(x)


@pytest.mark.parametrize(
    ("between", "groups"),
    [
        (lambda x: x.mul_(2), 0),
        (lambda x: torch.relu_(x), 0),
        (lambda x: x.__setitem__(0, 1.0), 0),
        (lambda x: torch.add(x, 1, out=x), 0),
        (lambda x: x.abs().transpose(0, 1), 1),
    ],
    ids=["method", "function", "item", "out", "nothing"],
)
def test_an_input_that_changes_between_the_calls(between, groups):
    model, x, backend = adapted("slora"), torch.randn(4, 37), Joined()
    model.__class__, model.between = Between, between
    with torch.no_grad():
        set_fast("off")
        expected = model(x)
        set_fast("on")
        model.compile(fullgraph=True, backend=backend)
        for a, b in zip(model(x), expected, strict=True):
            _close(a, b, torch.float32)
    assert backend.groups == groups


def test_a_factor_that_follows_from_another_layers_output():
    """Joined, the second would wait for itself."""

    def both(x: Tensor, W: Tensor, R: Tensor, L: Tensor) -> Tensor:
        y = linear_op(x, W, None, R, L, None, 0, None, 0, None, 1.0)[0]
        return y + linear_op(x, W, None, R, L * y.mean(), None, 0, None, 0, None, 1.0)[0]

    backend, given = Joined(), (torch.randn(4, 7), torch.randn(9, 7), torch.randn(3, 7), torch.randn(9, 3))
    found = torch.compile(both, fullgraph=True, backend=backend)(*given)
    _close(found, both(*given), torch.float32)
    assert (backend.groups, backend.alone) == (0, 2)


def test_on_a_cpu_they_stay_apart(monkeypatch):
    monkeypatch.undo()
    model, backend = adapted("slora"), Joined()
    model.compile(fullgraph=True, backend=backend)
    outcome(model, torch.randn(4, 37))
    assert (backend.groups, backend.alone) == (0, 3)


@pytest.mark.parametrize("edit_from", EDITS, ids=["edits", "wide"])
def test_registered_operation_is_well_formed(monkeypatch, edit_from):
    """Fake tensors, autograd and aliasing, by PyTorch's own checker."""
    monkeypatch.setattr(products, "EDIT_FROM", edit_from)
    x = torch.randn(2, 4, 7, requires_grad=True)
    W = [torch.randn(9, 7), torch.randn(5, 7)]
    R = [torch.randn(3, 7, requires_grad=True) for _ in W]
    L = [torch.randn(w.shape[0], 3, requires_grad=True) for w in W]
    G = torch.randn(2, 5, 5, requires_grad=True)
    torch.library.opcheck(siblings_op, (x, W, [], R, L, G, [2, 2], [2, 2], [1.0, 1.0]))
    bias = [torch.randn(9), torch.randn(5)]
    torch.library.opcheck(siblings_op, (x, W, bias, [], [], torch.randn(2, 2, 2), [2, 2], [2, 2], [1.0, 1.0]))
    torch.library.opcheck(siblings_op, (x, W, [], R, L, None, [0, 0], [0, 0], [0.5, 2.0]))


def test_inductor_is_told_while_a_layer_is_compiled():
    """After a pass that the user has set, once, and with a name that follows from both for inductor's cache."""
    ran, model = [], adapted("slora")
    with inductor.patch(pre_grad_custom_pass=ran.append):
        for _ in range(2):
            torch.compiler.reset()
            torch.compile(model, fullgraph=True, backend="eager")(torch.randn(4, 37))
        ours = inductor.pre_grad_custom_pass
    assert isinstance(ours, JoinSiblings)
    assert ours.before == ran.append
    assert ours.uuid() is None  # nobody knows what theirs does
    graph = torch.fx.Graph()
    ours(graph)
    assert ran == [graph]
    assert JoinSiblings().uuid() == JoinSiblings().uuid() != JoinSiblings(JoinSiblings()).uuid()


def test_by_inductor(outcomes, monkeypatch):
    """The pass where inductor runs it, before autograd's graphs are made."""
    counts = []
    monkeypatch.setattr(compiled, "join", lambda graph: counts.append(join(graph)) or counts[-1])
    model, x = adapted("nlora"), torch.randn(4, 37)
    expected = plain(model, x)
    with inductor.patch(force_disable_caches=True):
        model.compile(fullgraph=True)
        follows(outcomes(model, x), expected)
    assert counts == [1]


def test_linear_without_siblings():
    model = nn.Linear(3, 3)
    assert join(torch.fx.symbolic_trace(model).graph) == 0
