"""Draws the figures of docs/ from the result files: `python docs/make_plots.py`. Needs matplotlib and Altair."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from corelora.bench.floors import all_shapes, floor
from corelora.bench.peers import Ranks
from corelora.compare.charts import scores_chart
from corelora.compare.leaders import Leader
from corelora.registry import METHODS

ROOT = Path(__file__).resolve().parent
FOLDED = {"nlora:folded": "slora"}  # with its start in the weights it multiplies with what SLoRA does
INK, BAR, PEER, MARK = "#222222", "#3b6ea8", "#9a9a9a", "#c8502d"


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the run, its results) of a file of `corelora bench step --json`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[0], [line for line in lines if line["kind"] == "result"]


def draw_step(source: Path, target: Path) -> None:
    """Time over the frozen base of each method at the largest batch, eager, beside what arithmetic allows."""
    run, results = read(source)
    request = run["request"]
    batch = max(r["batch"] for r in results)
    rows = [r for r in results if r["batch"] == batch and not r["compiled"] and r["name"] != "base"]
    rows.sort(key=lambda r: -r["ratio"])
    shapes, ranks = all_shapes(request["model"]), Ranks(r=request["r"], k=request["k"])
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(rows) + 1.5), layout="constrained")
    base = next(r["ms"] for r in results if r["name"] == "base" and r["batch"] == batch and not r["compiled"])
    for y, row in enumerate(rows):
        ours = row["name"].partition(":")[0] in METHODS
        axes.barh(y, row["ratio"] - 1, left=1, color=BAR if ours else PEER, height=0.6)
        axes.plot([row["p10"] / base, row["p90"] / base], [y, y], color=INK, linewidth=1)
        method = FOLDED.get(row["name"]) or (row["name"].partition(":")[0] if ours else "lora")
        lowest = floor(method, shapes, ranks).times_base
        axes.plot([lowest, lowest], [y - 0.38, y + 0.38], color=MARK, linewidth=2)
        axes.text(max(row["ratio"], row["p90"] / base) + 0.004, y, f"{row['ratio']:.3f}", va="center", color=INK)
    axes.set_yticks(range(len(rows)), [textwrap.fill(r["title"], 28) for r in rows])
    axes.set_xlim(1, max(max(r["ratio"], r["p90"] / base) for r in rows) + 0.12)
    axes.set_xlabel("time of a step over the frozen base's\nline: p10 to p90; red: floor by arithmetic")
    axes.set_title(f"{request['model']}, r = {request['r']}, {batch} x {request['length']} tokens, {run['device']}")
    _finish(figure, axes, target)


def draw_batches(source: Path, target: Path, names: Sequence[str]) -> None:
    """Time and memory over batch size, one line for each of some methods and peers (NoRA paper, figure 5)."""
    run, results = read(source)
    eager = [r for r in results if not r["compiled"] and r["name"] in names]
    memory = "gib" if any(r["gib"] is not None for r in eager) else None
    panels = [("ms", "ms a step")] + ([(memory, "peak GiB")] if memory else [])
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for axes, (key, label) in zip(all_axes[0], panels, strict=True):
        for name in dict.fromkeys(r["name"] for r in eager):
            points = [(r["batch"], r[key]) for r in eager if r["name"] == name and r[key] is not None]
            title = next(r["title"] for r in eager if r["name"] == name)
            style = "-" if name.partition(":")[0] in METHODS else "--"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=title)
        axes.set_xlabel(f"batch, sequences of {run['request']['length']} tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    all_axes[0][0].legend(fontsize=8, frameon=False)
    _finish(figure, all_axes[0][0], target)


def _finish(figure: Any, axes: Any, target: Path) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_study(source: Path, target: Path, group: int = 0) -> None:
    """Every seed's score and their mean, for the settings of a study's group: the report's own chart."""
    data = json.loads(source.read_text())["groups"][group]
    found = []
    for leader in data["leaders"]:
        if leader["scores"]:
            seeds = tuple(SimpleNamespace(run=SimpleNamespace(seed=int(seed))) for seed in leader["scores"])
            setting, scores = tuple(leader["setting"].items()), tuple(leader["scores"].values())
            found.append(Leader(setting=setting, tuned=(), runs=seeds, scores=scores, failed=0, missing=0, curve=None))
    chart = scores_chart(found, data["score"], data["lower_is_better"])
    chart.properties(width=620, background="white").save(target, scale_factor=1.5)


def draw_classes(source: Path, target: Path) -> None:
    """Accuracy of each class of a run of pictures, the best on top, with what it is most often taken for."""
    run = json.loads(source.read_text())
    rows = sorted(run["classes"].items(), key=lambda row: row[1]["accuracy"])
    figure, axes = plt.subplots(figsize=(7.5, 0.36 * len(rows) + 1.4), layout="constrained")
    for y, (_, own) in enumerate(rows):
        axes.barh(y, 100 * own["accuracy"], color=BAR, height=0.6)
        wrong = f", else mostly {own['taken_for']}" if own["taken_for"] else ""
        inside = own["accuracy"] > 0.5
        place, colour = (100 / len(rows) + 1.5, "white") if inside else (100 * own["accuracy"] + 1.5, INK)
        axes.text(place, y, f"{100 * own['accuracy']:.0f} %{wrong}", va="center", color=colour, fontsize=9)
    mean = 100 * run["test_accuracy"]
    axes.axvline(mean, color=MARK, linewidth=1.5)
    axes.axvline(100 / len(rows), color=PEER, linewidth=1.5, linestyle="--")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"percent of {rows[0][1]['pictures']} test pictures; red: all classes, {mean:.1f} %; grey: chance")
    axes.set_title(f"EfficientNet-Lite0, method {run['method']}, 16 shots of ten DTD classes, seed {run['seed']}")
    _finish(figure, axes, target)


def draw_decomposition(source: Path, target: Path) -> None:
    """Output error over rank, a panel for each kind of layer: SVD, AwSVD, and the best that any matrix can do."""
    data = json.loads(source.read_text())
    kinds = sorted({layer["layer"].rpartition(".")[2] for layer in data["layers"]})
    ways = {"SVD": (PEER, "-"), "AwSVD, power 0.5": (BAR, "-"), "optimal": (MARK, "--")}
    figure, panels = plt.subplots(2, 4, figsize=(9.5, 4.6), layout="constrained", sharey=True, sharex=True)
    for axes, kind in zip(panels.flat, kinds, strict=False):
        own = [x["errors"] for x in data["layers"] if x["layer"].endswith(kind)]
        for way, (colour, dash) in ways.items():
            means = [sum(e[way][n] for e in own) / len(own) for n in range(len(data["ranks"]))]
            axes.plot(data["ranks"], means, color=colour, linestyle=dash, marker="o", markersize=3, label=way)
        axes.set_title(kind, fontsize=10, color=INK)
        axes.set_xscale("log", base=2)
        axes.set_xticks(data["ranks"], data["ranks"])
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    last = panels.flat[len(kinds)]
    last.axis("off")
    panels[0, -1].tick_params(labelbottom=True)  # nothing is below it
    last.legend(*panels.flat[0].get_legend_handles_labels(), loc="center left", frameon=False)
    figure.supxlabel("rank", color=INK, fontsize=10)
    figure.supylabel("error of a layer's outputs, relative", color=INK, fontsize=10)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> int:
    """Draw what there are results for."""
    for source in sorted((ROOT / "results").glob("study-*.json")):
        draw_study(source, ROOT / "img" / f"{source.stem}.png")
    draw_step(ROOT / "results" / "step-h200.jsonl", ROOT / "img" / "step-h200.png")
    draw_decomposition(ROOT / "results" / "decomposition-smollm2.json", ROOT / "img" / "decomposition.png")
    draw_classes(ROOT / "results" / "vision-head-cpu.json", ROOT / "img" / "vision-classes.png")
    names = ("base", "peft_lora", "peft_dora", "liger", "inttune", "nora", "slora", "nlora")
    draw_batches(ROOT / "results" / "step-h200.jsonl", ROOT / "img" / "batches-h200.png", names)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
