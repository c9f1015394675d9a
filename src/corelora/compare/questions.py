"""Answers to a study's questions: yes, within noise, or no, with the figures that say so."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from corelora.compare.leaders import Leader, noise_of
from corelora.compare.rates import width, within
from corelora.compare.study import Question, label

YES, NOISE, NO, OPEN = "yes", "within noise", "no", "not known yet"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One of them.

    Attributes:
        ask: the question.
        verdict: YES, NOISE, NO, or OPEN while runs are missing.
        figures: what it rests on, in words.
    """

    ask: str
    verdict: str
    figures: str


def answer(question: Question, found: Sequence[Leader], lower: bool) -> Answer:
    """Answer a question from its group's leaders.

    Args:
        question: of the study.
        found: the leaders of its group.
        lower: whether a lower score is better.
    """
    one, other = (_leader(found, given) for given in (question.subject, question.other))
    if question.claim == "wider_rates":
        return Answer(ask=question.ask, **_wider(one, other))
    if not one.scores or not other.scores:
        return Answer(ask=question.ask, verdict=OPEN, figures=f"{_score(one)}; {_score(other)}")
    worse = (one.mean - other.mean) * (1 if lower else -1)
    reach = noise_of(one, other)
    figures = f"{_score(one)}; {_score(other)}; difference {one.mean - other.mean:+.4f}"
    if reach is None:  # seeds don't say what noise is: only a claim that the means already break can be answered
        return Answer(ask=question.ask, verdict=OPEN, figures=f"{figures}, too few seeds to tell it from noise")
    figures += f", of which seeds alone make up to {reach:.4f}"
    return Answer(ask=question.ask, verdict=_verdict(question, worse, reach), figures=figures)


def _verdict(question: Question, worse: float, reach: float) -> str:
    """Whether the claim holds, by how much the subject is worse (below 0: better) and what seeds alone make."""
    if question.claim == "near":
        beyond = abs(worse) - question.by
        return YES if beyond <= 0 else NOISE if beyond <= reach else NO
    if question.claim == "as_good" and worse <= 0:
        return YES
    if abs(worse) <= reach:
        return NOISE
    return YES if worse < 0 else NO


def _wider(one: Leader, other: Leader) -> dict[str, str]:
    """By the ratio of the highest to the lowest usable rate.

    What counts as within 1 % of the best loss moves by the deviation over seeds, and a range's ends with it: ranges
    whose widths can be either's way round are within noise.
    """
    own, its = _widths(one), _widths(other)
    figures = "; ".join(_range(x, widths) for x, widths in ((one, own), (other, its)))
    if own is None or its is None:
        return {"verdict": OPEN, "figures": figures}
    verdict = YES if own[0] > its[1] else NO if own[1] < its[0] else NOISE
    return {"verdict": verdict, "figures": figures}


def _widths(leader: Leader) -> tuple[float, float] | None:
    """The least and the most that the usable range's width can be by the deviation over seeds; None for too few."""
    curve = leader.curve
    if curve is None:
        return None
    values = [value for run in leader.runs if (value := run.figure(curve.figure)) is not None]
    if len(values) < 2:
        return None
    least, most = (width(curve.usable(way * statistics.stdev(values))) for way in (-1, 1))
    return least, most


def _range(leader: Leader, widths: tuple[float, float] | None) -> str:
    if leader.usable is None:
        return f"{leader.name}: no run yet"
    seeds = "too few seeds to tell it from noise"
    if widths is not None:
        seeds = f"by seeds x{widths[0]:.3g} to x{widths[1]:.3g}"
    return f"{leader.name} {within(leader.usable)}, {seeds}"


def _leader(found: Sequence[Leader], given: dict[str, object]) -> Leader:
    """The setting with these values; of several, the best one."""
    wanted = {axis: label(value) for axis, value in given.items()}.items()
    return next(leader for leader in found if wanted <= dict(leader.setting).items())


def _score(leader: Leader) -> str:
    if not leader.scores:
        return f"{leader.name}: no run yet"
    deviation = "" if leader.deviation is None else f" ± {leader.deviation:.4f}"
    tuned = "".join(f", {axis} {value}" for axis, value in leader.tuned)
    return f"{leader.name} {leader.mean:.4f}{deviation} ({len(leader.scores)} seeds{tuned})"
