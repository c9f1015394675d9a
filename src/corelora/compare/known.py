"""A study's runs as one small file: figures, curves and failures without weights, for other folders to begin with.

runs.jsonl has one line a run, by its name, which follows from its recipe alone. A run that is taken from such a file is
not made again, unless a finalist's weights are wanted, which the file has not. What was learned is there as means by
kind of layer, as the report's charts show it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from corelora.compare.folder import StudyFolder
from corelora.compare.standing import FAILED, UPDATES, Standing, each_once, read_result
from corelora.errors import CoreLoraError, raise_all
from corelora.train.folder import write_json, write_text

RUNS = "runs.jsonl"
KNOWN = "known.json"  # in the folder of a run that was taken from such a file
PARTS = {"results": "results.json", "failed": FAILED, "updates": UPDATES}
FIGURES = 5  # significant ones of losses and norms


def runs_text(runs: Sequence[Standing]) -> str:
    """The file of runs that are done or have failed.

    Args:
        runs: of a study, each once.
    """
    return "".join(json.dumps(_line(run)) + "\n" for run in runs if run.state != "missing")


def keep_runs(folder: StudyFolder) -> Path:
    """Write a study's runs.jsonl.

    Args:
        folder: the study's.

    Returns:
        The file's path.
    """
    path = folder.root / RUNS
    write_text(path, runs_text(each_once(folder.standings())))
    return path


def _line(run: Standing) -> dict[str, Any]:
    parts = {key: read_result(run.folder / name) for key, name in PARTS.items() if (run.folder / name).is_file()}
    if "updates" in parts:
        parts["updates"] = {"layers": _by_kind(parts["updates"]["layers"])}
    curve = [[step, _short(loss)] for step, loss in run.curve]
    evaluations = {suite: {"scores": scores} for suite, scores in run.evaluations.items()}
    return {"run": run.run.name, **parts, "curve": curve, **({"evaluations": evaluations} if evaluations else {})}


def _by_kind(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the layers of each kind (q_proj, ...); singular values as parts of their layer's largest."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["layer"].rpartition(".")[2], []).append(layer)
    return [
        {
            "layer": kind,
            **{key: _short(fmean(layer[key] for layer in own)) for key in ("norm", "relative", "stable_rank")},
            "values": [_short(fmean(parts)) for parts in zip(*(_parts(layer) for layer in own), strict=False)],
        }
        for kind, own in kinds.items()
    ]


def _parts(layer: Mapping[str, Any]) -> list[float]:
    return [value / layer["values"][0] for value in layer["values"]]


def _short(value: float) -> float:
    return float(f"{value:.{FIGURES}g}")


def take_known(root: Path, files: Sequence[Path]) -> int:
    """Make folders of runs that other folders have finished; those that this one has stay as they are.

    Args:
        root: the study's folder.
        files: runs.jsonl of other folders.

    Returns:
        How many runs were taken.

    Raises:
        CoreLoraError: a file is missing or is none of these, before anything is written.
    """
    lines = [line for file in files for line in _lines(file)]
    new = [line for line in lines if not (root / "runs" / line["run"]).exists()]
    for line in new:
        _write(root / "runs" / line["run"], line)
    return len(new)


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CoreLoraError(f"--known {file}: can't be read ({error.strerror})") from None
    lines, problems = [], []
    for n, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
            name = lines[-1]["run"]
        except (ValueError, KeyError, TypeError):
            name = ""
        if not name or Path(name).name != name:
            problems.append(f"line {n} is not a run: a runs.jsonl, as `corelora report STUDY` writes it, is expected")
    raise_all(problems[:1], f"--known {file}")
    return lines


def _write(folder: Path, line: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    for suite, found in line.get("evaluations", {}).items():
        (folder / "eval").mkdir(exist_ok=True)
        write_json(folder / "eval" / f"{suite}.json", found)
    rows = ({"step": step, "loss": loss} for step, loss in line.get("curve", []))
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / KNOWN, {"run": line["run"]})
    for key, name in reversed(PARTS.items()):  # the results last: they say that all is there
        if key in line:
            write_json(folder / name, line[key])


def forget_known(folder: Path) -> None:
    """Empty the folder of a run that was taken from a file, so that the run can be made."""
    if (folder / KNOWN).is_file():
        shutil.rmtree(folder)
        folder.mkdir()
