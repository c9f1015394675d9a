"""One task of a suite under one protocol: what every kind of evaluation is handed, and what it hands back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corelora.data.forms import Message
from corelora.data.prompts import PROMPTS
from corelora.data.sources import Rows
from corelora.errors import CoreLoraError
from corelora.evaluate.session import Partial
from corelora.evaluate.subject import Subject
from corelora.evaluate.suites import Protocol, Suite, SuiteTask
from corelora.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user chooses beside suite and protocol.

    Attributes:
        batch_size: samples at one time; None: what fits (fitting.py).
        limit: the first samples only; None for all.
        merge: adapters are merged into the weights.
        unsafe_code: model-written code may run without a sandbox.
        backend: "transformers" or "vllm".
        seed: of drawn replies and resampled errors.
        against: the run whose answers a judge compares these with, for protocols of pairs.
    """

    batch_size: int | None = None
    limit: int | None = None
    merge: bool = True
    unsafe_code: bool = False
    backend: str = "transformers"
    seed: int = 0
    against: str | None = None

    def seed_of(self, names: Sequence[str]) -> int:
        """The random state for what these samples' replies are drawn with: their own, whatever was drawn before."""
        name = f"{self.seed} {' '.join(names)}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


@dataclass(kw_only=True)
class Job:
    """One task to evaluate.

    Attributes:
        name: of the task.
        model, tokenizer: loaded; for a classifier with its head. With vLLM the model is its engine.
        rows: those to evaluate on; None where the harness reads them itself.
        partial: outputs that are there already, and where new ones go.
    """

    subject: Subject
    suite: Suite
    name: str
    task: SuiteTask
    protocol: Protocol
    settings: Settings
    model: Any
    tokenizer: Any
    rows: Rows | None
    partial: Partial

    @property
    def data(self) -> list[dict[str, Any]]:
        """The rows as plain mappings, cut to the limit."""
        assert self.rows is not None
        count = min(len(self.rows), self.settings.limit or len(self.rows))
        return [dict(row) for row in self.rows.dataset.select(range(count))]

    @property
    def batch_size(self) -> int:
        """Samples at one time."""
        assert self.settings.batch_size is not None  # settled when the model was loaded
        return self.settings.batch_size

    def ids(self, count: int) -> list[str]:
        """Names of samples: the task and the row's number, from 1."""
        return [f"{self.name}/{n + 1}" for n in range(count)]

    def prompts(self, data: list[dict[str, Any]]) -> list[str]:
        """The whole text before each reply.

        Raises:
            CoreLoraError: the tokenizer can't write this prompt.
        """
        prompt = PROMPTS[self.protocol.prompt]
        problem = prompt.tokenizer_problem(self.tokenizer)
        if problem:
            raise CoreLoraError(f"{self.suite.name}: {problem}")
        return [prompt.question([_message(self.protocol, row)], self.tokenizer) for row in data]

    @property
    def special_tokens(self) -> bool:
        """Whether the tokenizer adds its begin token to a prompt."""
        return PROMPTS[self.protocol.prompt].special_tokens


@dataclass
class Outcome:
    """What came out of one task: samples with verdicts, and scores by name, the first of them the task's own."""

    samples: list[dict[str, Any]]
    scores: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to evaluate.

    Attributes:
        run: a job to its outcome.
        classes: labels of the model's head for a task, None for a language model.
        reads_rows: rows are read from the task's source; else `run` reads what it needs.
        problems: what is missing before anything is loaded, one sentence each.
        writes: the model writes replies, token by token.
    """

    run: Callable[[Job], Outcome]
    classes: Callable[[SuiteTask], int | None] = lambda task: None
    reads_rows: bool = True
    problems: Callable[[Suite, Settings], list[str]] = lambda suite, settings: []
    writes: bool = False


KINDS: Registry[Kind] = Registry("kind of evaluation")


def _message(protocol: Protocol, row: Mapping[str, Any]) -> Message:
    made: Message = {"role": "user", "content": protocol.question.format(**row)}
    if str(row.get("input") or "").strip():
        made["input"] = row["input"]
    return made
