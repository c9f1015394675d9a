"""Tables of training steps: what more than one file, or another program than `corelora bench`, has measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import figures
from key_tables import table

from corelora.bench.peers import find_peer
from corelora.registry import METHODS

BOTH = ("apart", "together")
# Files of compiled runs, oldest first, and what a run has that those before had not.
COMPILED = {
    "-first": "",
    "-again": "",
    "-joined": "",
    "-branches": "branches",
    "-balanced": "each round in another order",
    "-second": "the same",
    "-third": "the same",
    "-fourth": "elementwise kernels untimed",
    "-fifth": "the same",
    "": "the same",
}
COMPILED_NAMES = ("slora", "nlora:folded", "nora", "inttune")


def step_again() -> str:
    """A second process on an H100, and how long the GPU itself was busy by a profile."""
    known = figures.values()
    rows = []
    for name in ("inttune", "nora", "lora", "slora", "nlora"):
        busy = [known[f"notes.busy-{name}{end}"] for end in ("", ".to") if f"notes.busy-{name}{end}" in known]
        own = [known.get(f"step-h100-again.{name}.{key}") for key in ("ratio", "gib_over_base")]
        ratio, memory = (
            "-" if v is None else figures.shown(v, spec) for v, spec in zip(own, (".3f", ".2f"), strict=True)
        )
        rows.append([METHODS[name].title, ratio, memory, " to ".join(f"{v:.2f}" for v in busy)])
    return table(["", "times base", "GiB over base", "GPU busy, times base"], rows)


def batches() -> str:
    """Milliseconds and GiB over the base's by batch size (NoRA paper, figure 5)."""
    run, *rest = figures.lines("step-h200.jsonl")
    found = {(r["name"], r["batch"]): r for r in rest if r["kind"] == "result"}
    sizes = run["request"]["batches"]
    rows = []
    for name in run["request"]["names"]:
        own = [found[name, size] for size in sizes]
        times = [f"{r['ms']:.0f} ({r['ratio']:.2f})" for r in own]
        rows.append([find_peer(name).title, *times, *(f"{r['gib_over_base']:.2f}" for r in (own[0], own[-1]))])
    header = ["", *(f"batch {size}: ms (times base)" for size in sizes)]
    return table([*header, *(f"batch {size}: GiB over base" for size in (sizes[0], sizes[-1]))], rows)


def step_together() -> str:
    """Times over the base of two processes on H200s: layers of one input apart, and together."""
    known = figures.values()
    rows = []
    for name in ("peft_lora", "inttune", "nora", "lora", "slora", "nlora", "nlora:folded"):
        apart, together = ([known[f"step-h200-{which}.{name}.{key}"] for key in ("ratio", "ms")] for which in BOTH)
        cells = [f"{ratio:.3f} ({ms:.0f})" for ratio, ms in (apart, together)]
        rows.append([find_peer(name).title, *cells])
    return table(["", "apart: times base (ms)", "together: times base (ms)"], rows)


def compiled_runs() -> str:
    """What several compiled runs have over their base, and the part of PEFT LoRA's excess that it is."""
    rows = []
    for end, new in COMPILED.items():
        lines = figures.lines(f"compiled-h200{end}.jsonl")
        over = {line["name"]: line["ratio"] - 1 for line in lines if line["kind"] == "result"}
        parts = [over[name] / over["peft_lora"] for name in COMPILED_NAMES]
        cells = [figures.shown(over["peft_lora"], ".1%"), *(figures.shown(part, ".0%") for part in parts)]
        request = lines[0]["request"]
        rows.append([f"{request['rounds']} of {request['steps']} steps" + (f"; {new}" if new else ""), *cells])
    titles = [find_peer(name).title for name in COMPILED_NAMES]
    return table(["visits", "PEFT LoRA over the base", *(f"{title}, of that" for title in titles)], rows)


def branches() -> str:
    """What a recorded layer takes over its base, both passes, without branches and with them."""
    rows: dict[str, list[str]] = {}
    sums: dict[str, list[float]] = {}
    for line in figures.lines("branches-h200.jsonl"):
        over = [line[f"{way} both"] - line["base both"] for way in ("one stream", "branches")]
        rows.setdefault(line["layers"], []).append(" to ".join(f"{v:.0f}" for v in over))
        sums[line["method"]] = [a + b for a, b in zip(sums.get(line["method"], [0.0, 0.0]), over, strict=True)]
    rows["all of a block"] = [" to ".join(f"{v:.0f}" for v in both) for both in sums.values()]
    return table(["layers", *(METHODS[name].title for name in sums)], [[name, *cells] for name, cells in rows.items()])


def reuse() -> str:
    """What the orders of a pass take over the base's products, all layers of a block together."""
    sums: dict[str, dict[str, float]] = {}
    for line in figures.lines("reuse-h200.jsonl"):
        own = sums.setdefault(line["pass"], {})
        for order in line.keys() - {"layers", "pass", "base"}:
            own[order] = own.get(order, 0.0) + line[order] - line["base"]
    rows = [
        [name, ", ".join(f"{order} {over:.0f}" for order, over in sorted(found.items(), key=lambda e: e[1]))]
        for name, found in sums.items()
    ]
    return table(["pass", "µs over the base's products, by order"], rows)


def profile(name: str) -> Callable[[], str]:
    """How long the GPU is busy in compiled steps, beside the steps' wall time."""

    def made() -> str:
        data = figures.read(name)
        base = data["rows"][0]
        rows = [
            [
                find_peer(r["name"]).title,
                *(f"{r[key]:.2f} ({r[key] / base[key]:.3f})" for key in ("wall_ms", "gpu_ms")),
                str(r["kernels"]),
            ]
            for r in data["rows"]
        ]
        return f"{_what(data)}\n\n" + table(["", "wall, ms (times base)", "GPU busy, ms (times base)", "kernels"], rows)

    return made


def host() -> str:
    """What a step costs the host."""
    data = figures.read("host-h200.json")
    rows = [[find_peer(r["name"]).title, f"{r['ms']:.1f}", f"{r['p10']:.1f} to {r['p90']:.1f}"] for r in data["rows"]]
    return f"{_what(data)}\n\n" + table(["", "ms", "p10 to p90"], rows)


def fsdp2() -> str:
    """Visits of one GPU and of two, as `benchmarks/fsdp2.py` printed them, and their ratio."""
    rows, visits, steps = [], [], set()
    for line in figures.lines("fsdp2-h200.jsonl"):
        if line["kind"] == "visit":
            visits.append(line)
            continue
        kept = "whole between the passes" if line["request"]["keep_gathered"] else "gathered anew"
        for devices in (1, line["devices"]):
            own = [v for v in visits if v["devices"] == devices]
            speed = " and ".join(f"{v['tokens_per_second']:,.0f}" for v in own)
            times = " and ".join(f"{v['ms']:.0f} ({v['p10']:.0f} to {v['p90']:.0f})" for v in own)
            ratio = "" if devices == 1 else f"{line['ratio']:.2f}"
            gib = f"{max(v['gib'] for v in own):.1f}"
            tokens = f"{line['request']['batch']} x {line['request']['length']}"
            steps.add(line["request"]["steps"])
            rows.append([tokens, str(devices), "-" if devices == 1 else kept, speed, times, gib, ratio])
        visits = []
    request = line["request"]
    what = f"{line['device']}, {request['method']}, r = {request['r']}"
    header = ["tokens a GPU", "GPUs", "layers", "tokens a second", "a step, ms (p10 to p90)", "peak GiB a GPU", "ratio"]
    return f"{what}, {min(steps)} to {max(steps)} steps a visit.\n\n" + table(header, rows)


def _what(data: dict[str, Any]) -> str:
    return f"{data['what']}; {data['device']}, torch {data['torch']}, peft {data['peft']}."
