"""Tables of studies: of the runs that are kept in docs/results, and of what a study printed."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import figures
from key_tables import table

from corelora.compare.folder import StudyFolder
from corelora.compare.known import take_known
from corelora.compare.leaders import Leader
from corelora.compare.session import start_study
from corelora.compare.standing import Standing
from corelora.compare.tables import answer_rows, leader_rows, led_groups
from corelora.plan_memory import GIB

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import studies

FASTER_B = "B at four times the rate"


@contextmanager
def known_study(name: str) -> Iterator[StudyFolder]:
    """A study with the runs of docs/results/known, which need not be all of them."""
    with tempfile.TemporaryDirectory() as place:
        where = studies.words(name, "../shared/data")
        folder = start_study(studies.files()[name], Path(place) / studies.file_name(name), where)
        folder.save()
        take_known(folder.root, [figures.RESULTS / "known" / f"{studies.file_name(name)}.jsonl"])
        yield folder


def dtd() -> str:
    """Few-shot runs on textures, each beside the head alone with the same seed, and so the same pictures."""
    with known_study("dtd-efficientnet") as folder:
        led = [(group, found) for group, _, found in led_groups(folder)]
    leaders = {group.name: found for group, found in led}
    parts = [f"{group.name}:\n\n{_beside_head(found)}" for group, found in led if "method" in group.axes]
    starts = leaders["16 shots, strong crops, NLoRA's start"]
    told = " and ".join(f"{dict(x.setting)['setting']} {rated(x, 4)}" for x in starts)
    parts.append(f"NLoRA's start, 16 shots, strong crops, test accuracy (rate): {told}.")
    best, head = _scores(leaders["16 shots, strong crops"], "nora"), _scores(leaders["16 shots"], "head")
    parts.append(f'NoRA with strong crops above the head of "16 shots", same pictures: {_gain(best, head)}.')
    return "\n\n".join(parts)


def _scores(found: Sequence[Leader], method: str) -> dict[int, float]:
    """A method's test accuracy by seed."""
    [leader] = [x for x in found if dict(x.setting)["method"] == method]
    return {r.run.seed: r.figure("test_accuracy") or 0.0 for r in leader.runs}


def _gain(scores: dict[int, float], others: dict[int, float]) -> str:
    """How much better one is than the other, seed by seed: mean and deviation."""
    gains = [value - others[seed] for seed, value in scores.items()]
    return f"{statistics.fmean(gains):+.4f} ± {statistics.stdev(gains):.4f}"


def _beside_head(found: Sequence[Leader]) -> str:
    rows, head = [], _scores(found, "head")
    for leader in found:
        method = dict(leader.setting)["method"]
        gain = "-" if method == "head" else _gain(_scores(found, method), head)
        score = f"{leader.mean:.4f} ± {leader.deviation:.4f}"
        rate = " ".join(f"{value}" for _, value in leader.tuned)
        numbers = [leader.average(name) or 0.0 for name in ("trained_parameters", "seconds")]
        rows.append([method, rate, score, gain, *(f"{n:,.0f}" for n in numbers)])
    header = ["method", "best rate", "test accuracy", "above the head, same pictures", "trained", "seconds"]
    return table(header, rows)


def known_runs(name: str) -> Callable[[], str]:
    """The leaders of a study's groups by its runs in docs/results/known, which need not be all of them.

    A group of which there is one setting so far compares nothing and is left out.
    """

    def made() -> str:
        with known_study(name) as folder:
            parts = []
            for group, _, every in led_groups(folder):
                found = [x for x in every if x.runs or x.failed]
                if len(found) > 1:
                    parts.append(f"{group.name}:\n\n" + table(*leader_rows(folder, group, found)))
        return "\n\n".join(parts)

    return made


def known_answers(name: str) -> Callable[[], str]:
    """What those runs say to the study's questions."""

    def made() -> str:
        with known_study(name) as folder:
            return table(*answer_rows(folder, led_groups(folder)))

    return made


def rates(methods: Sequence[str]) -> Callable[[], str]:
    """Test losses of methods on GSM8K at every rate that was tried, with the first seed."""

    def made() -> str:
        with known_study("smollm2-gsm8k/methods") as folder:
            runs = [s for s in next(iter(folder.standings().values())) if s.run.seed == 0]
        ours = [s for s in runs if s.run.labels["method"] in methods and s.state != "missing"]
        tried = sorted({s.run.labels["lr"] for s in ours}, key=float)
        found = {(s.run.labels["method"], s.run.labels["lr"]): _loss(s) for s in runs}
        return table(["test loss at lr", *tried], [[m, *(found.get((m, lr), "-") for lr in tried)] for m in methods])

    return made


def _loss(run: Standing) -> str:
    loss = run.figure("test_loss")
    return ("not finite" if run.failed else "-") if loss is None else f"{loss:.4f}"


def tuned() -> str:
    """Every method on GSM8K at its own best rate: what it trains, its loss, and what it took."""
    with known_study("smollm2-gsm8k/methods") as folder:
        found = [x for x in next(led_groups(folder))[2] if x.scores]
        seeds = {len(x.scores) for x in found}
        rows = [[dict(x.setting)["method"], *_took(x)] for x in found]
    header = ["method", "trained", "test loss (rate)", "loss after a tenth", "peak GiB"]
    return f"Means and deviations of {' or '.join(map(str, seeds))} seeds.\n\n" + table(header, rows)


def _took(leader: Leader) -> list[str]:
    trained, memory = (leader.average(name) or 0.0 for name in ("trained_parameters", "peak_memory"))
    return [f"{trained / 1e6:.2f}M", rated(leader, 4), f"{leader.early_loss or 0.0:.3f}", f"{memory / GIB:.1f}"]


def minilm() -> str:
    """MiniLM on GLUE tasks: each method's score at its best rate, beside the most frequent class."""
    columns: dict[str, dict[str, str]] = {}
    tasks = figures.read("glue-majority.json")["tasks"]
    for task, about in tasks.items():
        with known_study(f"minilm-glue/{task}") as folder:
            leaders = {group.name: found for group, _, found in led_groups(folder)}
        columns[task] = {"most frequent class": f"{about['majority']:.3f}"}
        columns[task] |= {dict(x.setting)["method"]: rated(x, 3) for x in leaders["methods"] if x.scores}
        faster = next(x for x in leaders["NLoRA's start"] if dict(x.setting)["setting"].endswith(FASTER_B))
        columns[task][f"NLoRA, {FASTER_B}"] = rated(faster, 3)
    methods = dict.fromkeys(name for column in columns.values() for name in column)
    header = ["", *(f"{task}, {about['score'].removeprefix('test_')}" for task, about in tasks.items())]
    return table(header, [[name, *(column.get(name, "-") for column in columns.values())] for name in methods])


def rated(leader: Leader, digits: int) -> str:
    """A score, its deviation where there are several seeds, and the rate."""
    spread = "" if leader.deviation is None else f" ± {leader.deviation:.{digits}f}"
    return f"{leader.mean:.{digits}f}{spread} ({', '.join(value for _, value in leader.tuned)})"


def study(name: str) -> Callable[[], str]:
    """What a study took and the leaders of each of its groups, as `corelora compare ... --json` printed them."""

    def made() -> str:
        data = figures.read(name)
        runs = {run["run"]: run.get("seconds", 0) for run in data["runs"]}  # two groups may share one
        where = f"{data['versions']['device']}, {data['versions']['threads']} threads"
        parts = [f"{len(runs)} runs, {sum(runs.values()) / 60:.1f} minutes of training; {where}."]
        for group in data["groups"]:
            parts.append(f"{group['name']}:\n\n{_leaders(group)}")
        return "\n\n".join(parts)

    return made


def _leaders(group: dict[str, Any]) -> str:
    rows = []
    for leader in group["leaders"]:
        spread = "" if leader["deviation"] is None else f" ± {leader['deviation']:.4f}"
        score = "failed" if leader["mean"] is None else f"{leader['mean']:.4f}{spread}"
        tuned = ", ".join(f"{axis} {value}" for axis, value in leader["best_at"].items())
        trained = "" if leader["trained_parameters"] is None else f"{leader['trained_parameters']:,.0f}"
        same = " ≈" if leader["within_noise_of_best"] else ""
        rows.append([*leader["setting"].values(), tuned, score + same, str(len(leader["scores"])), trained])
    header = [*group["leaders"][0]["setting"], "best at", group["score"].replace("_", " "), "seeds", "trained"]
    kept = [n for n in range(len(header)) if any(row[n] for row in rows)]
    return table([header[n] for n in kept], [[row[n] for n in kept] for row in rows])
