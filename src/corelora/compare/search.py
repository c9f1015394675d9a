"""Which learning rates a group tries: some first, then further ones outward, as long as what lies beyond may matter."""

from __future__ import annotations

from collections.abc import Sequence

from corelora.compare.leaders import LOSS, Leader, by_setting, leader_of
from corelora.compare.rates import is_near
from corelora.compare.standing import Standing
from corelora.compare.study import Group


def asked(group: Group, runs: Sequence[Standing], score: str, lower: bool) -> list[Standing]:
    """The runs of the first seeds that are asked for so far.

    Each compared setting begins with the rates of `group.begin` and goes on to the next one above or below while the
    best rate, or one within 1 % of its loss, is the highest or lowest of those tried. Where all fail, lower ones
    follow; where several share the best score and its loss, as a classifier does that always answers one class, both
    ways are gone. Where another figure than the loss decides, the best alone is followed: at rates that are too high a
    classifier's losses are all alike.

    Args:
        group: of the study.
        runs: all of its first seeds, done or not.
        score: the deciding figure.
        lower: whether lower is better.
    """
    if not group.begin:
        return list(runs)
    settings = by_setting(group, runs).values()
    wanted = {run.folder for own in settings for run in _outward(group, own, score, lower)}
    return [run for run in runs if run.folder in wanted]


def _outward(group: Group, runs: Sequence[Standing], score: str, lower: bool) -> list[Standing]:
    """Of one setting's runs those with the rates tried first, and beyond them as far as they say."""
    rates = sorted({_rate(run) for run in runs})
    low, high = (rates.index(end(group.begin)) for end in (min, max))
    while True:
        tried = [run for run in runs if rates[low] <= _rate(run) <= rates[high]]
        if any(run.state == "missing" for run in tried):
            return tried
        leader = leader_of(group, tried, score, lower)
        alike = len(_as_good(leader, tried, score)) > 1
        below, above = _reaches(leader, rates[low], rates[high], score == LOSS)
        wider = max(0, low - (below or alike)), min(len(rates) - 1, high + (above or alike))
        if wider == (low, high):
            return tried
        low, high = wider


def _as_good(leader: Leader, tried: Sequence[Standing], score: str) -> list[Standing]:
    """The runs that score what the best one does, to the last digit, at a loss within 1 % of its own."""
    if not leader.runs:
        return []
    best = leader.runs[0]
    loss, equal = best.figure(LOSS), [run for run in tried if run.figure(score) == best.figure(score)]
    if loss is None:
        return equal
    return [run for run in equal if is_near(run.figure(LOSS) or 0.0, loss)]


def _reaches(leader: Leader, low: float, high: float, by_loss: bool) -> tuple[bool, bool]:
    """Whether the rates below and above those tried may be as good."""
    if not leader.runs:
        return True, False
    best, usable = _rate(leader.runs[0]), (leader.usable if by_loss else None) or (high, low)
    return low in (best, usable[0]), high in (best, usable[1])


def _rate(run: Standing) -> float:
    return run.run.recipe.optim.lr
