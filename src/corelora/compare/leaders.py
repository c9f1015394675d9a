"""Who leads a group: each compared setting at its best tuned value, with mean, deviation and what it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corelora.compare.standing import Standing
from corelora.compare.study import Group

Labels = tuple[tuple[str, str], ...]  # (axis, value), in the study's order
NEAR = 0.01  # rates whose score is within so much of the best one's are usable


@dataclass(frozen=True, kw_only=True)
class Leader:
    """One compared setting of a group.

    Attributes:
        setting: values of the compared axes.
        tuned: values of the tuned axes at its best.
        runs: all seeds of that, done.
        scores: the deciding figure of each of them.
        failed, missing: runs of the setting, at any tuned value, that failed or are still to be made.
        usable: (lowest, highest) learning rate whose score is within 1 % of the best, where rates are tuned.
        noise: its distance from the best setting is within what seeds alone make; None: too few seeds to say.
    """

    setting: Labels
    tuned: Labels
    runs: tuple[Standing, ...]
    scores: tuple[float, ...]
    failed: int
    missing: int
    usable: tuple[float, float] | None
    edges: tuple[str, ...] = ()
    noise: bool | None = None

    @property
    def mean(self) -> float:
        """Of the seeds' scores; not a number without any."""
        return statistics.fmean(self.scores) if self.scores else math.nan

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def name(self) -> str:
        """The setting in words."""
        return ", ".join(value if axis == "method" else f"{axis} {value}" for axis, value in self.setting)

    def average(self, figure: str) -> float | None:
        """Mean of another figure of its runs."""
        found = [v for r in self.runs if (v := r.figure(figure)) is not None]
        return statistics.fmean(found) if found else None

    @property
    def early_loss(self) -> float | None:
        """Mean of the training losses after a tenth of the run."""
        found = [v for r in self.runs if (v := r.early_loss) is not None]
        return statistics.fmean(found) if found else None


def leaders(group: Group, runs: Sequence[Standing], score: str, lower: bool) -> list[Leader]:
    """The compared settings of a group, best first; those without a finished run last.

    Args:
        group: of the study.
        runs: of that group, all seeds.
        score: the deciding figure.
        lower: whether lower is better.
    """
    compared = [axis for axis in group.axes if axis not in group.tune]
    has_finals = any(run.run.is_final for run in runs)
    settings: dict[Labels, list[Standing]] = {}
    for run in runs:
        settings.setdefault(_of(run, compared), []).append(run)
    found = [_leader(group, setting, of_it, score, lower) for setting, of_it in settings.items()]
    found = [_judged_by_finals(x, settings[x.setting], score) for x in found] if has_finals else found
    found.sort(key=lambda x: (math.isnan(x.mean), x.mean if lower else -x.mean))
    return [_with_noise(x, found[0]) for x in found]


def _leader(group: Group, setting: Labels, runs: Sequence[Standing], score: str, lower: bool) -> Leader:
    values: dict[Labels, list[tuple[Standing, float]]] = {}
    for run in runs:
        value = run.figure(score)
        if not run.run.is_final and run.state == "done" and value is not None and math.isfinite(value):
            values.setdefault(_of(run, group.tune), []).append((run, value))
    # Tuned by the first seed alone: else a value with more seeds would be judged by another measure.
    firsts = {tuned: _first(of_it, group.seeds) for tuned, of_it in values.items()}
    tuned: Labels = min(firsts, key=lambda t: firsts[t] if lower else -firsts[t], default=())
    best = values.get(tuned, [])
    return Leader(
        setting=setting,
        tuned=tuned,
        runs=tuple(run for run, _ in best),
        scores=tuple(value for _, value in best),
        failed=sum(run.state == "failed" for run in runs),
        missing=sum(run.state == "missing" for run in runs),
        usable=_usable(group, tuned, firsts),
        edges=_edges(runs, tuned),
    )


def _judged_by_finals(leader: Leader, runs: Sequence[Standing], score: str) -> Leader:
    """Tuned as before, but with the scores of the finalists' own runs; none for a setting that is no finalist."""
    found = [(r, v) for r in runs if r.run.is_final and r.state == "done" and (v := r.figure(score)) is not None]
    finals = {"runs": tuple(r for r, _ in found), "scores": tuple(v for _, v in found)}
    return Leader(**{**leader.__dict__, **finals})


def _first(runs: Sequence[tuple[Standing, float]], seeds: Sequence[int]) -> float:
    """Mean score of the seeds that all runs have."""
    return statistics.fmean([v for r, v in runs if r.run.seed in seeds] or [v for _, v in runs])


def _usable(group: Group, best: Labels, firsts: Mapping[Labels, float]) -> tuple[float, float] | None:
    """Rates around the best one, without a gap, whose score is within 1 % of its."""
    if "lr" not in group.tune or not best:
        return None
    others = [pair for pair in best if pair[0] != "lr"]
    rates = sorted(
        (float(dict(t)["lr"]), abs(v - firsts[best]) <= NEAR * abs(firsts[best]))
        for t, v in firsts.items()
        if [pair for pair in t if pair[0] != "lr"] == others
    )
    at = next(n for n, (rate, _) in enumerate(rates) if rate == float(dict(best)["lr"]))
    low = high = at
    while low > 0 and rates[low - 1][1]:
        low -= 1
    while high + 1 < len(rates) and rates[high + 1][1]:
        high += 1
    return rates[low][0], rates[high][0]


def _edges(runs: Sequence[Standing], best: Labels) -> tuple[str, ...]:
    """Tuned axes of numbers whose best value is the smallest or largest one tried, runs that failed included."""
    found = []
    for axis, value in best:
        tried = {r.run.labels[axis] for r in runs if r.state != "missing"}
        if len(tried) > 1 and all(map(is_number, tried)):
            numbers = [float(t) for t in tried]
            found += [axis] if float(value) in (min(numbers), max(numbers)) else []
    return tuple(found)


def is_number(value: Any) -> bool:
    """Whether a value of an axis, or its label, is a number above zero."""
    try:
        return not isinstance(value, bool) and float(value) > 0
    except (TypeError, ValueError):
        return False


def _with_noise(leader: Leader, best: Leader) -> Leader:
    """Compare with the best: within two standard errors of the difference is noise."""
    if leader is best or leader.deviation is None or best.deviation is None:
        return leader
    error = math.sqrt(leader.deviation**2 / len(leader.scores) + best.deviation**2 / len(best.scores))
    return Leader(**{**leader.__dict__, "noise": abs(leader.mean - best.mean) <= 2 * error})


def _of(run: Standing, axes: Sequence[str]) -> Labels:
    return tuple((axis, run.run.labels[axis]) for axis in axes)
