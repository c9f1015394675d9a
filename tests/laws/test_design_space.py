"""The laws on the whole design space: every outer x core x train x start (x core start) that contradicts nothing.

On a small Linear, without PEFT but for saving and loading. float64 where formulas are compared to the last digit.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from corelora.adapter import CoreAdapter
from corelora.layers import view_of
from corelora.measured import given_to
from corelora.registry import CORE_STARTS, CORES, OUTERS, SAMPLINGS
from corelora.spec import FACTORS, POSITIONS, SLICE_SCALES, STARTS, AdapterSpec, Choices, choice_problems
from corelora.storage import BaseWeight
from laws.cases import (
    TOLERANCE,
    K,
    R,
    adapted,
    base_model,
    batch,
    close,
    config,
    layer_of,
    product,
    read_numbers,
    run_plain,
    stats_for,
    stir,
)

SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(FACTORS, n)]


def _points() -> list[Choices]:
    """Every allowed point with every core start; a core that is not there has no start to vary."""
    found = []
    for outer, core, train, start in itertools.product(sorted(OUTERS), sorted(CORES), SUBSETS, STARTS):
        for core_start in ["kaiming"] if core == "none" else CORES[core].starts:
            choices = Choices(outer=outer, core=core, train=train, start=start, core_start=core_start)
            if not choice_problems(choices):
                found.append(choices)
    return found


def _variations() -> list[Choices]:
    """What the main table leaves at its default: positions, singular values, samplings, scalings of slices."""
    found = []
    for core, position, start in itertools.product(sorted(CORES), POSITIONS, STARTS):
        for core_start in CORES[core].starts:
            found.append(
                Choices(outer="svd", core=core, train=FACTORS, start=start, core_start=core_start, position=position)
            )
    base = Choices(outer="nystrom", core="dense", train=FACTORS, start="subtract", core_start="nystrom")
    for scale, core_start, start in itertools.product(SLICE_SCALES, ("nystrom", "pinv"), ("as_is", "subtract")):
        scaled = base.changed(slice_scale=scale, core_start=core_start, start=start)
        found += [scaled.changed(sampling=sampling) for sampling in sorted(SAMPLINGS)]
        found += [scaled.changed(sampling="random", train=train) for train in SUBSETS]
    for outer, where in itertools.product(("svd", "awsvd"), ("right", "split")):
        found.append(replace(base, outer=outer, core="none", train=("A", "B"), singular_values=where))
    return [c for c in dict.fromkeys(found) if not choice_problems(c)]


POINTS, VARIATIONS = _points(), _variations()
# Files and merging look neither at how a core began nor at how a random factor was drawn, and a `zero` start is what
# `as_is` is there. Samplings and scalings they do look at.
_SEEN_BY_FILES = [
    c for c in POINTS + VARIATIONS if c.start != "zero" and c.outer in ("random", "svd", "awsvd", "nystrom", "gradient")
]
THROUGH_PEFT = list(
    {replace(c, core_start="kaiming"): c for c in reversed(_SEEN_BY_FILES) if c.slice_scale == "none"}.values()
)
THROUGH_PEFT += [c for c in VARIATIONS if c.outer == "nystrom" and c not in THROUGH_PEFT]


def _name(c: Choices) -> str:
    parts = [c.outer, c.core, "".join(c.train), c.start, c.core_start, c.position, c.singular_values, c.sampling]
    return "-".join([*parts, c.slice_scale])


def in_groups(points: list[Choices]) -> list[Any]:
    """The points by outer start and core, a parameter a group: thousands of tests would cost more than what they do."""
    groups: dict[str, list[Choices]] = {}
    for c in points:
        groups.setdefault(f"{c.outer}-{c.core}", []).append(c)
    return [pytest.param(group, id=name) for name, group in groups.items()]


def hold_each(law: Callable[[Choices], None], group: list[Choices]) -> None:
    """Try every point from the same random state, then say by name which ones broke the law."""
    broken = []
    for choices in group:
        torch.manual_seed(0)
        try:
            law(choices)
        except Exception as error:
            error.add_note(_name(choices))
            broken.append(error)
    if broken:
        raise ExceptionGroup(f"{len(broken)} of {len(group)} points", broken)


class Alone:
    """A CoreAdapter on a Linear without PEFT."""

    def __init__(self, choices: Choices, dtype: torch.dtype = torch.float64) -> None:
        self.linear = nn.Linear(10, 12).to(dtype)
        self.linear.requires_grad_(False)
        view = view_of(self.linear)
        assert view is not None
        self.weight = BaseWeight(self.linear, view)
        spec = AdapterSpec(choices=choices, r=R, inner_r=K, scale=1.5)
        self.core = CoreAdapter.of(spec, view)
        stats = stats_for(choices.outer, 12, 10)
        self.made = self.core.start(self.weight, given_to(stats, "layer", spec), "layer")
        self.W = self.linear.weight.detach()

    def stir(self) -> None:
        with torch.no_grad():
            for factor in self.made.values():
                if factor.weight is not None:
                    factor.weight.add_(0.3 * torch.randn_like(factor.weight))

    def explicit(self, numbers) -> torch.Tensor:
        c, scale = self.core.spec.choices, self.core.spec.scale
        delta = product(c.core, c.position, numbers.now())
        if c.start == "subtract" and self.core.has_offsets:
            delta = delta - product(c.core, c.position, numbers.starts)
        return scale * delta

    def path(self, x: torch.Tensor) -> torch.Tensor:
        return self.core.spec.scale * self.core.path(x, self.made, self.W)


def test_the_table_holds_the_whole_space():
    """Every outer start, core structure, start and core start occurs; so does every subset of A, core, B."""
    assert {c.outer for c in POINTS} == set(OUTERS)
    assert {c.core for c in POINTS} == set(CORES)
    assert {c.start for c in POINTS} == set(STARTS)
    assert {c.core_start for c in POINTS} == set(CORE_STARTS)
    assert {c.train for c in POINTS} == set(SUBSETS)
    assert {c.sampling for c in VARIATIONS} == set(SAMPLINGS)


@pytest.mark.parametrize("group", in_groups(POINTS + VARIATIONS))
def test_path_delta_and_gradients_follow_the_formula(group):
    """In float64: first output, path, delta and every gradient, against B core A - B0 core0 A0 written out."""
    hold_each(follows_the_formula, group)


def follows_the_formula(choices: Choices) -> None:
    """The law at one point."""
    alone, x = Alone(choices), torch.randn(7, 10, dtype=torch.float64)
    first = alone.path(x)
    if choices.start in ("zero", "subtract"):
        assert not first.any()
    else:
        start = read_numbers(alone.made, alone.W)
        close(first, F.linear(x, alone.explicit(start)), torch.float64)
    alone.stir()
    numbers = read_numbers(alone.made, alone.W)
    delta = alone.explicit(numbers)
    x_ref, probe = x.clone().requires_grad_(), torch.randn(7, 12, dtype=torch.float64)
    x.requires_grad_()
    out, expected = alone.path(x), F.linear(x_ref, delta)
    # The reference is a difference of two products: it loses what they have in common.
    size = float(F.linear(x_ref, product(choices.core, choices.position, numbers.now())).abs().max()) * 1.5
    close(out, expected, torch.float64, max(size, float(expected.abs().max())))
    close(
        alone.core.delta(alone.made, alone.W, torch.float64), delta, torch.float64, max(size, float(delta.abs().max()))
    )
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    close(x.grad, x_ref.grad, torch.float64, float(x_ref.grad.abs().max()) + size)
    for slot, leaf in numbers.trained.items():
        close(alone.made[slot].weight.grad, leaf.grad, torch.float64, float(leaf.grad.abs().max()) + size)


@pytest.mark.parametrize("group", in_groups(POINTS))
def test_every_trained_factor_moves_and_nothing_else(group):
    """An adapter that contradicts nothing can learn: after three steps each trained factor differs from its start."""
    hold_each(moves_what_trains, group)


def moves_what_trains(choices: Choices) -> None:
    """The law at one point."""
    alone, x = Alone(choices, torch.float32), torch.randn(7, 10)
    goal = torch.randn(7, 12)
    tensors = {(s, k): getattr(f, k) for s, f in alone.made.items() for k in ("weight", "start")}
    tensors = {k: t for k, t in tensors.items() if t is not None}
    before = {k: t.detach().clone() for k, t in tensors.items()}
    trained = [t for (_, kind), t in tensors.items() if kind == "weight"]
    for step in (0.1, 0.05, 0.03):  # no two add up to the third: nothing comes back to where it was
        gradients = torch.autograd.grad((alone.path(x) - goal).square().mean(), trained)
        with torch.no_grad():
            for t, gradient in zip(trained, gradients, strict=True):
                t.sub_(step * gradient.sign())
    moved = {k for k, t in tensors.items() if not torch.equal(t, before[k])}
    assert moved == {k for k in tensors if k[1] == "weight"}
    parts = {slot: slot if slot in ("A", "B") else "core" for slot, _ in moved}
    assert set(parts.values()) == {p for p in choices.train if p != "core" or choices.core != "none"}


@torch.no_grad()
@pytest.mark.parametrize("choices", THROUGH_PEFT, ids=_name)
def test_through_peft(choices):
    """Saved and loaded under another seed: the same numbers; disabled: the pretrained ones; merged: the adapter's."""
    given = {n: getattr(choices, n) for n in choices.__dataclass_fields__} | {"train": list(choices.train)}
    model, x = adapted("linear", config("linear", choices, **given)), batch("linear")
    stir(model)
    expected, layer = model(x), layer_of(model)
    with model.disable_adapter():
        assert torch.equal(model(x), base_model("linear")(x))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = base_model("linear")
        torch.manual_seed(12345)
        loaded = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
        assert torch.equal(loaded(x), expected)
    layer.merge()
    size = float(expected.abs().max()) + float((expected - base_model("linear")(x)).abs().max())
    assert float((model(x) - expected).abs().max()) <= TOLERANCE[torch.float32] * size


@torch.no_grad()
def test_subtract_is_accurate_in_bfloat16():
    """Offsets keep what a difference of two products loses: within 1 % of the float64 answer, on weights as large as
    a real model's (entries of 0.3, sides of several hundred) after small steps."""
    torch.manual_seed(0)
    o, i, r = 320, 384, 32
    linear = nn.Linear(i, o, bias=False)
    linear.weight.mul_(0.3 / linear.weight.std())
    linear = linear.to(torch.bfloat16)
    view = view_of(linear)
    assert view is not None
    x = torch.randn(64, i).to(torch.bfloat16)
    for outer, core, core_start, scale in (
        ("nystrom", "dense", "nystrom", "none"),
        ("nystrom", "dense", "pinv", "unit"),
        ("svd", "none", "kaiming", "none"),
        ("svd", "nested", "orthogonal", "none"),
    ):
        choices = Choices(outer=outer, core=core, train=FACTORS, start="subtract", core_start=core_start)
        spec = AdapterSpec(choices=choices.changed(slice_scale=scale), r=r, inner_r=r // 2, scale=1.0)
        adapter = CoreAdapter.of(spec, view)
        factors = adapter.start(BaseWeight(linear, view), None, "layer")
        for factor in factors.values():
            if factor.weight is not None:
                factor.weight.data = 2e-3 * torch.randn(factor.plan.shape)  # float32, as PEFT keeps trained parts
        numbers = read_numbers(factors, linear.weight.double())
        delta = product(core, "w_a", numbers.now()) - product(core, "w_a", numbers.starts)
        expected = run_plain(linear, delta.detach(), x)
        found = adapter.path(x, factors, linear.weight)
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < 0.01, (outer, core, error)
        # The same as a difference of two products, each in bfloat16, is what the offsets are for.
        now, start = ({n: t.to(torch.bfloat16) for n, t in part.items()} for part in (numbers.now(), numbers.starts))
        naive = _chain(x, core, now) - _chain(x, core, start)
        assert float((naive.double() - expected).norm() / expected.norm()) > 3 * error


def _chain(x: torch.Tensor, core: str, M: dict[str, torch.Tensor]) -> torch.Tensor:
    names = {"none": ("A", "B"), "dense": ("A", "core", "B"), "nested": ("A", "core_a", "core_b", "B")}[core]
    for name in names:
        x = F.linear(x, M[name])
    return x
