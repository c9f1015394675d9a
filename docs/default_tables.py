"""Which figure decided each default: the runs of docs/results/known, setting against setting.

docs/defaults.yaml lists the defaults, and the studies, groups and settings that compare them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from key_tables import table
from study_tables import known_study

from corelora.compare.leaders import Leader, noise_of
from corelora.compare.tables import group_leaders

LIST = Path(__file__).resolve().parent / "defaults.yaml"


def defaults() -> str:
    """Each default with its figure, the best other setting's, and what the difference says."""
    header = ["method", "default", "study and score", "with it", "best other setting", "with that", "the default is"]
    return table(header, [row for entry in yaml.safe_load(LIST.read_text()) for row in _rows(entry)])


def _rows(entry: dict[str, Any]) -> Iterator[list[str]]:
    for place in entry["decided_by"]:
        with known_study(place["study"]) as folder:
            [group] = [g for g in folder.study.groups if g.name == place["group"]]
            score, lower = folder.study.score_of(group)
            found = [x for x in group_leaders(folder, group, folder.standings()[group.name]) if x.scores]
        by_name = {", ".join(value for _, value in x.setting): x for x in found}
        wanted = [place["setting"], *place.get("against", [])]
        if missing := [name for name in wanted if name not in by_name]:
            raise SystemExit(f"{LIST.name}: {place['study']} has no finished run of {missing}: {', '.join(by_name)}")
        own = by_name.pop(place["setting"])
        other = next(name for name in by_name if name in wanted or "against" not in place)
        where = f"{place['study']}, {score.replace('_', ' ')}"
        cells = [_shown(own), other, _shown(by_name[other]), _reading(own, by_name[other], lower)]
        yield [entry["method"], entry["default"], where, *cells]


def _shown(leader: Leader) -> str:
    spread = f" ± {leader.deviation:.4f}" if leader.deviation is not None else ""
    return f"{leader.mean:.4f}{spread} (lr {', '.join(value for _, value in leader.tuned)})"


def _reading(own: Leader, other: Leader, lower: bool) -> str:
    """Whether the default is better, worse, or as good as the best other one."""
    reach, gain = noise_of(own, other), (other.mean - own.mean) * (1 if lower else -1)
    if reach is None:
        return f"{'better' if gain > 0 else 'worse'} by {abs(gain):.4f}, too few seeds"
    if abs(gain) <= reach:
        return "within noise"
    return f"{'better' if gain > 0 else 'worse'} by {abs(gain):.4f}"
