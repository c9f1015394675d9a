"""Charts of a study, declared with Altair: the live ones of the report, and pictures for the documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from corelora.compare.leaders import RATES, Leader, leaders
from corelora.compare.standing import Standing
from corelora.compare.study import Group
from corelora.plan_memory import GIB

HEIGHT = 260  # pixels; the width is the page's
ROW = 22  # pixels a bar
CURVES = 14  # settings whose loss curves are drawn, the best ones
SHOWN_POINTS = 150  # of a curve
# Tableau's twenty, the strong ten first.
COLOURS = [
    *("#4c78a8", "#f58518", "#54a24b", "#e45756", "#79706e", "#b279a2", "#439894", "#b79a20", "#9d755d", "#d67195"),
    *("#9ecae9", "#ffbf79", "#88d27a", "#ff9d98", "#bab0ac", "#d6a5c9", "#83bcb6", "#f2cf5b", "#d8b5a5", "#fcbfd2"),
]
COSTS = {
    "trained_parameters": "trained parameters",
    "peak_memory": "peak memory, GiB",
    "seconds": "seconds",
}


def group_charts(group: Group, runs: Sequence[Standing], score: str, lower: bool) -> dict[str, Any]:
    """Title -> chart for everything that a group's figures can show.

    Args:
        group: of the study.
        runs: of that group, all seeds.
        score: the deciding figure.
        lower: whether lower is better.
    """
    found = [x for x in leaders(group, runs, score, lower) if x.scores]
    if not found:
        return {}
    charts = {f"{score} of each setting at its best": scores_chart(found, score, lower)}
    for axis in _numeric_axes(group):
        tuned = axis in group.tune
        title = f"{score} over {'learning rate' if axis in RATES else axis.replace('_', ' ')}"
        shown = [r for r in runs if not r.run.is_final] if tuned else _of(found)
        charts[title] = axis_chart(group, shown, axis, score, [x.name for x in found])
    for figure, title in COSTS.items():
        if len({x.average(figure) for x in found} - {None}) > 1:
            charts[f"{score} against {title}"] = cost_chart(found, figure, score, lower)
    if any(x.runs[0].curve for x in found):
        which = f" of the best {CURVES}" if len(found) > CURVES else ""
        charts[f"training loss{which}"] = curves_chart(found)
    if any(r.updates for r in _of(found)):
        charts["spectra of what was learned"] = spectra_chart(found)
        charts["size of what was learned, by layer"] = norms_chart(found)
    return charts


def scores_chart(found: Sequence[Leader], score: str, lower: bool) -> Any:
    """A row for each setting: its seeds as dots, their mean with one standard deviation."""
    rows: list[dict[str, Any]] = [
        {"setting": x.name, "score": value, "seed": r.run.seed}
        for x in found
        for r, value in zip(x.runs, x.scores, strict=True)
    ]
    means = [
        {"setting": x.name, "score": x.mean, "low": x.mean - (x.deviation or 0), "high": x.mean + (x.deviation or 0)}
        for x in found
    ]
    names = [x.name for x in found]
    place = alt.Y("setting:N", sort=names, title=None, axis=alt.Axis(labelLimit=260))
    scale = alt.Scale(zero=False, padding=12)
    dots = alt.Chart(pd.DataFrame(rows)).mark_circle(size=40, opacity=0.6)
    shown = alt.Tooltip("score:Q", title=score)
    dots = dots.encode(x=alt.X("score:Q", scale=scale), y=place, tooltip=["setting", shown, "seed"])
    spread = alt.Chart(pd.DataFrame(means)).mark_rule(strokeWidth=2)
    spread = spread.encode(
        x=alt.X("low:Q", title=f"{score} ({'lower' if lower else 'higher'} is better)"), x2="high:Q", y=place
    )
    ticks = alt.Chart(pd.DataFrame(means)).mark_tick(thickness=3, size=16)
    ticks = ticks.encode(x="score:Q", y=place, tooltip=["setting", shown])
    return (spread + dots + ticks).properties(height=ROW * max(3, len(names)), width="container")


def axis_chart(group: Group, runs: Sequence[Standing], axis: str, score: str, names: Sequence[str]) -> Any:
    """The score over an axis of numbers, a line for each of the other compared settings; every seed is a dot."""
    others = [a for a in group.axes if a not in (axis, *group.tune)]
    rows: list[dict[str, Any]] = [
        {"place": float(r.run.labels[axis]), "setting": _words(r, others), "score": value, "seed": r.run.seed}
        for r in runs
        if (value := r.figure(score)) is not None and math.isfinite(value)
    ]
    lines = {row["setting"] for row in rows}  # settings themselves, where the axis is tuned
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("place:Q", title=axis, scale=alt.Scale(type="log", nice=False, padding=10), axis=alt.Axis(format="~g")),
        color=_colour(names if lines <= set(names) else sorted(lines)),
    )
    dots = base.mark_circle(size=45).encode(
        y=alt.Y("score:Q", scale=_robust(rows, "score")),
        tooltip=["setting", alt.Tooltip("place:Q", title=axis), alt.Tooltip("score:Q", title=score), "seed"],
    )
    line = base.mark_line(clip=True).encode(y=alt.Y("mean(score):Q", scale=_robust(rows, "score"), title=score))
    return (line + dots).properties(height=HEIGHT, width="container")


def cost_chart(found: Sequence[Leader], figure: str, score: str, lower: bool) -> Any:
    """Score against a cost; the line joins the settings that no other one beats in both."""
    unit = GIB if figure == "peak_memory" else 1
    rows: list[dict[str, Any]] = [
        {"setting": x.name, "cost": cost / unit, "score": x.mean}
        for x in found
        if (cost := x.average(figure)) is not None
    ]
    best = pareto([(r["cost"], r["score"]) for r in rows], lower)
    for row, is_best in zip(rows, best, strict=True):
        row["front"] = is_best
    frame = pd.DataFrame(rows)
    marks = alt.Axis(format="~g" if figure == "peak_memory" else "~s")
    x = alt.X("cost:Q", title=COSTS[figure], scale=alt.Scale(type="log", nice=False, padding=20), axis=marks)
    y = alt.Y("score:Q", title=score, scale=_robust(rows, "score"))
    front = (
        alt.Chart(frame[frame.front]).mark_line(interpolate="step-after", strokeDash=[4, 3], clip=True).encode(x=x, y=y)
    )
    dots = alt.Chart(frame).mark_circle(size=70, clip=True)
    shown = ["setting", alt.Tooltip("cost:Q", title=COSTS[figure]), alt.Tooltip("score:Q", title=score)]
    dots = dots.encode(x=x, y=y, color=_colour([x.name for x in found]), tooltip=shown)
    return (front + dots).properties(height=HEIGHT, width="container")


def curves_chart(found: Sequence[Leader]) -> Any:
    """Training loss over steps, the first seed of each of the best settings."""
    rows: list[dict[str, Any]] = [
        {"setting": x.name, "step": step, "loss": loss}
        for x in found[:CURVES]
        for step, loss in _thinned([point for point in x.runs[0].curve if math.isfinite(point[1])])
    ]
    chart = alt.Chart(pd.DataFrame(rows)).mark_line(clip=True, strokeWidth=1.5)
    chart = chart.encode(
        x=alt.X("step:Q"),
        y=alt.Y("loss:Q", scale=_robust(rows, "loss")),
        color=_colour([x.name for x in found[:CURVES]]),
        tooltip=["setting", "step", "loss:Q"],
    )
    return chart.properties(height=HEIGHT, width="container")


def spectra_chart(found: Sequence[Leader]) -> Any:
    """Singular values of the updates, the mean over layers, each as a part of its layer's largest."""
    rows = []
    for leader in found:
        layers = next((r.updates for r in leader.runs if r.updates), [])
        for n in range(max((len(u["values"]) for u in layers), default=0)):
            parts = [u["values"][n] / u["values"][0] for u in layers if n < len(u["values"])]
            rows.append({"setting": leader.name, "n": n + 1, "part of the largest": sum(parts) / len(parts)})
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(clip=True)
        .encode(
            x=alt.X("n:Q", title="singular value"),
            y=alt.Y("part of the largest:Q", scale=alt.Scale(type="log", domain=[1e-4, 1], clamp=True)),
            color=_colour([x.name for x in found]),
            tooltip=["setting", "n", "part of the largest:Q"],
        )
    )
    return chart.properties(height=HEIGHT, width="container")


def norms_chart(found: Sequence[Leader]) -> Any:
    """Relative Frobenius norm of the updates, by kind of layer."""
    rows: list[dict[str, Any]] = [
        {"setting": x.name, "layer": u["layer"].rpartition(".")[2], "relative norm": u["relative"]}
        for x in found
        for u in next((r.updates for r in x.runs if r.updates), [])
    ]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:N", title=None),
            y=alt.Y("mean(relative norm):Q", scale=alt.Scale(type="log"), title="norm, as a part of the weight's"),
            color=_colour([x.name for x in found]),
            tooltip=["setting", "layer", "mean(relative norm):Q"],
        )
    )
    return chart.properties(height=HEIGHT, width="container")


def pareto(points: Sequence[tuple[float, float]], lower: bool) -> list[bool]:
    """Which points no other one beats: none is at least as good in both and better in one.

    Args:
        points: (cost, score).
        lower: whether a lower score is better.
    """
    signed = [(cost, score if lower else -score) for cost, score in points]
    return [not any(c <= cost and s <= score and (c, s) != (cost, score) for c, s in signed) for cost, score in signed]


def _numeric_axes(group: Group) -> list[str]:
    """Axes that are lists of two or more numbers."""
    return [
        a
        for a, values in group.axes.items()
        if isinstance(values, list) and len(values) > 1 and all(map(_is_number, values))
    ]


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and float(value) > 0
    except (TypeError, ValueError):
        return False


def _of(found: Sequence[Leader]) -> list[Standing]:
    return [run for leader in found for run in leader.runs]


def _words(run: Standing, axes: Sequence[str]) -> str:
    return ", ".join(run.run.labels[a] if a == "method" else f"{a} {run.run.labels[a]}" for a in axes) or "all"


def _robust(rows: Sequence[dict[str, Any]], name: str) -> Any:
    """A scale that one diverged run does not flatten all others with: up to three times the middle half's width."""
    values = pd.Series([r[name] for r in rows]).dropna()
    low, high = values.quantile(0.25), values.quantile(0.75)
    reach = 3 * max(high - low, 0.02 * abs(values.median()), 1e-9)
    bottom, top = max(values.min(), low - reach), min(values.max(), high + reach)
    edge = 0.05 * (top - bottom) or reach / 3
    return alt.Scale(zero=False, clamp=True, domain=[bottom - edge, top + edge])


def _colour(names: Sequence[str]) -> Any:
    """One colour a setting, the same in every chart of a group, in the table's order; strong ones before pale."""
    colours = [COLOURS[n % len(COLOURS)] for n in range(len(names))]
    return alt.Color("setting:N", title=None, scale=alt.Scale(domain=list(names), range=colours))


def _thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points, so that many curves stay a small page."""
    width = max(1, -(-len(curve) // SHOWN_POINTS))
    parts = [curve[n : n + width] for n in range(0, len(curve), width)]
    return [(sum(s for s, _ in p) / len(p), sum(v for _, v in p) / len(p)) for p in parts]
