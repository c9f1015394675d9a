"""Writes tables and figures of README.md and docs/ from result files and the registry: `python docs/make_tables.py`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`, a figure in a sentence between
`<!-- figure NAME FORMAT -->` and `<!-- /figure -->` (figures.py). With `--check` nothing is written; the exit code says
whether all are current.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
from default_tables import defaults
from key_tables import keys, recipe_parts, table
from step_tables import batches, branches, compiled_runs, fsdp2, host, profile, reuse, step_again, step_together
from study_tables import dtd, known_answers, known_runs, minilm, rates, study, tuned

import corelora
from corelora.bench.floors import all_shapes, floor
from corelora.bench.peers import Ranks
from corelora.bench.tables import Table, layers_tables, serve_tables, start_tables, step_tables
from corelora.compare.study import Finalists, Group, Published, Question, Study
from corelora.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent


def methods() -> str:
    """The registry."""
    rows = []
    for name in corelora.list_methods():
        m, c = METHODS[name], METHODS[name].default
        rows.append([f"`{name}`", m.title, c.outer, c.core, " ".join(c.train), c.start.replace("_", " "), m.paper])
    return table(["method", "", "outer", "core", "trains", "start", "source"], rows)


def _lines(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the run, its results) of a file that `corelora bench ... --json` wrote."""
    lines = figures.lines(name)
    return lines[0], [line for line in lines[1:] if line["kind"] in ("result", "decomposition")]


def _benched(tables: list[Table]) -> str:
    """Titles and tables; a column in which nothing was measured is left out."""
    parts = []
    for title, header, rows in tables:
        kept = [n for n in range(len(header)) if n == 0 or any(row[n] != "-" for row in rows)]
        parts.append(f"{title}.\n\n" + table([header[n] for n in kept], [[row[n] for n in kept] for row in rows]))
    return "\n\n".join(parts)


def bench(kind: str, name: str, largest: bool = False) -> Callable[[], str]:
    """A table of what `corelora bench KIND --json docs/results/NAME` measured; of the largest batch alone, if asked."""
    make = {"step": step_tables, "init": start_tables, "serve": serve_tables, "layers": layers_tables}[kind]

    def made() -> str:
        run, results = _lines(name)
        if largest:
            most = max(r["batch"] for r in results)
            results = [r for r in results if r["batch"] == most]
        return _benched(make(results, run))

    return made


def floors() -> str:
    """What arithmetic allows on LLaMA-2-7B, and what each method keeps for the backward pass."""
    shapes, ranks = all_shapes("llama-2-7b"), Ranks(r=128, k=32)
    rows = []
    for name in corelora.list_methods():
        at_best = floor(name, shapes, ranks)
        saved = f"{'x, ' if at_best.saves_input else ''}{at_best.saved // ranks.r} T r numbers".replace(" 1 T", " T")
        rows.append([METHODS[name].title, f"{at_best.times_base:.3f}", saved])
    return table(["", "times the frozen base, at best", "kept for the backward pass"], rows)


def plan() -> str:
    """Sizes on LLaMA-2-7B, as `corelora plan llama --r 128 --json` has them."""
    data = figures.read("plan-llama-2-7b.json")
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
    return f"`corelora plan llama --r 128`: {what}; counted and estimated, not measured.\n\n" + table(header, rows)


def clip() -> str:
    """Few-shot steps on a CLIP of ViT-B/16 size, from the runs' own metrics."""
    data = figures.read("clip-b16-h100.json")
    rows = []
    for run in data["runs"]:
        times = sorted(run["seconds a step"])
        spread = f"{times[0]:.3f} to {times[-1]:.3f}"
        memory = f"{run['peak_memory'] / 2**30:.2f}"
        rows.append([run["method"], f"{run['trained']:,}", f"{statistics.median(times):.3f}", spread, memory])
    header = ["method", "trained", "seconds a step", "from to", "peak GiB"]
    return f"{data['what']}; {data['versions']['device']}.\n\n" + table(header, rows)


def vision_cpu() -> str:
    """Short runs on pictures, noted down when they were made; what came out of those whose results are kept."""
    rows = []
    for run in figures.read("vision-cpu.json")["runs"]:
        out = "-"
        if run["results"]:
            own = figures.read(run["results"])
            run |= {"trained": own["trained_parameters"], "seconds": own["seconds"]}
            run["peak_gib"] = own["peak_memory"] / 2**30
            pictures, chance = sum(c["pictures"] for c in own["classes"].values()), 100 / len(own["classes"])
            out = f"{100 * own['test_accuracy']:.1f} % of {pictures} test pictures (chance: {chance:.0f} %)"
        step = f"{run['step_seconds']:.1f}, {run['pictures']} pictures"
        command = " ".join(filter(None, [f"`{run['command']}`", run["also"]]))
        rows.append([command, f"{run['trained']:,}", f"{run['seconds']:.0f}", step, f"{run['peak_gib']:.1f}", out])
    header = ["command", "trained", "seconds", "seconds a step", "peak of the process, GiB", "what came out"]
    return table(header, rows)


def sdxl() -> str:
    """Steps of an SDXL-size UNet, as `benchmarks/sdxl.py` printed them."""
    run, *results = figures.lines("sdxl-h100.jsonl")
    rows = []
    for r in results:
        spread = f"{r['spread'][0]:.2f} to {r['spread'][1]:.2f}"
        start, peak = f"{r['start_seconds']:.1f}", f"{r['peak_gib']:.2f}"
        rows.append([r["method"], f"{r['trained']:,}", f"{r['seconds']:.2f}", spread, start, peak])
    header = ["method", "trained", "seconds a step, median", "from to", "seconds to begin", "peak GiB"]
    what = f"an SDXL-size UNet, {run['side']} x {run['side']} pixels, batch 1, {run['dtype']}, recomputed activations"
    return f"{what}, {results[0]['steps']} steps each in turn; {run['device']}.\n\n" + table(header, rows)


def graphs() -> str:
    """Runs with and without CUDA graphs, as `benchmarks/graphs.py` printed them."""
    lines = figures.lines("graphs-h200.jsonl")
    times = {graphs: [r["step_seconds"] for r in lines if r["graphs"] == graphs] for graphs in ("off", "auto")}
    rows = []
    for graphs, own in times.items():
        memory = statistics.median(r["peak_memory"] for r in lines if r["graphs"] == graphs) / 2**30
        gain = statistics.median(times["off"]) / statistics.median(own)
        rows.append([f"`loop.graphs: {graphs}`", f"{statistics.median(own):.3f}", f"{gain:.1f}", f"{memory:.1f}"])
    header = ["", "seconds a step, median", "times as fast", "peak GiB"]
    what = f"{lines[0]['device']}, torch {lines[0]['torch']}, {len(times['off'])} run of each kind"
    return f"{what}.\n\n" + table(header, rows)


def blocks() -> str:
    """An adapter's second product whole and in blocks, as `benchmarks/blocks.py` printed it."""
    rows = []
    for r in figures.lines("blocks-h200.jsonl"):
        if r["q"] == 128 and not r["trans"]:
            best = [min(v for k, v in r.items() if k.startswith(kind)) for kind in ("rows", "cols")]
            ratios = [f"{value / r['base']:.3f}" for value in (r["whole"], r["after"], *best)]
            rows.append([f"{r['o']} x {r['i']}", f"{r['base']:.0f}", *ratios])
    return table(["W", "x W^T, µs", "F L first, whole", "F L after", "best in rows", "best in columns"], rows)


def gsm8k_time() -> str:
    """How long an evaluation took, and what came out."""
    data = figures.read("gsm8k-smollm2-base-h100.json")
    score = next(iter(data["scores"].values()))
    value = f"{100 * score['value']:.2f} ± {100 * score['stderr']:.2f} %"
    row = [data["protocol"], data["dtype"], str(data["settings"]["batch_size"]), f"{data['seconds']:.1f}", value]
    return table(["protocol", "type", "batch", "seconds, loading included", "right"], [row])


def agreement() -> str:
    """Our verdicts beside the harness's, as `benchmarks/harness_agreement.py` wrote them."""
    data = figures.read("gsm8k-agreement.json")
    rows = []
    for name, pair in data["agreement"].items():
        ours, _, theirs = name.partition(" and ")
        rows.append([f"`{ours}`", f"`{theirs}`", f"{100 * pair['agreement']:.2f} % of {pair['n']:,}"])
    return table(["our reader", "the harness's filter", "same verdict"], rows)


def batched() -> str:
    """Replies in batches and one by one, as `benchmarks/batched_replies.py` wrote them."""
    data = figures.read("batched-replies.json")
    rows = []
    for kind in data["types"]:
        gaps = sorted(kind["gaps where not"])
        shown = f"{statistics.median(gaps):.3f}, at most {gaps[-1]:.3f}" if gaps else "-"
        rows.append([kind["dtype"], f"{kind['equal']} of {kind['replies']}", shown])
    return table(["type", "same text", "gap of the two highest logits where they part, median"], rows)


def decomposition() -> str:
    """Output errors of rank-r decompositions by kind of layer, as `benchmarks/decomposition.py` wrote them."""
    data = figures.read("decomposition-smollm2.json")
    kinds = sorted({layer["layer"].rpartition(".")[2] for layer in data["layers"]})
    rows = []
    for kind in [*kinds, ""]:
        own = [x["errors"] for x in data["layers"] if x["layer"].endswith(kind)]
        row = [kind or f"all {len(own)} layers"]
        for n in range(len(data["ranks"])):
            svd, awsvd = (statistics.mean(e[way][n] for e in own) for way in ("SVD", "AwSVD, power 0.5"))
            less = statistics.mean(1 - e["AwSVD, power 0.5"][n] / e["SVD"][n] for e in own)
            row.append(f"{svd:.3f} → {awsvd:.3f} (-{100 * less:.0f} %)")
        rows.append(row)
    return table(["SVD → AwSVD", *(f"r = {r}" for r in data["ranks"])], rows)


TABLES = {
    "decomposition": decomposition,
    "clip-b16": clip,
    "vision-cpu": vision_cpu,
    "sdxl": sdxl,
    "gsm8k-time": gsm8k_time,
    "gsm8k-agreement": agreement,
    "batched-replies": batched,
    "recipe-keys": recipe_parts,
    "study-keys": keys(Study),
    "group-keys": keys(Group),
    "finalists-keys": keys(Finalists),
    "question-keys": keys(Question),
    "published-keys": keys(Published),
    "study-tiny": study("study-tiny.json"),
    "methods": methods,
    "tuned": tuned,
    "plan": plan,
    "floors": floors,
    "step": bench("step", "step-h200.jsonl", largest=True),
    "step-nlora": bench("step", "step-h200-nlora.jsonl"),
    "batches": batches,
    "step-h100": bench("step", "step-h100.jsonl"),
    "step-h100-again": step_again,
    "step-together": step_together,
    "compiled-h200": bench("step", "compiled-h200.jsonl"),
    "compiled-runs": compiled_runs,
    "branches": branches,
    "reuse": reuse,
    "profile-compiled": profile("profile-compiled-h200.json"),
    "profile-graphs": profile("profile-graphs-h200.json"),
    "host": host,
    "fsdp2": fsdp2,
    "dtd": dtd,
    "init-h200": bench("init", "init-h200.jsonl"),
    "init-h200-unit": bench("init", "init-h200-unit.jsonl"),
    "init-h200-inttune": bench("init", "init-h200-inttune.jsonl"),
    "serve-h200": bench("serve", "serve-h200.jsonl"),
    "minilm": minilm,
    "gsm8k-rates": rates(["LoRA", "NLoRA"]),
    "known-answers": known_answers("smollm2-gsm8k/methods"),
    "known-methods": known_runs("smollm2-gsm8k/methods"),
    "known-nlora": known_runs("smollm2-gsm8k/nlora"),
    "known-inttune": known_runs("smollm2-gsm8k/inttune"),
    "known-nora": known_runs("smollm2-gsm8k/nora"),
    "known-ranks": known_runs("smollm2-gsm8k/ranks"),
    "known-word-problems": known_runs("smollm2-tasks/word-problems"),
    "known-arc-easy": known_runs("smollm2-tasks/arc-easy"),
    "known-boolq": known_runs("smollm2-tasks/boolq"),
    "known-obqa": known_runs("smollm2-tasks/obqa"),
    "published-smollm2": known_runs("published-rates/smollm2"),
    "published-minilm": known_runs("published-rates/minilm"),
    "defaults": defaults,
    "graphs": graphs,
    "blocks": blocks,
    "energy": bench("init", "energy-smollm2.jsonl"),
    "layers-cpu": bench("layers", "layers-cpu.jsonl"),
    "step-cpu": bench("step", "step-cpu.jsonl"),
}


def filled(text: str) -> str:
    """The text with every table and every figure made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return figures.fill(re.sub(r"<!-- table ([a-z0-9-]+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL))


def main() -> int:
    """Write tables and figures, or with --check tell which documents are stale."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        new = filled(text)
        if new != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                path.write_text(new)
    print(f"stale: {', '.join(stale)}" if stale else "all tables and figures are current")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
