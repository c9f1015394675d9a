"""`lora_pair` on the whole design space: two plain factors whose product is the adapter's change of the weight.

Expected values are the formulas of `laws.cases`, multiplied out from the stored numbers in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corelora.convert import lora_pair, truncated
from corelora.registry import CORES
from corelora.spec import Choices
from laws.cases import K, R, close, product, read_numbers
from laws.test_design_space import POINTS, VARIATIONS, Alone

SPACE = POINTS + VARIATIONS


def largest_rank(c: Choices) -> int:
    """The rank that DESIGN section 3 promises: r or k; under `subtract` 2 r (2 k) only where both sides move."""
    inner = K if c.core == "nested" else R
    if c.start != "subtract":
        return inner
    one_side = "A" not in c.train or "B" not in c.train
    return min(R, 2 * inner) if one_side and c.core in ("none", "diagonal", "dense", "nested") else 2 * R


@pytest.mark.parametrize("core", sorted(CORES))
def test_the_pair_is_the_delta(core):
    """Every outer start, training set, start, core start, position and sampling of one core structure."""
    cases = [c for c in SPACE if c.core == core]
    assert len(cases) > 20
    for choices in cases:
        alone = Alone(choices)
        alone.stir()
        A, B = lora_pair(alone.core, alone.made, alone.W, torch.float64)
        numbers = read_numbers(alone.made, alone.W)
        delta = alone.explicit(numbers)
        # The reference is a difference of two products: it loses what they have in common.
        size = 1.5 * float(product(core, choices.position, numbers.now()).abs().max())
        close(B @ A, delta, torch.float64, max(size, float(delta.abs().max())))
        assert A.shape[1] == 10, choices
        assert B.shape[0] == 12, choices
        assert A.shape[0] == B.shape[1] <= largest_rank(choices), choices


def test_nothing_cancels_in_a_pair():
    """A step of 1e-6 in float32: the pair holds it to 5 digits, a difference of the two products to less than 3."""
    choices = Choices(outer="svd", core="dense", train=("A", "core", "B"), start="subtract", core_start="orthogonal")
    alone = Alone(choices, torch.float32)
    with torch.no_grad():
        for factor in alone.made.values():
            factor.weight.add_(1e-6 * torch.randn_like(factor.weight))
    numbers = read_numbers(alone.made, alone.W)  # float64
    now, start = product("dense", "w_a", numbers.now()), product("dense", "w_a", numbers.starts)
    exact = 1.5 * (now - start)
    A, B = lora_pair(alone.core, alone.made, alone.W)
    assert relative(B @ A, exact) < 1e-5
    assert relative(1.5 * (now.float() - start.float()), exact) > 1e-3


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_truncated_is_the_best_approximation():
    """Against torch's own SVD of the whole product; more rank than there is gives what there is."""
    A, B = torch.randn(6, 20, dtype=torch.float64), torch.randn(15, 6, dtype=torch.float64)
    a, b, S = truncated(A, B, 3)
    U, sigma, Vh = torch.linalg.svd(B @ A)
    torch.testing.assert_close(b @ a, U[:, :3] @ torch.diag(sigma[:3]) @ Vh[:3])
    torch.testing.assert_close(S, sigma[:6])
    a, b, _ = truncated(A, B, 9)
    assert a.shape == (6, 20)
    torch.testing.assert_close(b @ a, B @ A)
