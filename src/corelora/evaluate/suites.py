"""Suites as data: corelora/tasks/suites/*.yaml, each with a version, its tasks and its protocols.

A protocol is a way to ask and to judge. `paper` is what the NLoRA and NoRA papers do (their prompt, greedy, their
answer rule), `harness` what EleutherAI's lm-evaluation-harness does; a result always names the one it is from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from corelora.data.columns import KINDS, Column
from corelora.errors import CoreLoraError, nearest, raise_all, unknown_name
from corelora.recipe.schema import SourcePart
from corelora.recipe.tree import load_recipe, setting

FOLDER = Path(__file__).resolve().parents[1] / "tasks" / "suites"


@dataclass(kw_only=True)
class SuiteTask:
    """One data set of a suite."""

    test: SourcePart = setting("Rows to evaluate on.")
    train: SourcePart | None = setting("Rows that worked examples are taken from.", None)
    file: str | None = setting("Where the rows lie in a folder of local data (`--data FOLDER`).", None)
    train_file: str | None = setting("The same for `train`.", None)
    form: str | None = setting("For classifiers: the GLUE task.", None)
    harness: str | None = setting("Name of the task in lm-evaluation-harness.", None)


@dataclass(kw_only=True)
class Protocol:
    """How a suite is asked and judged."""

    kind: str = setting("generate, code, likelihood, classify, harness or judge.")
    prompt: str = setting("Prompt around a question: paper, chat, plain.", "paper", choices=("paper", "chat", "plain"))
    question: str = setting("The question, made from a row's columns: `{question}`.", "{question}")
    readers: list[str] = setting("Answer readers (tasks/answers.py); the first gives the suite's score.", list)
    max_new_tokens: int = setting("Tokens of a reply at most.", 512)
    stops: list[str] = setting("Texts that end a reply.", list)
    samples: int = setting("Replies to each question; more than one are drawn at `temperature`.", 1)
    temperature: float = setting("Of drawn replies; greedy where there is one reply.", 0.0)
    program: str | None = setting("For code: `humaneval` or `mbpp`.", None, choices=("humaneval", "mbpp"))


@dataclass(kw_only=True)
class Suite:
    """A benchmark, or several that belong together."""

    name: str = setting("Its name.")
    version: int = setting("Raised with every change that can change a score.")
    about: str = setting("What it is, and where its rules come from.")
    columns: dict[str, str] = setting("Columns of its rows and their kinds: text, whole, number, texts.", dict)
    tasks: dict[str, SuiteTask] = setting("Its data sets.", dict)
    protocols: dict[str, Protocol] = setting("Ways to ask and judge; the first is the default.")

    def problems(self) -> list[str]:
        """Kinds of columns that don't exist, a suite without tasks."""
        found = [unknown_name(f"kind of column {n!r}", k, KINDS) for n, k in self.columns.items() if k not in KINDS]
        return found + ([] if self.tasks else ["tasks: there is none"])

    @property
    def row_columns(self) -> dict[str, Column]:
        """What a row must have; texts may be empty (an instruction's input often is)."""
        return {n: Column(kind=k, empty=True, optional=n == "input") for n, k in self.columns.items()}

    def protocol(self, name: str | None) -> tuple[str, Protocol]:
        """A protocol by name; the default where None.

        Raises:
            CoreLoraError: the suite has no such protocol.
        """
        name = name or next(iter(self.protocols))
        if name not in self.protocols:
            raise CoreLoraError(f"suite {self.name}: {unknown_name('protocol', name, self.protocols)}")
        return name, self.protocols[name]


@cache
def suite_names() -> tuple[str, ...]:
    """All suites that there are."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.yaml")))


def load_suite(name: str) -> Suite:
    """A suite by name, or by the path of a YAML file.

    Raises:
        CoreLoraError: there is none; the file has mistakes.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise CoreLoraError(unknown_name("suite", name, suite_names()))
    return load_recipe(Suite, path)


def with_data(suites: Sequence[Suite], given: Sequence[str]) -> list[Suite]:
    """Suites with their rows taken from where the user says.

    Args:
        suites: as loaded.
        given: `FOLDER`, in which each task's `file` is looked up, or `TASK=PATH` and `TASK.train=PATH`.

    Raises:
        CoreLoraError: a task that no suite has; a folder that is not there.
    """
    folders = [Path(g).expanduser() for g in given if "=" not in g]
    paths = dict(g.split("=", 1) for g in given if "=" in g)
    known = {f"{task}{end}" for s in suites for task in s.tasks for end in ("", ".train")}
    problems = [f"--data {f}: no such folder" for f in folders if not f.is_dir()]
    for name in paths:
        if name not in known:
            guess = nearest(name, known)
            problems.append(f"--data {name}=...: no such task.{f' Did you mean {guess!r}?' if guess else ''}")
    raise_all(problems, "--data")
    return [replace(s, tasks={n: _placed(n, t, folders, paths) for n, t in s.tasks.items()}) for s in suites]


def _placed(name: str, task: SuiteTask, folders: list[Path], paths: Mapping[str, str]) -> SuiteTask:
    """One task with local files in place of its hub sets where there are any."""
    changes: dict[str, Any] = {}
    for part, file, key in (("test", task.file, name), ("train", task.train_file, f"{name}.train")):
        found = next((str(f / file) for f in folders if file and (f / file).is_file()), None)
        path = paths.get(key, found)
        if path is not None:
            changes[part] = SourcePart(path=path, split=part)
    return replace(task, **changes)
