"""What is known of a run of a study, from its folder alone: done, failed and why, or still to be made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from corelora.compare.expand import Planned
from corelora.compare.study import EVALUATED
from corelora.errors import CoreLoraError
from corelora.train.folder import write_json
from corelora.train.progress import read_metrics

FAILED = "failed.json"
UPDATES = "updates.json"
LOG = "log.txt"
EARLY = (0.05, 0.15)  # of the steps: "after a tenth of the run" is a mean over these, as single losses are noisy


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A run and what its folder holds.

    Attributes:
        run: what was planned.
        folder: where.
        results: of a finished run.
        failed: why it failed: `error`, `kind` (memory, or other), `when`.
    """

    run: Planned
    folder: Path
    results: Mapping[str, Any] | None = None
    failed: Mapping[str, Any] | None = None
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """done, failed, or missing."""
        return "done" if self.results is not None else "failed" if self.failed is not None else "missing"

    def figure(self, name: str) -> float | None:
        """A figure of results.json, or of an evaluation as `eval/SUITE-PROTOCOL: SCORE`; None where there is none."""
        if name.startswith(EVALUATED):
            suite, _, score = name.removeprefix(EVALUATED).partition(": ")
            found = self.evaluations.get(suite, {}).get(score, {})
            value = found.get("value")
        else:
            value = (self.results or {}).get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @cached_property
    def curve(self) -> list[tuple[int, float]]:
        """(step, training loss) as logged."""
        path = self.folder / "metrics.jsonl"
        rows = read_metrics(path) if path.is_file() else []
        return [(r["step"], r["loss"]) for r in rows if isinstance(r.get("loss"), (int, float))]

    @property
    def early_loss(self) -> float | None:
        """Training loss after about a tenth of the steps."""
        steps = (self.results or {}).get("steps")
        if not steps:
            return None
        near = [loss for step, loss in self.curve if EARLY[0] * steps <= step <= EARLY[1] * steps]
        return sum(near) / len(near) if near else None

    @property
    def updates(self) -> list[dict[str, Any]]:
        """Norms and spectra of what was learned, one a layer, where they were measured."""
        path = self.folder / UPDATES
        return json.loads(path.read_text(encoding="utf-8"))["layers"] if path.is_file() else []


def stand(run: Planned, root: Path) -> Standing:
    """Read one run's folder.

    Args:
        run: of the study.
        root: the study's folder.
    """
    folder = run.folder(root)
    evaluations = {p.stem: read_result(p).get("scores", {}) for p in sorted((folder / "eval").glob("*.json"))}
    results = read_result(folder / "results.json") if (folder / "results.json").is_file() else None
    failed = read_result(folder / FAILED) if (folder / FAILED).is_file() else None
    return Standing(run=run, folder=folder, results=results, failed=failed, evaluations=evaluations)


def stand_all(runs: Sequence[Planned], root: Path) -> list[Standing]:
    """Read the folders of several runs."""
    return [stand(run, root) for run in runs]


def write_failed(folder: Path, error: str, kind: str, when: str) -> None:
    """Leave behind why a run failed.

    Args:
        folder: the run's.
        error: one readable sentence.
        kind: "memory" or "other".
        when: ISO time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILED, {"error": error, "kind": kind, "when": when})


def each_once(standings: Mapping[str, Sequence[Standing]]) -> list[Standing]:
    """The runs of all groups of a study; two groups may share one.

    Args:
        standings: by group, as a study's folder gives them.
    """
    return list({run.folder: run for own in standings.values() for run in own}.values())


def read_result(path: Path) -> dict[str, Any]:
    """A JSON file of a run's folder.

    Raises:
        CoreLoraError: it can't be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CoreLoraError(f"{path}: not a result file ({error})") from None
