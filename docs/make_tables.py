"""Writes the tables of README.md and docs/ from the result files and the registry: `python docs/make_tables.py`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`. With `--check` nothing is written and the exit code
says whether all tables are current.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import corelora
from corelora.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def methods() -> str:
    """The registry."""
    rows = []
    for name in corelora.list_methods():
        m, c = METHODS[name], METHODS[name].default
        rows.append([f"`{name}`", m.title, c.outer, c.core, " ".join(c.train), c.start.replace("_", " "), m.paper])
    return _table(["method", "", "outer", "core", "trains", "start", "source"], rows)


def early_runs() -> str:
    """Losses of the first runs on a real model."""
    data = json.loads((RESULTS / "early-runs.json").read_text())
    rows = []
    for run in data["runs"]:
        loss = "diverged" if run["test_loss"] is None else f"{run['test_loss']:.3f}"
        rows.append([run["method"], run["settings"], run["trained"], loss])
    return f"{data['what']}.\n\n" + _table(["method", "settings", "trained", "test loss"], rows)


def step() -> str:
    """Time and memory of a training step."""
    data = json.loads((RESULTS / "step-h100.json").read_text())
    rows = [
        [
            r["name"],
            f"{r['ms']:.0f} ({r['p10']:.0f} to {r['p90']:.0f})",
            f"{r['ratio']:.3f}",
            f"{r['gib_over_base']:.2f}",
        ]
        for r in data["rows"]
    ]
    header = ["", "ms a step (p10 to p90)", "times the frozen base", "GiB over the base"]
    return f"{data['what']}; {data['gpu']}.\n\n" + _table(header, rows)


def plan() -> str:
    """Sizes on LLaMA-2-7B, as `corelora plan llama --r 128 --json` has them."""
    data = json.loads((RESULTS / "plan-llama-2-7b.json").read_text())
    rows = []
    for p in data["plans"]:
        small = "" if p["file_bytes_small"] is None else f" ({p['file_bytes_small'] / 1e6:.1f} without outer factors)"
        size, peak = f"{p['file_bytes_native'] / 1e6:.1f}{small}", f"{p['memory']['peak'] / 2**30:.1f}"
        rows.append([METHODS[p["method"]].title, f"{p['trained']:,}", size, peak, str(p["largest_batch"])])
    header = [
        "",
        "trained",
        "file in bfloat16, MB",
        "peak of a step, factors in float32, GiB",
        "largest batch in 24 GiB",
    ]
    what = "LLaMA-2-7B, all seven linear types, r = 128 (NoRA k = 64), bfloat16 base, 4 x 512 tokens, AdamW"
    return f"`corelora plan llama --r 128`: {what}; counted and estimated, not measured.\n\n" + _table(header, rows)


TABLES = {"methods": methods, "early-runs": early_runs, "step": step, "plan": plan}


def filled(text: str) -> str:
    """The text with every table made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table ([a-z-]+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> int:
    """Write the tables, or with --check tell which are stale."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        new = filled(text)
        if new != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                path.write_text(new)
    print(f"stale: {', '.join(stale)}" if stale else "all tables are current")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
