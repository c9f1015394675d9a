"""Which learning rates a setting can be trained at: the width of the valley around its best one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NEAR = 0.01  # rates whose loss is within so much of the lowest one are usable


@dataclass(frozen=True, kw_only=True)
class RateCurve:
    """A figure over the learning rates at which it came out.

    Attributes:
        figure: its name.
        points: (rate, value), by rate; not empty.
        lower: whether lower is better.
    """

    figure: str
    points: tuple[tuple[float, float], ...]
    lower: bool

    def usable(self, widen: float = 0.0) -> tuple[float, float]:
        """(lowest, highest) rate around the best one whose value is within 1 % of its own, without a gap.

        Where the next rate that was tried is outside, the end lies between the two, by a straight line over the rate's
        logarithm: rates are tried in large steps, and by those alone most ranges would be one rate wide. Where no
        further one came out, it is the last that did.

        Args:
            widen: how much further from the best a value may be, in units of the figure; negative: less far.
        """
        best = (min if self.lower else max)(value for _, value in self.points)
        worse = [abs(value - best) for _, value in self.points]
        at, limit = worse.index(0.0), max(NEAR * abs(best) + widen, 0.0)
        ends = []
        for outward in (range(at, -1, -1), range(at, len(worse))):
            ends.append(self._end([(self.points[n][0], worse[n]) for n in outward], limit))
        return ends[0], ends[1]

    @staticmethod
    def _end(outward: Sequence[tuple[float, float]], limit: float) -> float:
        """Where the way from the best rate outward, (rate, how much worse), crosses the limit."""
        rate, height = outward[0]
        for further, higher in outward[1:]:
            if higher > limit:
                return rate * (further / rate) ** ((limit - height) / (higher - height))
            rate, height = further, higher
        return rate


def is_near(value: float, best: float) -> bool:
    """Whether a loss is within 1 % of another."""
    return abs(value - best) <= NEAR * abs(best)


def width(usable: tuple[float, float]) -> float:
    """How many times the highest rate is the lowest."""
    return usable[1] / usable[0]


def within(usable: tuple[float, float], more: str = "") -> str:
    """A range in words, its width too where it is more than one rate.

    Args:
        usable: the range.
        more: what is said beside the width.
    """
    low, high = usable
    return f"{low:.2g} to {high:.2g} (x{width(usable):.3g}{more})" if high > low else f"{low:g}"
