"""What a paper prints for a group, beside what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corelora.compare.leaders import Labels, Leader
from corelora.compare.study import Group
from corelora.errors import CoreLoraError


def published_columns(where: Path, group: Group, found: Sequence[Leader]) -> dict[str, dict[Labels, str]]:
    """Columns of a group's table: the paper's figure of each setting and, where it is another than the score, ours.

    A row of the paper's belongs to a setting if every axis that both name has the same value (letters and digits
    compared, case left out); axes that the paper's file has no column for are not asked.

    Args:
        where: the folder that the study's files are relative to.
        group: of the study.
        found: its leaders.

    Raises:
        CoreLoraError: the file is missing or lacks a column.
    """
    if group.published is None:
        return {}
    data = _read(where / group.published.file)
    columns: dict[str, dict[Labels, str]] = {}
    for name, figure in group.published.columns.items():
        if name not in data["columns"]:
            raise CoreLoraError(f"{group.published.file}: no column {name!r}. It has: {', '.join(data['columns'])}.")
        heading = f"published {name}, {data.get('units', '')}".rstrip(", ")
        columns[heading] = {x.setting: _figure(data, {**dict(x.setting), **group.published.where}, name) for x in found}
        columns[f"measured {name}"] = {x.setting: _measured(x, figure, group.published.scale) for x in found}
    return columns


def _figure(data: Mapping[str, Any], setting: Mapping[str, str], column: str) -> str:
    """The paper's figure of a setting; nothing where it has no such row, or several."""
    rows = [row for row in data["rows"] if belongs(row, setting)]
    values = [row["values"][column] for row in rows if row["values"].get(column) is not None]
    return f"{values[0]:g}" if len(values) == 1 else ""


def belongs(row: Mapping[str, Any], setting: Mapping[str, str]) -> bool:
    """Whether a row of a paper's file is that setting's: values of the axes that both name agree."""
    return all(_plain(row[axis]) == _plain(value) for axis, value in setting.items() if row.get(axis) is not None)


def _plain(value: Any) -> str:
    return re.sub(r"[^a-z0-9.+]", "", str(value).lower())


def _measured(leader: Leader, figure: str, scale: float) -> str:
    value = leader.average(figure)
    return "" if value is None else f"{scale * value:.2f}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CoreLoraError(f"published: {path} can't be read ({error})") from None
