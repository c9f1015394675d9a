"""docs/published: figures of the papers, in the form that a study's `published` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).resolve().parents[1] / "docs" / "published").glob("*.json"))
LABELS = {
    "model", "method", "rank", "lr", "optimizer", "parameters", "shots", "outer", "core_start", "inner_start",
    "structure", "position",
}  # fmt: skip


def test_every_results_table_is_there():
    names = {p.stem for p in FILES}
    assert {f"nlora-table-{n:02}" for n in range(1, 12)} <= names
    assert {f"nora-table-{n:02}" for n in range(1, 12)} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_table(path):
    """Whole rows, known labels, no row twice; an average that the paper gets wrong is marked, others are means."""
    data = json.loads(path.read_text())
    assert {"paper", "source", "table", "about", "units", "higher_is_better", "columns", "rows"} <= set(data)
    rows = data["rows"]
    labels = [tuple(sorted((k, str(v)) for k, v in row.items() if k in LABELS)) for row in rows]
    assert len(set(labels)) == len(rows) > 0
    for row in rows:
        assert set(row) - {"values", "average_is_off"} <= LABELS
        assert set(row["values"]) == set(data["columns"])
        assert all(isinstance(v, (int, float)) and v > 0 for v in row["values"].values())
        if data["units"] == "%":
            assert all(v <= 100 for v in row["values"].values())
        if "average" in row["values"]:
            own = [v for column, v in row["values"].items() if column != "average"]
            is_off = abs(sum(own) / len(own) - row["values"]["average"]) > 0.0501
            assert is_off == row.get("average_is_off", False)
