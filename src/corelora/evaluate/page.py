"""One readable page of a run: its scores, its samples, its loss curve. Self-contained HTML, no network, no script.

Folding is the browser's own (`details`), colours follow its light or dark mode, and the layout fits a phone.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corelora.errors import CoreLoraError

SHOWN = 200  # samples of a suite on the page; the JSON file has all

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2a7d2e; --bad: #b3261e; --ink: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --good: #7bd88f; --bad: #ff8a80; --ink: #7db4f0; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto } table { border-collapse: collapse } td, th { padding: .3rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid var(--line) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6rem; border-radius: .3rem }
details { border-bottom: 1px solid var(--line); padding: .3rem 0 } summary { cursor: pointer }
.right { color: var(--good) } .wrong { color: var(--bad) } .small { opacity: .75; font-size: .9rem }
svg { width: 100%; height: auto } svg text { fill: currentColor; font-size: 12px }
"""


def report(folder: Path) -> Path:
    """Write report.html into a run's folder.

    Args:
        folder: a run, or whatever `corelora evaluate` wrote its `eval/` into.

    Returns:
        The page's path.

    Raises:
        CoreLoraError: there is nothing to report, or a result file is broken.
    """
    suites = [_read(path) for path in sorted((folder / "eval").glob("*.json"))]
    metrics = _metrics(folder / "metrics.jsonl")
    if not suites and not metrics:
        raise CoreLoraError(f"{folder}: neither eval/*.json nor metrics.jsonl is there: train or evaluate first")
    page = folder / "report.html"
    page.write_text(_page(folder, suites, metrics), encoding="utf-8")
    return page


def _page(folder: Path, suites: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> str:
    parts = [f"<h1>{_text(folder.name)}</h1>"]
    results = folder / "results.json"
    if results.is_file():
        figures = _read(results)
        parts += [_training(figures), _classes(figures.get("classes") or {})]
        parts += [_sheet(folder / figures["contact_sheet"])] if figures.get("contact_sheet") else []
    parts += ["<h2>Training</h2>", _curve(metrics)] if metrics else []
    parts += ["<h2>Scores</h2>", _scores(suites)] if suites else []
    parts += [_suite(suite) for suite in suites]
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{_text(folder.name)}</title>"
    return (
        f'<!doctype html><html lang="en"><head>{head}{title}<style>{STYLE}</style></head><body>{body}</body></html>\n'
    )


def _training(results: Mapping[str, Any]) -> str:
    """The run in a line."""
    facts = [str(results.get("method", "")), f"{results.get('trained_parameters', 0):,} trained parameters"]
    facts += [f"{key.replace('_', ' ')} {value:.4f}" for key, value in results.items() if _is_figure(key, value)]
    facts.append(f"{results.get('seconds', 0):,.0f} s")
    return f"<p>{_text(' · '.join(f for f in facts if f))}</p>"


def _is_figure(key: str, value: Any) -> bool:
    return key.startswith(("test_", "zero_shot_")) and isinstance(value, float)


def _classes(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy of each class of pictures, as a run of pictures has them."""
    if not classes:
        return ""
    rows = []
    for name, own in classes.items():
        accuracy = "" if own["accuracy"] is None else f"{100 * own['accuracy']:.1f}"
        cells = [name, f"{own['pictures']:,}", accuracy, own["taken_for"] or ""]
        rows.append("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in cells) + "</tr>")
    head = "<tr><th>class</th><th>test pictures</th><th>percent right</th><th>most often taken for</th></tr>"
    return f'<h2>Classes</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _sheet(file: Path) -> str:
    """A contact sheet inside the page."""
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<h2>Pictures</h2><div class="wide"><img alt="contact sheet" src="data:image/png;base64,{data}"></div>'


def _scores(suites: Sequence[dict[str, Any]]) -> str:
    rows = []
    for suite in suites:
        for name, score in suite["scores"].items():
            cells = [f"{suite['suite']} {suite['version']}", suite["protocol"], name]
            cells += [f"{100 * score['value']:.2f} ± {100 * score['stderr']:.2f}", f"{score['n']:,}"]
            rows.append("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in cells) + "</tr>")
    head = "<tr><th>suite</th><th>protocol</th><th>score</th><th>percent</th><th>samples</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _suite(suite: Mapping[str, Any]) -> str:
    samples = suite["samples"]
    facts = [f"model {suite['model']}", f"adapter {suite['adapter']}" if suite.get("adapter") else "no adapter"]
    facts += [str(suite["dtype"]), str(suite["device"]), f"batch size {suite['settings']['batch_size']}"]
    facts += [f"written by {suite['backend']}"] if suite.get("backend") else []
    facts += [f"{suite['seconds']:.0f} s", *(suite.get("notes") or [])]
    if suite.get("skipped"):
        facts.append("skipped: " + ", ".join(suite["skipped"]))
    if suite["dtype"] != "float32":
        facts.append("in this type a score can depend on the batch size: near ties round otherwise")
    more = "" if len(samples) <= SHOWN else f'<p class="small">{len(samples) - SHOWN:,} more are in the JSON file.</p>'
    shown = "\n".join(_sample(s) for s in samples[:SHOWN])
    title = f"<h2>{_text(suite['suite'])}, protocol {_text(suite['protocol'])}</h2>"
    return f'{title}<p class="small">{_text(" · ".join(facts))}</p>{shown}{more}'


def _sample(sample: Mapping[str, Any]) -> str:
    right = sample.get("right")
    mark = '<span class="right">right</span>' if right else '<span class="wrong">wrong</span>'
    read = sample.get("read")
    parts = [("prompt", sample.get("prompt")), ("output", sample.get("output")), ("read as", read)]
    parts += [("expected", sample.get("gold")), ("why", sample.get("why"))]
    shown = "".join(
        f'<div class="small">{label}</div><pre>{_text(value)}</pre>'
        for label, value in parts
        if value not in (None, "")
    )
    short = _text(str(read).replace("\n", " ")[:60])
    return f"<details><summary>{_text(sample['id'])} {mark} {short}</summary>{shown}</details>"


def _curve(rows: Sequence[Mapping[str, Any]]) -> str:
    """Training and test loss over steps as SVG."""
    train = [(r["step"], r["loss"]) for r in rows if isinstance(r.get("loss"), (int, float))]
    test = [(r["step"], r["test_loss"]) for r in rows if isinstance(r.get("test_loss"), (int, float))]
    points = train + test
    if not points:
        return "<p>No loss was logged.</p>"
    steps, losses = [p[0] for p in points], [p[1] for p in points]
    low, high, last = min(losses), max(losses), max(max(steps), 1)
    span = (high - low) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return 50 + 640 * point[0] / last, 20 + 200 * (high - point[1]) / span

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, train))
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--bad)"/>' for x, y in map(place, test))
    labels = [(45, 24, "end", f"{high:.3f}"), (45, 224, "end", f"{low:.3f}"), (50, 242, "start", "0")]
    labels += [(690, 242, "end", f"step {last:,}"), (370, 242, "middle", "loss: line training, dots test")]
    texts = "".join(f'<text x="{x}" y="{y}" text-anchor="{a}">{t}</text>' for x, y, a, t in labels)
    axes = '<path d="M50 20V220H690" fill="none" stroke="currentColor" opacity=".5"/>'
    path = f'<polyline points="{line}" fill="none" stroke="var(--ink)" stroke-width="2"/>'
    return f'<svg viewBox="0 0 700 250" role="img" aria-label="loss over steps">{axes}{path}{marks}{texts}</svg>'


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CoreLoraError(f"{path}: not a result file ({error})") from None


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return html.escape(text)
