"""Single figures in the documents' prose: `<!-- figure NAME FORMAT -->1.04<!-- /figure -->`.

NAME is one of

    FILE.VARIANT.KEY    of docs/results/FILE.jsonl, as `corelora bench step` wrote it, eager, at its largest batch
    notes.NAME          of docs/results/notes.json; notes.NAME.to is the upper end of a range
    NAME                what is derived here

and FORMAT is Python's (`.2f`, `,.0f`, `.1%`). `make_tables.py` fills the marks.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MARK = re.compile(r"<!-- figure (?P<name>\S+) (?P<format>\S+) -->.*?<!-- /figure -->", flags=re.DOTALL)


def read(name: str) -> Any:
    """A JSON file of docs/results."""
    return json.loads((RESULTS / name).read_text())


def lines(name: str) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file of docs/results."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def values() -> dict[str, float]:
    """Every figure by its name."""
    found = _noted()
    for path in RESULTS.glob("step-*.jsonl"):
        found |= _benched(path.stem)
    return found | _steps(found) | _compiled() | _kernels() | _layers() | _decomposition() | _others()


def shown(value: float, spec: str) -> str:
    """A value in its format; percent have a space before the sign."""
    return f"{value:{spec}}".replace("%", " %")


def fill(text: str) -> str:
    """The text with every figure made anew."""
    known = values() if MARK.search(text) else {}

    def replace(match: re.Match[str]) -> str:
        name, spec = match["name"], match["format"]
        return f"<!-- figure {name} {spec} -->{shown(known[name], spec)}<!-- /figure -->"

    return MARK.sub(replace, text)


def _noted() -> dict[str, float]:
    notes = read("notes.json")["notes"]
    upper = {f"notes.{n['name']}.to": n["to"] for n in notes if "to" in n}
    return upper | {f"notes.{n['name']}": n["figure"] for n in notes}


def _benched(name: str) -> dict[str, float]:
    results = [r for r in lines(f"{name}.jsonl") if r["kind"] == "result" and not r["compiled"]]
    results.sort(key=lambda r: r["batch"])
    return {f"{name}.{r['name']}.{k}": v for r in results for k, v in r.items() if isinstance(v, int | float)}


def _steps(known: dict[str, float]) -> dict[str, float]:
    """What follows from the training steps."""
    over = {}
    for device in ("h100", "h200"):
        slora, lora = (known[f"step-{device}.{name}.ms"] for name in ("slora", "lora"))
        over[f"slora-over-lora-{device}"] = slora / lora - 1
    for name in ("slora", "nlora"):
        kept, again = (known[f"{run}.{name}.gib_over_base"] for run in ("step-h100", "step-h100-again"))
        over[f"kept-f-gib-{name}"] = kept - again
    return over | {
        "slora-published": known["step-h200.slora.published_over_lora"] - 1,
        "inttune-products-share": known["notes.inttune-products"] / known["step-h100.base.ms"],
        "outer-factors-gib": 2 * known["step-h200.lora.trained"] / 2**30,  # NoRA's have LoRA's shapes; bfloat16
        "step-cpu-saved": 1 - known["step-cpu.nlora.ms"] / known["step-cpu.nlora:reference.ms"],
    }


def _compiled() -> dict[str, float]:
    """By how much the GPU is busier in a compiled step than in the base's, and by how much one takes longer."""
    rows = {r["name"]: r["gpu_ms"] for r in read("profile-compiled-h200.json")["rows"]}
    over = {r["name"]: r["ratio"] - 1 for r in lines("compiled-h200.jsonl") if r["kind"] == "result"}
    busier = {f"compiled-gpu-{name}": ms / rows["base"] - 1 for name, ms in rows.items()}
    return busier | {f"compiled-over-{name.replace(':', '-')}": value for name, value in over.items()}


def _kernels() -> dict[str, float]:
    """What kinds of kernels take of a compiled step, microseconds a block."""
    variants = read("kernels-h200.json")["variants"]

    def of(name: str, *parts: str) -> float:
        return sum(row["us_a_layer"] for row in variants[name] if any(part in row["kernel"] for part in parts))

    # x W^T, alone or added to what is there
    wide = ("256x128_64x4_1x2_h_{}_coopA_TNT", "192x192_64x4_2x1_v_{}_coopB_TNN")
    alone, added = ([part.format(end) for part in wide] for end in ("bz", "badd"))
    over = {f"kernels-over-{name}": of(name, "") - of("base", "") for name in variants}
    return over | {
        "kernels-widen": of("slora", alone[0], "168x128_64x5_1x2_h_bz_TNN"),
        "kernels-read": of("slora", *added) - of("base", *alone),
        "kernels-optimiser": of("slora", "multi_tensor_apply"),
    }


def _layers() -> dict[str, float]:
    """The automatic choice over plain modules on a CPU, geometric means."""
    results = [r for r in lines("layers-cpu.jsonl") if r["kind"] == "result"]
    forward = [r["auto"] for r in results if r["pass"] == "forward"]
    long = [r["auto"] for r in results if r["pass"] != "forward" and r["tokens"] >= 64]
    return {
        "layers-cpu-slower": max(r["auto"] for r in results) - 1,
        "layers-cpu-long": statistics.geometric_mean(long),
        "layers-cpu-forward": statistics.geometric_mean(forward),
    }


def _decomposition() -> dict[str, float]:
    """AwSVD against SVD, over all layers."""
    data = read("decomposition-smollm2.json")
    ways = {"svd": "SVD", "awsvd": "AwSVD, power 0.5", "power-1": "AwSVD, power 1", "optimal": "optimal"}
    errors = {way: [layer["errors"][title] for layer in data["layers"]] for way, title in ways.items()}
    ranks = range(len(data["ranks"]))

    def less(better: str, worse: str, n: int) -> float:
        return statistics.mean(1 - b[n] / w[n] for b, w in zip(errors[better], errors[worse], strict=True))

    awsvd, optimal = ([less(*pair, n) for n in ranks] for pair in (("awsvd", "svd"), ("optimal", "awsvd")))
    at_64 = data["ranks"].index(64)
    return {
        "awsvd-better": sum(
            all(a[n] < s[n] for n in ranks) for a, s in zip(errors["awsvd"], errors["svd"], strict=True)
        ),
        "awsvd-less-from": min(awsvd),
        "awsvd-less-to": max(awsvd),
        "optimal-less-from": min(optimal),
        "optimal-less-to": max(optimal),
        "power-1-at-64": statistics.mean(e[at_64] for e in errors["power-1"]),
        "awsvd-at-64": statistics.mean(e[at_64] for e in errors["awsvd"]),
        "decomposed-layers": len(data["layers"]),
    }


def _others() -> dict[str, float]:
    published = {r["method"]: r["values"]["seconds"] for r in _published("nlora-table-05.json")}
    alone = {(line["layers"], line["pass"]): line["base"] for line in lines("reuse-h200.jsonl")}
    return {
        "batched-replies-tokens": read("batched-replies.json")["new_tokens"],
        "first-layer": alone["q k v", "backward"],
    } | {f"published-start-{method.lower()}": seconds for method, seconds in published.items()}


def _published(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS.parent / "published" / name).read_text())["rows"]
