"""An evaluation from beginning to end: check everything, load once a head, ask, judge, write one JSON file a suite."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from corelora.data.glue import GLUE
from corelora.data.sources import Rows, read_rows
from corelora.errors import CoreLoraError, raise_all
from corelora.evaluate.fitting import SCHEDULED, samples_at_a_time
from corelora.evaluate.job import KINDS, Job, Outcome, Settings
from corelora.evaluate.scores import average
from corelora.evaluate.session import Partial
from corelora.evaluate.subject import Subject, load_subject, model_facts
from corelora.evaluate.suites import Protocol, Suite
from corelora.evaluate.vllm_backend import load_engine, vllm_problems
from corelora.train.folder import versions, write_json

# Modules that add their kinds of evaluation; a package that one lacks is named where a suite needs the kind.
KIND_MODULES = {
    "generate": "generate",
    "code": "generate",
    "likelihood": "likelihood",
    "classify": "classify",
    "harness": "harness",
    "judge": "mt_bench",
    "judge_pairs": "mt_bench",
}


@dataclass(frozen=True)
class Planned:
    """One suite under one protocol."""

    suite: Suite
    name: str  # of the protocol
    protocol: Protocol


@dataclass
class _Models:
    """What was loaded last, by the number of classes of its head: one model at a time.

    Attributes:
        subject, settings: what to load, and for which back end.
        say: takes lines for the user.
        classes: of what is loaded; `loaded` is model, tokenizer, and what a result says about them.
    """

    subject: Subject
    settings: Settings
    say: Callable[[str], None]
    classes: int | None = None
    loaded: tuple[Any, Any, dict[str, Any]] | None = None

    def get(self, classes: int | None) -> tuple[Any, Any, dict[str, Any]]:
        """(model, tokenizer, facts)."""
        if self.loaded is None or classes != self.classes:
            self.loaded = None  # one model at a time
            self.classes, self.loaded = classes, self._load(classes)
        return self.loaded

    def _load(self, classes: int | None) -> tuple[Any, Any, dict[str, Any]]:
        if self.settings.backend == "vllm":
            return load_engine(self.subject, self.settings.seed, self.say)
        model, tokenizer = load_subject(self.subject, classes, self.settings.merge)
        return model, tokenizer, model_facts(self.subject, self.settings.merge, model.dtype, model.device.type)


def evaluate(
    subject: Subject,
    suites: Sequence[Suite],
    protocol: str | None,
    settings: Settings,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Evaluate a subject on suites.

    Args:
        subject: what is evaluated.
        suites: with their rows' places.
        protocol: its name in each suite; each suite's default if None.
        settings: batch size, limit, ...
        say: takes lines for the user.

    Returns:
        The result files, `eval/SUITE-PROTOCOL.json` below the subject's folder.

    Raises:
        CoreLoraError: anything wrong with suites, rows, model: all that can be known is said before weights are read.
    """
    planned = [Planned(suite, *suite.protocol(protocol)) for suite in suites]
    problems = vllm_problems(subject) if settings.backend == "vllm" else []
    raise_all([*problems, *(p for plan in planned for p in _problems(plan, settings))], "evaluate")
    rows = {plan.suite.name: _rows(plan, say) for plan in planned}
    folder = subject.folder / "eval"
    _check_writable(folder)
    models = _Models(subject, settings, say)
    made = []
    for plan in planned:
        say(f"\n{plan.suite.name} version {plan.suite.version}, protocol {plan.name}")
        made.append(_suite(plan, subject, settings, rows[plan.suite.name], models))
        say(f"written: {made[-1]}")
    return made


def _suite(plan: Planned, subject: Subject, settings: Settings, rows: dict[str, Rows | None], models: _Models) -> Path:
    """Every task of one suite, and its result file."""
    began = time.perf_counter()
    path = subject.folder / "eval" / f"{plan.suite.name}-{plan.name}.json"
    kind = KINDS[plan.protocol.kind]
    outcomes: dict[str, Outcome] = {}
    jobs = []
    for name, found in rows.items():
        model, tokenizer, facts = models.get(kind.classes(plan.suite.tasks[name]))
        if settings.batch_size is None:
            settings = replace(settings, batch_size=_batch_size(plan, settings, model))
        job = Job(
            subject=subject,
            suite=plan.suite,
            name=name,
            task=plan.suite.tasks[name],
            protocol=plan.protocol,
            settings=settings,
            model=model,
            tokenizer=tokenizer,
            rows=found,
            partial=Partial(path.with_suffix(f".{name}.partial.jsonl"), _key(plan, settings, facts, name, found)),
        )
        outcomes[name] = kind.run(job)
        jobs.append(job)
    write_json(path, _result(plan, settings, facts, outcomes, time.perf_counter() - began))
    for job in jobs:
        job.partial.end()
    return path


def _batch_size(plan: Planned, settings: Settings, model: Any) -> int:
    """Samples at one time where the user says nothing."""
    if settings.backend == "vllm":
        return SCHEDULED
    return samples_at_a_time(model, KINDS[plan.protocol.kind].writes, plan.protocol.max_new_tokens)


def _key(plan: Planned, settings: Settings, facts: dict[str, Any], name: str, rows: Rows | None) -> dict[str, Any]:
    """Everything that an output depends on."""
    return {
        "suite": [plan.suite.name, plan.suite.version, plan.name, asdict(plan.protocol), name],
        "model": facts,
        "settings": asdict(settings),
        "rows": None if rows is None else rows.fingerprint,
        "torch": torch.__version__,
    }


def _result(
    plan: Planned, settings: Settings, facts: dict[str, Any], outcomes: dict[str, Outcome], seconds: float
) -> dict[str, Any]:
    """The file: what was measured, on what, how, and every sample."""
    scores = {name: score for outcome in outcomes.values() for name, score in outcome.scores.items()}
    firsts = [next(iter(outcome.scores.values())) for outcome in outcomes.values() if outcome.scores]
    if len(firsts) > 1:
        scores = {f"{plan.suite.name} average": average(firsts), **scores}
    skipped = [name for name in plan.suite.tasks if name not in outcomes]
    return {
        "suite": plan.suite.name,
        "version": plan.suite.version,
        "protocol": plan.name,
        **facts,
        "scores": scores,
        "skipped": skipped,
        "notes": [note for outcome in outcomes.values() for note in outcome.notes],
        "rules": asdict(plan.protocol),
        "settings": asdict(settings),
        "versions": versions(),
        "seconds": round(seconds, 2),
        "samples": [sample for outcome in outcomes.values() for sample in outcome.samples],
    }


def _problems(plan: Planned, settings: Settings) -> list[str]:
    """What is missing for a suite, before anything is loaded."""
    kind = plan.protocol.kind
    if kind not in KIND_MODULES:
        return [f"{plan.suite.name}: unknown kind of evaluation {kind!r}. Known: {', '.join(KIND_MODULES)}."]
    try:
        importlib.import_module(f"corelora.evaluate.{KIND_MODULES[kind]}")
    except ModuleNotFoundError as error:
        return [f"{plan.suite.name}: needs the package {error.name}. Install: pip install corelora[evaluate]"]
    if settings.limit is not None and settings.limit < 1:
        return [f"limit must be at least 1, got {settings.limit}"]
    if settings.backend == "vllm" and not KINDS[kind].writes:
        return [
            f"{plan.suite.name}: protocol {plan.name} ({kind}) writes no replies, so --backend vllm can't run it: "
            "take --backend transformers"
        ]
    return KINDS[kind].problems(plan.suite, settings)


def _rows(plan: Planned, say: Callable[[str], None]) -> dict[str, Rows | None]:
    """The rows of each task; a task of several whose rows can't be had is skipped by name.

    Raises:
        CoreLoraError: no task's rows can be had.
    """
    if not KINDS[plan.protocol.kind].reads_rows:
        return dict.fromkeys(plan.suite.tasks)
    found: dict[str, Rows | None] = {}
    problems = []
    for name, task in plan.suite.tasks.items():
        try:
            found[name] = read_rows(task.test, _columns(plan.suite, task.form))
        except CoreLoraError as error:
            problems.append(f"{name}: {error}")
    if not found:
        raise_all(problems, f"suite {plan.suite.name}")
    for problem in problems:
        say(f"{plan.suite.name}: skipped {problem}")
    return found


def _columns(suite: Suite, form: str | None) -> Any:
    if form is None:
        return suite.row_columns
    return GLUE[form].columns


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CoreLoraError(f"{folder}: can't be written ({error.strerror})") from None
