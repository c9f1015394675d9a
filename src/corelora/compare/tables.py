"""A study's figures as tables: for the terminal, as JSON, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from corelora.compare.folder import StudyFolder, distinct
from corelora.compare.leaders import Labels, Leader, leaders
from corelora.compare.published import published_columns
from corelora.compare.questions import Answer, answer
from corelora.compare.rates import within
from corelora.compare.standing import Standing, each_once, stand
from corelora.compare.study import EVALUATED, Group
from corelora.plan_memory import GIB

SAME = "≈"  # marks settings whose distance from the best is within noise


Led = tuple[Group, Sequence[Standing], list[Leader]]


def led_groups(folder: StudyFolder) -> Iterator[Led]:
    """Every group of a study, in its order: the group, its runs, and who leads it, best first."""
    for group, runs in zip(folder.study.groups, folder.standings().values(), strict=True):
        yield group, runs, leaders(group, runs, *folder.study.score_of(group))


def runs_of(led: Iterable[Led]) -> list[Standing]:
    """The runs of groups, each once."""
    return each_once({group.name: runs for group, runs, _ in led})


def leader_rows(folder: StudyFolder, group: Group, found: Sequence[Leader]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows as text) of a group's table, best first; columns that no row fills are left out.

    Args:
        folder: the study's.
        group: one of its groups.
        found: its leaders.
    """
    score, _ = folder.study.score_of(group)
    columns: dict[str, list[str]] = {axis: [] for axis, _ in found[0].setting} if found else {}
    for leader in found:
        for axis, value in leader.setting:
            columns[axis].append(value)
        _add(columns, "best at", _shown(leader.tuned) + (f" ({leader.edge} tried)" if leader.edge else ""))
        _add(columns, score, _score(leader))
        _add(columns, "seeds", str(len(leader.scores) or ""))
        for name in (n for n in _suite_scores(found) if n != score):
            _add(columns, name.removeprefix(EVALUATED), _number(leader.average(name)))
        for name, values in published_columns(folder.where, group, found).items():
            _add(columns, name, values[leader.setting])
        _add(columns, "usable rates", _usable(leader))
        _add(columns, "loss after a tenth", _number(leader.early_loss))
        _add(columns, "trained", _count(leader.average("trained_parameters")))
        _add(columns, "seconds", _number(leader.average("seconds"), "{:,.0f}"))
        _add(columns, "GiB", _number(_scaled(leader.average("peak_memory"), GIB), "{:.2f}"))
        _add(columns, "failed", str(leader.failed or ""))
        _add(columns, "missing", str(leader.missing or ""))
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return list(filled), [list(row) for row in zip(*filled.values(), strict=True)]


def leaders_text(folder: StudyFolder) -> str:
    """Every group's table, and the answers, for a terminal."""
    led = list(led_groups(folder))
    parts = [f"{group.name}\n{_aligned(*leader_rows(folder, group, found))}" for group, _, found in led]
    parts += [f"{a.ask} {a.verdict}\n  {a.figures}" for a in answers(folder, led)]
    return "\n\n".join(parts)


def answers(folder: StudyFolder, led: Iterable[Led]) -> list[Answer]:
    """What the runs say to the study's questions, in their order.

    Args:
        folder: the study's.
        led: its groups.
    """
    study, settings = folder.study, {group.name: found for group, _, found in led}
    asked = [(question, study.group_of(question)) for question in study.questions]
    return [answer(question, settings[group.name], study.score_of(group)[1]) for question, group in asked]


def answer_rows(folder: StudyFolder, led: Iterable[Led]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows as text) of the answers.

    Args:
        folder: the study's.
        led: its groups.
    """
    return ["question", "answer", "figures"], [[a.ask, a.verdict, a.figures] for a in answers(folder, led)]


def markdown(folder: StudyFolder) -> str:
    """The study in Markdown: what was run, every group's table, failed runs and why, the command."""
    led = list(led_groups(folder))
    everything = runs_of(led)
    parts = [f"# {folder.root.name}", folder.study.about, summary(everything)]
    if folder.study.questions:
        parts += ["## Questions", _markdown_table(*answer_rows(folder, led))]
    for group, _, found in led:
        parts += [f"## {group.name}", group.about, _markdown_table(*leader_rows(folder, group, found))]
    if failed := failures(everything):
        said = (f"- {setting}: {error.splitlines()[0]} (`{name}`)" for setting, name, error in failed)
        parts += ["## Failed runs", "\n".join(said)]
    parts += ["## How it was made", f"    {folder.command}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(runs: Sequence[Standing]) -> str:
    """How many runs there are and how they ended, and how to read the tables.

    Args:
        runs: of the study, each once.
    """
    count = {state: sum(s.state == state for s in runs) for state in ("done", "failed", "missing")}
    seconds = sum((s.results or {}).get("seconds", 0) for s in runs)
    shown = ", ".join(f"{n} {state}" for state, n in count.items() if n)
    return (
        f"{len(runs)} runs: {shown}; {seconds / 3600:.2f} hours of running. Each setting is judged at its best tuned "
        "value; where that is the lowest or highest rate tried, a better one may lie beyond. "
        f"{SAME} marks what is within noise of the best that has several seeds (Welch's t-test over seeds, 95 %); "
        "a single seed can't say."
    )


def failures(runs: Sequence[Standing]) -> list[tuple[str, str, str]]:
    """(group, labels and seed; name; error) of every run that failed.

    Args:
        runs: of the study, each once.
    """
    return [
        (f"{s.run.group}, {_shown(tuple(s.run.labels.items()))}, seed {s.run.seed}", s.run.name, str(s.failed["error"]))
        for s in runs
        if s.failed is not None
    ]


def run_rows(folder: StudyFolder) -> list[dict[str, Any]]:
    """Every run of the study with its labels, state and figures; those of two groups stand in both."""
    rows = []
    for name, runs in folder.standings().items():
        for run in runs:
            figures = {k: v for k, v in (run.results or {}).items() if isinstance(v, (int, float, str))}
            evaluated = {
                f"{EVALUATED}{s}: {k}": v.get("value") for s, all_ in run.evaluations.items() for k, v in all_.items()
            }
            known = {"group": name, **run.run.labels, "seed": run.run.seed, "state": run.state, "run": run.run.name}
            rows.append({**known, **figures, **evaluated, "error": _first_line(run)})
    return rows


def csv_text(folder: StudyFolder) -> str:
    """Every run as a line of CSV."""
    rows = run_rows(folder)
    names = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def study_data(folder: StudyFolder) -> dict[str, Any]:
    """Leaders of every group and every run's figures, as `--json` prints them and docs/results keeps them."""
    groups, led = [], list(led_groups(folder))
    for group, _, found in led:
        score, lower = folder.study.score_of(group)
        data = [_leader_data(leader) for leader in found]
        groups.append({"name": group.name, "score": score, "lower_is_better": lower, "leaders": data})
    made = [s.results for _, runs, _ in led for s in runs if s.results]
    versions: dict[str, Any] = next((r["versions"] for r in made if "versions" in r), {})
    rows = [{k: v for k, v in row.items() if v != ""} for row in run_rows(folder)]
    said = [asdict(a) for a in answers(folder, led)]
    return {"about": folder.study.about, "questions": said, "groups": groups, "runs": rows, "versions": versions}


def list_text(folder: StudyFolder) -> str:
    """The runs of the first seeds: name, state, group."""
    runs = distinct([run for runs in folder.first.values() for run in runs])
    rows = [[run.name, stand(run, folder.root).state, run.group] for run in runs]
    done = sum(row[1] == "done" for row in rows)
    return f"{_aligned(['run', 'state', 'group'], rows)}\n\n{len(rows)} runs, {done} done; finalists follow them"


def _leader_data(leader: Leader) -> dict[str, Any]:
    figures = {k: leader.average(k) for k in ("trained_parameters", "seconds", "peak_memory")}
    return {
        "setting": dict(leader.setting),
        "best_at": dict(leader.tuned),
        "mean": leader.mean if leader.scores else None,
        "deviation": leader.deviation,
        "scores": {str(r.run.seed): s for r, s in zip(leader.runs, leader.scores, strict=True)},
        "within_noise_of_best": leader.noise,
        "usable_rates": leader.usable,
        "best_at_the_edge": leader.edge,
        "early_loss": leader.early_loss,
        **figures,
        **{name: leader.average(name) for name in _suite_scores([leader])},
        "failed": leader.failed,
        "missing": leader.missing,
    }


def _first_line(run: Standing) -> str:
    return str(run.failed["error"]).splitlines()[0] if run.failed else ""


def _suite_scores(found: Sequence[Leader]) -> list[str]:
    """Names of all evaluated scores, as figures."""
    names: dict[str, None] = {}
    for run in (r for leader in found for r in leader.runs):
        names |= {f"{EVALUATED}{suite}: {score}": None for suite, scores in run.evaluations.items() for score in scores}
    return list(names)


def _score(leader: Leader) -> str:
    if not leader.scores:
        return ""
    deviation = f" ± {leader.deviation:.4f}" if leader.deviation is not None else ""
    return f"{leader.mean:.4f}{deviation}{f' {SAME}' if leader.noise else ''}"


def _usable(leader: Leader) -> str:
    """Their width; "or more" where they reach an end of what was tried."""
    if leader.usable is None:
        return ""
    low, high = leader.usable
    is_open = leader.tried is not None and (low == leader.tried[0] or high == leader.tried[1])
    return within(leader.usable, " or more" if is_open else "")


def _shown(labels: Labels) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in labels)


def _number(value: float | None, form: str = "{:.4f}") -> str:
    return "" if value is None else form.format(value)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _count(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.2f}M" if value >= 1e5 else f"{value:,.0f}"


def _add(columns: dict[str, list[str]], name: str, cell: str) -> None:
    columns.setdefault(name, []).append(cell)


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _aligned(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[n]) for row in (headers, *rows)) for n in range(len(headers))]
    lines = [headers, ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
