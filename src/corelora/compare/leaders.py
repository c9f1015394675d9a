"""Who leads a group: each compared setting at its best tuned value, with mean, deviation and what it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import t as student

from corelora.compare.rates import RateCurve
from corelora.compare.standing import Standing
from corelora.compare.study import Group

Labels = tuple[tuple[str, str], ...]  # (axis, value), in the study's order
LOSS = "test_loss"
SURE = 0.95  # a difference that seeds alone make in so many of all cases is noise
RATES = ("lr", "optim.lr")  # what an axis of learning rates is called


@dataclass(frozen=True, kw_only=True)
class Leader:
    """One compared setting of a group.

    Attributes:
        setting: values of the compared axes.
        tuned: values of the tuned axes at its best.
        runs: all seeds of that, done.
        scores: the deciding figure of each of them.
        failed, missing: runs of the setting, at any tuned value, that failed or whose score is no number, or that are
            still to be made.
        curve: test losses over the learning rates, where rates are tuned; scores where runs have no test loss.
        tried: (lowest, highest) learning rate that the study asks for, where there is more than one.
        noise: its distance from the best setting of several seeds is within what seeds alone make; None: too few
            seeds to say.
    """

    setting: Labels
    tuned: Labels
    runs: tuple[Standing, ...]
    scores: tuple[float, ...]
    failed: int
    missing: int
    curve: RateCurve | None
    tried: tuple[float, float] | None = None
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
    def usable(self) -> tuple[float, float] | None:
        """(lowest, highest) learning rate whose test loss is within 1 % of the lowest one."""
        return None if self.curve is None else self.curve.usable()

    @property
    def name(self) -> str:
        """The setting in words."""
        return ", ".join(value if axis == "method" else f"{axis} {value}" for axis, value in self.setting)

    @property
    def edge(self) -> str | None:
        """Which end of the rates that were tried it is best at, lowest or highest: a better one may lie beyond."""
        if self.tried is None or not self.runs:
            return None
        return {self.tried[0]: "lowest", self.tried[1]: "highest"}.get(self.runs[0].run.recipe.optim.lr)

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
    has_finals = any(run.run.is_final for run in runs)
    settings = by_setting(group, runs)
    found = [leader_of(group, of_it, score, lower) for of_it in settings.values()]
    found = [_judged_by_finals(x, settings[x.setting], score) for x in found] if has_finals else found
    found.sort(key=lambda x: (math.isnan(x.mean), x.mean if lower else -x.mean))
    best = next((x for x in found if x.deviation is not None), None)
    return [_with_noise(x, best) for x in found]


def by_setting(group: Group, runs: Sequence[Standing]) -> dict[Labels, list[Standing]]:
    """The runs of each compared setting.

    Args:
        group: of the study.
        runs: of that group.
    """
    settings: dict[Labels, list[Standing]] = {}
    for run in runs:
        settings.setdefault(_setting_of(group, run), []).append(run)
    return settings


def _setting_of(group: Group, run: Standing) -> Labels:
    """The values of a run on the compared axes."""
    return _of(run, [axis for axis in group.axes if axis not in group.tune])


def leader_of(group: Group, runs: Sequence[Standing], score: str, lower: bool) -> Leader:
    """One compared setting at its best tuned value.

    Args:
        group: of the study.
        runs: of that setting.
        score: the deciding figure.
        lower: whether lower is better.
    """
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
        setting=_setting_of(group, runs[0]),
        tuned=tuned,
        runs=tuple(run for run, _ in best),
        scores=tuple(value for _, value in best),
        failed=sum(run.state == "failed" or _is_lost(run, score) for run in runs),
        missing=sum(run.state == "missing" for run in runs),
        curve=_curve(group, tuned, values, score, lower),
        tried=_tried(group, runs),
    )


def _judged_by_finals(leader: Leader, runs: Sequence[Standing], score: str) -> Leader:
    """Tuned as before, but with the scores of the finalists' own runs; none for a setting that is no finalist."""
    finals = [(r, r.figure(score)) for r in runs if r.run.is_final and r.state == "done"]
    found = [(r, v) for r, v in finals if v is not None and math.isfinite(v)]
    return replace(leader, runs=tuple(r for r, _ in found), scores=tuple(v for _, v in found))


def _is_lost(run: Standing, score: str) -> bool:
    """Whether a run ended with a score that is no number: nothing to average, and not to be passed over either."""
    value = run.figure(score)
    return run.state == "done" and value is not None and not math.isfinite(value)


def _first(runs: Sequence[tuple[Standing, float]], seeds: Sequence[int]) -> float:
    """Mean score of the seeds that all runs have."""
    return statistics.fmean([v for r, v in runs if r.run.seed in seeds] or [v for _, v in runs])


def _curve(
    group: Group, best: Labels, values: Mapping[Labels, Sequence[tuple[Standing, float]]], score: str, lower: bool
) -> RateCurve | None:
    """Test losses by rate, the first seeds'; the score, where runs have no test loss.

    The other tuned values are those of the best score.
    """
    axis = _rates_of(group)
    if axis is None or not best:
        return None
    others = [pair for pair in best if pair[0] != axis]
    runs = [of_it for tuned, of_it in values.items() if [pair for pair in tuned if pair[0] != axis] == others]
    losses = [[(run, run.figure(LOSS)) for run, _ in of_it] for of_it in runs]
    if all(loss is not None and math.isfinite(loss) for of_it in losses for _, loss in of_it):
        runs, score, lower = [[(run, loss or 0.0) for run, loss in of_it] for of_it in losses], LOSS, True
    points = sorted((of_it[0][0].run.recipe.optim.lr, _first(of_it, group.seeds)) for of_it in runs)
    return RateCurve(figure=score, points=tuple(points), lower=lower)


def _tried(group: Group, runs: Sequence[Standing]) -> tuple[float, float] | None:
    """The ends of the rates that are tuned, runs that failed or are missing too."""
    rates = {run.run.recipe.optim.lr for run in runs}
    return (min(rates), max(rates)) if _rates_of(group) and len(rates) > 1 else None


def _rates_of(group: Group) -> str | None:
    """The tuned axis of learning rates."""
    return next((axis for axis in group.tune if axis in RATES), None)


def _with_noise(leader: Leader, best: Leader | None) -> Leader:
    """Compare with the best."""
    reach = None if best is None or leader is best else noise_of(leader, best)
    return leader if reach is None or best is None else replace(leader, noise=abs(leader.mean - best.mean) <= reach)


def noise_of(one: Leader, other: Leader) -> float | None:
    """How far apart seeds alone put the two means in `SURE` of all cases; None for too few seeds to say.

    By Welch's t-test: two standard errors are too few for two or three seeds.
    """
    if one.deviation is None or other.deviation is None:
        return None
    own, its = one.deviation**2 / len(one.scores), other.deviation**2 / len(other.scores)
    if own + its == 0:
        return 0.0
    freedom = (own + its) ** 2 / (own**2 / (len(one.scores) - 1) + its**2 / (len(other.scores) - 1))
    return float(student.ppf((1 + SURE) / 2, freedom)) * math.sqrt(own + its)


def _of(run: Standing, axes: Sequence[str]) -> Labels:
    return tuple((axis, run.run.labels[axis]) for axis in axes)
