"""A study's report: one HTML page with live charts that needs no network, its tables in Markdown, its runs as data."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert
from tqdm.auto import tqdm

from corelora.compare.charts import group_charts
from corelora.compare.folder import StudyFolder
from corelora.compare.known import keep_runs
from corelora.compare.leaders import Leader
from corelora.compare.standing import Standing
from corelora.compare.study import Group
from corelora.compare.tables import (
    Led,
    answer_rows,
    csv_text,
    failures,
    leader_rows,
    led_groups,
    markdown,
    runs_of,
    summary,
)
from corelora.train.folder import write_text

HERE = Path(__file__).parent
WORDS = 48  # characters of a cell, from which its column is of sentences


def report_study(folder: StudyFolder) -> list[Path]:
    """Write report.html, report.md, runs.csv and runs.jsonl into a study's folder.

    Args:
        folder: of the study; runs that are missing or have failed are shown as such.

    Returns:
        Their paths.
    """
    paths = [folder.root / name for name in ("report.html", "report.md", "runs.csv")]
    texts = [page_html(folder), markdown(folder), csv_text(folder)]
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    return [*paths, keep_runs(folder)]


def page_html(folder: StudyFolder) -> str:
    """The whole page."""
    charts: list[dict[str, Any]] = []
    led = list(led_groups(folder))
    bar = tqdm(led, desc="report", unit="group", delay=2, leave=False)
    sections = [_group(folder, *one, charts) for one in bar]
    everything = runs_of(led)
    body = [
        f"<h1>{_text(folder.root.name)}</h1><p>{_text(folder.study.about)}</p>",
        f"<p>{_text(summary(everything))}</p>",
        _questions(folder, led),
        "<nav>" + "".join(f'<a href="#{_anchor(g)}">{_text(g.name)}</a>' for g in folder.study.groups) + "</nav>",
        *sections,
        _failed(everything),
        _versions(folder, everything),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    data = json.dumps(charts).replace("</", "<\\/")
    style = (HERE / "page.css").read_text(encoding="utf-8")
    title = _text(folder.root.name)
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>{title}</title><style>{style}</style></head>'
        f'<body>{"".join(body)}<script id="charts" type="application/json">{data}</script>'
        f'<script type="module">{_script()}</script></body></html>\n'
    )


@cache
def _script() -> str:
    """What draws the charts, with all that it needs; bundling takes a second."""
    own = (HERE / "page.js").read_text(encoding="utf-8")
    return vl_convert.javascript_bundle(snippet=own).replace("</script", "<\\/script")


def _group(
    folder: StudyFolder,
    group: Group,
    runs: Sequence[Standing],
    found: Sequence[Leader],
    charts: list[dict[str, Any]],
) -> str:
    score, lower = folder.study.score_of(group)
    parts = [f'<h2 id="{_anchor(group)}">{_text(group.name)}</h2><p>{_text(group.about)}</p>']
    parts.append(_table(*leader_rows(folder, group, found)))
    for title, chart in group_charts(group, runs, score, lower).items():
        parts.append(f'<h3>{_text(title)}</h3><div class="chart" data-chart="{len(charts)}"></div>')
        charts.append(chart.to_dict())
    return "".join(parts)


def _questions(folder: StudyFolder, led: Sequence[Led]) -> str:
    return f"<h2>Questions</h2>{_table(*answer_rows(folder, led))}" if folder.study.questions else ""


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Columns of sentences are read, not compared: they break into lines.
    longest = [max((len(row[at]) for row in rows), default=0) for at in range(len(headers))]
    kinds = [' class="words"' if length > WORDS else "" for length in longest]
    head = "".join(f"<th{kind}>{_text(h)}</th>" for h, kind in zip(headers, kinds, strict=True))
    cells = ("".join(f"<td{kind}>{_text(c)}</td>" for c, kind in zip(row, kinds, strict=True)) for row in rows)
    body = "".join(f"<tr>{own}</tr>" for own in cells)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _failed(runs: Sequence[Standing]) -> str:
    shown = "".join(
        f'<details><summary class="bad">{_text(setting)}: {_text(error.splitlines()[0])}</summary>'
        f"<p class=small>{_text(name)}</p><pre>{_text(error)}</pre></details>"
        for setting, name, error in failures(runs)
    )
    return f"<h2>Failed runs</h2>{shown}" if shown else ""


def _versions(folder: StudyFolder, runs: Sequence[Standing]) -> str:
    made = [s.results["versions"] for s in runs if s.results and "versions" in s.results]
    different = {json.dumps(v, sort_keys=True): v for v in made}
    shown = "".join(f"<pre>{_text(json.dumps(v, indent=1))}</pre>" for v in different.values())
    names = "".join(f"<li><code>{_text(s.run.name)}</code>, {s.state}</li>" for s in runs)
    return (
        f"<h2>How it was made</h2><pre>{_text(folder.command)}</pre>"
        f"<details><summary>versions</summary>{shown}</details>"
        f"<details><summary>{len(runs)} runs; recipe.yaml in its folder is the recipe of each</summary>"
        f"<ul>{names}</ul></details>"
    )


def _anchor(group: Group) -> str:
    return "".join(c if c.isalnum() else "-" for c in group.name.lower())


def _text(value: Any) -> str:
    return html.escape(str(value))
