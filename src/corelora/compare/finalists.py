"""Which runs are repeated with more seeds and evaluated, once the first ones are done."""

from __future__ import annotations

from collections.abc import Sequence

from corelora.compare.expand import Planned, final_run
from corelora.compare.leaders import Leader, by_setting, leaders
from corelora.compare.standing import Standing
from corelora.compare.study import EVALUATED, Group, label


def finalists(group: Group, runs: Sequence[Standing], score: str, lower: bool) -> list[Planned]:
    """The finalists' runs: the best settings, and those that stay whatever came out, each with every seed.

    None of a setting before its own first runs have all ended; where only the best ones are finalists, before all have.
    Where the finalists have keys of their own, the first seeds are run again with them. Only finalists are evaluated,
    so where an evaluation's score decides, they are chosen by their training loss.

    Args:
        group: of the study.
        runs: of its first seeds that are asked for so far.
        score: the deciding figure.
        lower: whether lower is better.
    """
    if group.finalists is None:
        return []
    settings = by_setting(group, runs).values()
    ended = [own for own in settings if all(run.state != "missing" for run in own)]
    if group.finalists.top is not None and len(ended) < len(settings):
        return []
    by, low = ("train_loss", True) if score.startswith(EVALUATED) else (score, lower)
    ranked = [leader for leader in leaders(group, [run for own in ended for run in own], by, low) if leader.runs]
    chosen = ranked[: group.finalists.top]
    chosen += [x for x in ranked if x not in chosen and any(_is(x, wanted) for wanted in group.finalists.always)]
    keys, more = group.finalists.set, group.finalists.seeds
    first = [] if keys else [standing.run for leader in chosen for standing in leader.runs]
    seeds = [*group.seeds, *more] if keys else more
    return first + [final_run(leader.runs[0].run, seed, keys) for leader in chosen for seed in seeds]


def _is(leader: Leader, wanted: dict) -> bool:
    values = dict(leader.setting)
    return all(values.get(axis) == label(value) for axis, value in wanted.items())
