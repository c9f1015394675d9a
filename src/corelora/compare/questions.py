"""Answers to a study's questions: yes, within noise, or no, with the figures that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corelora.compare.leaders import Leader, noise_of
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
    """By the ratio of the highest to the lowest usable rate; rates are those of a grid, so equal ones say no."""
    shown = "; ".join(f"{x.name} {_range(x.usable)}" for x in (one, other))
    if one.usable is None or other.usable is None:
        return {"verdict": OPEN, "figures": shown}
    is_wider = _width(one.usable) > _width(other.usable) * (1 + 1e-9)
    return {"verdict": YES if is_wider else NO, "figures": shown}


def _width(usable: tuple[float, float]) -> float:
    return usable[1] / usable[0]


def _range(usable: tuple[float, float] | None) -> str:
    return "no run yet" if usable is None else f"{usable[0]:g} to {usable[1]:g} (x{_width(usable):.3g})"


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
