"""The benches' results as tables: what stands in each cell."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

Table = tuple[str, list[str], list[list[str]]]  # a title, headers, rows of cells


def number(value: float | None, digits: int = 2) -> str:
    """A number for a cell, "-" for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(ratio: float | None) -> str:
    """A ratio as a difference: 1.1 is "+10.0 %"; "-" for None."""
    return "-" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def step_tables(results: Iterable[dict[str, Any]], run: dict[str, Any]) -> list[Table]:
    """One table for each batch size, eager and compiled apart; each title says what was measured where."""
    request = run["request"]
    extra = ", gradient checkpointing" if request["checkpointing"] else ""
    what = f"one training step of {shape_of(request)}, {request['length']} tokens{extra}; {machine(run)}"
    mode = request.get("compile_mode", "default")
    compiler = "torch.compile" + ("" if mode == "default" else f" in its mode {mode}")
    ordered = sorted(results, key=lambda r: (r["compiled"], r["batch"]))  # stable: variants keep their order
    return [
        (f"{what}; batch {batch}, {compiler if compiled else 'eager'}", *_step_cells(list(rows), compiled))
        for (compiled, batch), rows in groupby(ordered, key=lambda r: (r["compiled"], r["batch"]))
    ]


def shape_of(request: dict[str, Any]) -> str:
    """The model, type and ranks of a request, for a title."""
    layers = "" if request["layers"] is None else f" with {request['layers']} layers"
    return f"{request['model']}{layers}, {request['dtype']}, r = {request['r']}, k = {request['k']}"


def machine(run: dict[str, Any]) -> str:
    """The device and the versions that matter most, for a title."""
    return f"{run['device']}, torch {run['versions']['torch']}, peft {run['versions']['peft']}"


def _step_cells(rows: list[dict[str, Any]], compiled: bool) -> tuple[list[str], list[list[str]]]:
    headers = [
        "",
        "ms",
        "p10 to p90",
        "times base",
        "to PEFT LoRA",
        "published",
        "peak GiB",
        "GiB over base",
        "trained",
    ]
    cells = [
        [
            row["title"],
            number(row["ms"]),
            f"{number(row['p10'])} to {number(row['p90'])}",
            number(row["ratio"], 3),
            percent(row["over_peft_lora"]),
            percent(row["published_over_lora"]),
            number(row["gib"]),
            number(row["gib_over_base"]),
            f"{row['trained']:,}",
            *([str(row["graph_breaks"])] if compiled else []),
        ]
        for row in rows
    ]
    return headers + (["graph breaks"] if compiled else []), cells


def start_tables(results: Iterable[dict[str, Any]], run: dict[str, Any]) -> list[Table]:
    """Seconds to start each method, and what its decompositions keep."""
    rows = list(results)
    what = f"get_peft_model on {shape_of(run['request'])}, {run['weights']} weights; {machine(run)}"
    headers = ["", "seconds", "p10 to p90", "modules", "values", "to PEFT LoRA", "published"]
    starts = [
        [
            row["title"],
            number(row["seconds"], 3),
            f"{number(row['p10'], 3)} to {number(row['p90'], 3)}",
            number(row["modules"], 3),
            number(row["values"], 3),
            percent(row["over_peft_lora"]),
            percent(row["published_over_lora"]),
        ]
        for row in rows
        if row["kind"] == "result"
    ]
    solved = [row for row in rows if row["kind"] == "decomposition"]
    found = [(what, headers, starts)] if starts else []
    if solved:
        title = f"decompositions of {shape_of(run['request'])}, {run['weights']} weights; {machine(run)}"
        found.append((title, *_decomposition_cells(solved)))
    return found


def _decomposition_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    headers = ["", "solver", "seconds", "same again", "energy of exact, %", "worst layer, %"]
    cells = []
    for row in rows:
        shares = [None if share is None else 100 * share for share in (row.get("energy"), row.get("worst_layer"))]
        same = "yes" if row["same_again"] else "no"
        cells.append([row["title"], row["solver"], number(row.get("seconds")), same, *(number(s, 4) for s in shares)])
    return headers, cells


def serve_tables(results: Iterable[dict[str, Any]], run: dict[str, Any]) -> list[Table]:
    """Prefill and decode side by side."""
    rows, request = list(results), run["request"]
    what = f"forward passes of {shape_of(request)}, batch {request['batch']}; {machine(run)}"
    phases = {phase: {r["name"]: r for r in rows if r["phase"] == phase} for phase in ("prefill", "decode")}
    headers = ["", f"prefill of {request['length']} tokens, ms", "p10 to p90", "times base"]
    headers += ["one token more, ms", "p10 to p90", "times base"]
    cells = []
    for name, first in phases["prefill"].items():
        pair = (first, phases["decode"][name])
        figures = [(number(r["ms"]), f"{number(r['p10'])} to {number(r['p90'])}", number(r["ratio"], 3)) for r in pair]
        cells.append([first["title"], *figures[0], *figures[1]])
    return [(what, headers, cells)]


def layers_tables(results: Iterable[dict[str, Any]], run: dict[str, Any]) -> list[Table]:
    """One table a pass: methods and types down, numbers of tokens across, for "auto" and for the fused path."""
    rows, request = list(results), run["request"]
    tokens = sorted({r["tokens"] for r in rows})
    what = f"time over that of plain modules, geometric mean over {', '.join(run['shapes'])}, r = {request['r']}, "
    what += f"k = {request['k']}; {machine(run)}"
    names = ["1 token" if t == 1 else f"{t} tokens" for t in tokens]
    headers = ["", "type", *(f"auto, {name}" for name in names), *(f"fused, {name}" for name in names)]
    found = []
    for which in dict.fromkeys(r["pass"] for r in rows):
        of_pass = {(r["title"], r["dtype"], r["tokens"]): r for r in rows if r["pass"] == which}
        lines = dict.fromkeys((title, dtype) for title, dtype, _ in of_pass)
        cells = [
            [
                title,
                dtype,
                *(number(of_pass[title, dtype, t][figure], 3) for figure in ("auto", "mean") for t in tokens),
            ]
            for title, dtype in lines
        ]
        found.append((f"{what}; {which}", headers, cells))
    return found
