"""The range of usable learning rates: where a line between two that were tried crosses 1 % above the best."""

from __future__ import annotations

import math

import pytest

from corelora.compare.rates import RateCurve, width, within


def curve(*points, lower=True):
    return RateCurve(figure="test_loss", points=points, lower=lower)


def test_ends_lie_between_the_rates_that_were_tried():
    """Halfway up to the limit is halfway in the logarithm of the rate, on either side."""
    low, high = curve((1e-4, 1.02), (1e-3, 1.0), (1e-2, 1.04)).usable()
    assert low == pytest.approx(1e-3 * 10**-0.5)
    assert high == pytest.approx(1e-3 * 10**0.25)
    assert width((low, high)) == pytest.approx(10**0.75)


def test_a_range_ends_with_what_came_out_and_has_no_gap():
    """Beyond the last rate nothing is known; a good one behind a bad one does not count."""
    assert curve((1e-4, 1.0), (1e-3, 1.005)).usable() == (1e-4, 1e-3)
    assert curve((1e-4, 1.0)).usable() == (1e-4, 1e-4)
    _, high = curve((1e-4, 1.0), (1e-3, 1.1), (1e-2, 1.001)).usable()
    assert high < 1e-3


def test_highest_may_be_best():
    assert curve((1e-4, 0.80), (1e-3, 0.82), lower=False).usable()[0] == pytest.approx(1e-3 * 10**-0.41)


def test_widened_and_narrowed():
    """By as much as the figure is uncertain; never to nothing."""
    made = curve((1e-4, 1.1), (1e-3, 1.0), (1e-2, 1.1))
    assert [math.log10(width(made.usable(by))) for by in (-1.0, -0.005, 0.0, 0.01)] == pytest.approx([0, 0.1, 0.2, 0.4])


def test_in_words():
    assert within((1e-4, 1e-4)) == "0.0001"
    assert within((1.04e-4, 2.08e-4), " or more") == "0.0001 to 0.00021 (x2 or more)"
