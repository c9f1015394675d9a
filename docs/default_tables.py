"""Which figure decided each default: the runs of docs/results/known, setting against setting.

docs/defaults.yaml lists the defaults, and the studies, groups and settings that compare them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from key_tables import table
from study_tables import known_study, rated

from corelora.compare.leaders import Leader, noise_of
from corelora.compare.tables import led_groups

LIST = Path(__file__).resolve().parent / "defaults.yaml"


def defaults() -> str:
    """Each default with its figure, the best other setting's, and what the difference says."""
    header = ["method", "default", "study and score", "with it (rate)", "best other setting", "with that (rate)"]
    entries = yaml.safe_load(LIST.read_text())
    return table([*header, "the default is"], [row for entry in entries for row in _rows(entry)])


def _rows(entry: dict[str, Any]) -> Iterator[list[str]]:
    for place in entry["decided_by"]:
        score, lower, found = _leaders(place["study"])[place["group"]]
        wanted = [place["setting"], *place.get("against", [])]
        if missing := [name for name in wanted if name not in found]:
            raise SystemExit(f"{LIST.name}: {place['study']} has no finished run of {missing}: {', '.join(found)}")
        own = found[place["setting"]]
        others = wanted[1:] or [name for name in found if found[name] is not own]
        other = next(name for name in found if name in others)  # they come best first
        where = f"{place['study']}, {score.replace('_', ' ')}"
        cells = [rated(own, 4), other, rated(found[other], 4), _reading(own, found[other], lower)]
        yield [entry["method"], entry["default"], where, *cells]


@cache
def _leaders(study: str) -> dict[str, tuple[str, bool, dict[str, Leader]]]:
    """(score, whether lower is better, leaders with runs by their setting's values) of a study's groups by name."""
    with known_study(study) as folder:
        return {g.name: (*folder.study.score_of(g), _by_setting(found)) for g, _, found in led_groups(folder)}


def _by_setting(found: Sequence[Leader]) -> dict[str, Leader]:
    return {", ".join(value for _, value in leader.setting): leader for leader in found if leader.scores}


def _reading(own: Leader, other: Leader, lower: bool) -> str:
    """Whether the default is better, worse, or as good as the best other one."""
    reach, gain = noise_of(own, other), (other.mean - own.mean) * (1 if lower else -1)
    if reach is None:
        return f"{'better' if gain > 0 else 'worse'} by {abs(gain):.4f}, too few seeds"
    if abs(gain) <= reach:
        return "within noise"
    return f"{'better' if gain > 0 else 'worse'} by {abs(gain):.4f}"
