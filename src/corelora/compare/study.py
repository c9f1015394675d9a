"""A study's file: recipes, the axes along which runs differ, and who gets more seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corelora.errors import CoreLoraError, raise_all, unknown_name
from corelora.evaluate.suites import load_suite, suite_names, with_data
from corelora.recipe.tree import load_recipe, setting

# What an axis may be called instead of the recipe's key.
SHORT = {
    "method": "method.name",
    "variant": "method.variant",
    "rank": "method.r",
    "inner_rank": "method.inner_r",
    "lr": "optim.lr",
    "optimizer": "optim.name",
    "outer": "method.outer",
    "core": "method.core",
    "core_start": "method.core_start",
    "start": "method.start",
    "sampling": "method.sampling",
    "slice_scale": "method.slice_scale",
    "position": "method.position",
}
RATE = SHORT["lr"]
BEST = ("lowest", "highest")
EVALUATED = "eval/"  # begins the scores of evaluations, `eval/SUITE-PROTOCOL: SCORE`
# Words in a score's name that say what is best.
LOW_WORDS = ("loss", "perplexity", "error", "seconds", "memory")
HIGH_WORDS = ("accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "pass", "score", "per_second")
CLAIMS = ("better", "as_good", "near", "wider_rates")


@dataclass(kw_only=True)
class Published:
    """Figures that a paper prints for the same comparison."""

    file: str = setting("A JSON file of docs/published, found relative to the study.")
    where: dict[str, Any] = setting("Only rows of that file with these values, such as `model: LLaMA-2-7B`.", dict)
    columns: dict[str, str] = setting(
        "Columns of that file, and the figure of a run that each is beside: `test_accuracy` of results.json, or "
        "`eval/gsm8k-paper: gsm8k (gsm8k_paper)` as SUITE-PROTOCOL and score."
    )
    scale: float = setting("What our figure is multiplied with to be in the paper's units; 100 for percent.", 100.0)


@dataclass(kw_only=True)
class Finalists:
    """Which runs of a group's first seed are repeated with more seeds."""

    seeds: list[int] = setting("Further seeds.", list)
    top: int | None = setting(
        "Only so many, the best ones; each compared setting, at its best tuned value, if not given.", None
    )
    always: list[dict[str, Any]] = setting(
        "Settings that stay whatever came out, `{method: nlora}`, such as the default.", list
    )
    set: dict[str, Any] = setting(
        "Recipe keys of the finalists' own runs, every seed: `data.test.split: test` where rates are tuned on another "
        "split. Their scores alone are then compared.",
        dict,
    )
    suites: list[str] = setting("Suites that the finalists are evaluated on, all seeds.", list)
    protocol: str | None = setting("Protocol of these suites; each one's own default if not given.", None)
    data: list[str] = setting("Local rows for the suites, as after `corelora evaluate --data`.", list)
    limit: int | None = setting("Samples of each task, the first ones; all if not given.", None)
    updates: bool = setting("Measure norms and spectra of what the finalists learned, with the first seed.", False)

    def problems(self) -> list[str]:
        """Seeds twice, nobody chosen."""
        found = [f"seeds: {n} is given twice" for n in _twice(self.seeds)]
        if self.top is not None and self.top < 1:
            found.append(f"top: at least 1 is expected, got {self.top}")
        return found


@dataclass(kw_only=True)
class Group:
    """Runs over a grid of axes, and what is left open between them."""

    name: str = setting("The report's heading.")
    about: str = setting("What is asked, and what is held fixed.", "")
    recipe: str | None = setting("In place of the study's.", None)
    set: dict[str, Any] = setting("Recipe keys over the study's: `loop.steps: 200`.", dict)
    axes: dict[str, Any] = setting(
        "What differs: a list of values of a recipe key (or a short name: method, rank, lr, ...), or of names with the "
        "keys that each stands for: `LoRA+: {method.name: lora, optim.name: lora_plus}`."
    )
    tune: list[str] = setting(
        "Axes that are searched, not compared: each compared setting is judged at its best.", list
    )
    begin: list[float] = setting(
        "Of the tuned learning rates, those that are tried first; each setting then goes on to the next one above or "
        "below, while the best, or (where the loss decides) one within 1 % of it, is the highest or lowest tried. "
        "All if not given.",
        list,
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of every run; 0 if not given."})
    finalists: Finalists | None = setting("Who gets more seeds.", None)
    score: str | None = setting("In place of the study's.", None)
    best: str | None = setting("In place of what the score's name, or the study, says.", None, choices=BEST)
    published: Published | None = setting("What a paper prints for it.", None)

    def problems(self) -> list[str]:
        """Axes without values, tuned ones that are no axes, seeds that repeat, settings that stay and are none."""
        found = [] if self.axes else ["axes: none is given"]
        found += [] if self.seeds else ["seeds: none is given"]
        found += [f"seeds: {n} is given twice" for n in _twice(self.seeds)]
        found += [
            f"axes.{a}: a list of values, or names with keys, is expected" for a, v in self.axes.items() if not _fine(v)
        ]
        found += [
            f"tune: {a!r} is no axis of this group. Axes: {', '.join(self.axes)}."
            for a in self.tune
            if a not in self.axes
        ]
        found += _wrong_begin(self)
        final = self.finalists
        if final is not None:
            again = sorted(set(final.seeds) & set(self.seeds))
            found += [f"finalists.seeds: {again} are seeds of every run already"] if again else []
            found += [f"finalists.always: {p}" for given in final.always for p in _not_compared(self, given)]
        return found


@dataclass(kw_only=True)
class Question:
    """A claim about two settings of a group, answered from their runs: yes, within noise, or no."""

    ask: str = setting("The question, in words.")
    group: str | None = setting("Whose settings these are; the first group's if not given.", None)
    subject: dict[str, Any] = setting("The setting that the claim is about: `{method: NLoRA}`.")
    other: dict[str, Any] = setting("The one that it is held against.")
    claim: str = setting(
        "`better`; `as_good` (not worse); `near` (`by` away at most); `wider_rates` (its range of usable learning "
        "rates is the wider one).",
        choices=CLAIMS,
    )
    by: float = setting("For `near`: the distance in the score's units.", 0.0)

    def problems(self) -> list[str]:
        """A setting held against itself, a distance below zero."""
        found = ["other: it is the subject itself"] if self.subject == self.other else []
        return found + ([f"by: at least 0 is expected, got {self.by}"] if self.by < 0 else [])


@dataclass(kw_only=True)
class Study:
    """Groups of runs."""

    about: str = setting("What the study is for.", "")
    recipe: str = setting("The recipe that all runs share, a file found relative to this one.")
    set: dict[str, Any] = setting("Recipe keys over it.", dict)
    score: str = setting("The figure of results.json that decides.", "test_loss")
    best: str | None = setting(
        "Whether the lowest or the highest is best; told from the score's name (loss, accuracy, ...) if not given.",
        None,
        choices=BEST,
    )
    groups: list[Group] = setting("What is compared: grids of runs, each with a heading of its own.")
    questions: list[Question] = setting("Claims about two settings, which the report answers.", list)

    def problems(self) -> list[str]:
        """Two groups of one name, none at all; questions about settings that there are not."""
        names = [g.name for g in self.groups]
        found = [] if names else ["groups: none is given"]
        found += [f"groups: two are called {n!r}" for n in sorted({n for n in names if names.count(n) > 1})]
        unknown = dict.fromkeys(self.score_of(g)[0] for g in self.groups if self._best_of(g) is None)
        found += [
            f"best: the name {score!r} does not say whether the lowest or the highest is best" for score in unknown
        ]
        return found + [f"questions[{n}].{p}" for n, q in enumerate(self.questions) for p in self._unanswerable(q)]

    def group_of(self, question: Question) -> Group:
        """The group that a question is about."""
        return next(g for g in self.groups if question.group in (None, g.name))

    def _unanswerable(self, question: Question) -> list[str]:
        names = [g.name for g in self.groups]
        if not names or question.group not in (None, *names):
            return [f"group: {unknown_name('group', question.group, names)}"]
        both = {"subject": question.subject, "other": question.other}
        return [f"{name}: {p}" for name, given in both.items() for p in _not_compared(self.group_of(question), given)]

    def score_of(self, group: Group) -> tuple[str, bool]:
        """(the deciding figure, whether lower is better) of one of its groups."""
        return group.score or self.score, self._best_of(group) == "lowest"

    def _best_of(self, group: Group) -> str | None:
        """`lowest` or `highest`; a group's own score is not what the study's `best` was said of."""
        score = group.score or self.score
        said = group.best or (self.best if score == self.score else None)
        return said or _told_by(score)


def _told_by(score: str) -> str | None:
    """What a score's name says of it; None where it says nothing. Those of evaluations are shares and marks."""
    name = score.lower()
    if name.startswith(EVALUATED):
        return "highest"
    if any(word in name for word in LOW_WORDS):
        return "lowest"
    return "highest" if any(word in name for word in HIGH_WORDS) else None


def _not_compared(group: Group, given: dict[str, Any]) -> list[str]:
    """What of a setting no run of the group has: axes that are not compared, values that are not on them."""
    compared = [axis for axis in group.axes if axis not in group.tune]
    return [
        f"{axis!r} is not compared here. Compared: {', '.join(compared)}." for axis in given if axis not in compared
    ] + [
        unknown_name(f"value of {axis}", label(value), labels(group.axes[axis]))
        for axis, value in given.items()
        if axis in compared and _fine(group.axes[axis]) and label(value) not in labels(group.axes[axis])
    ]


def load_study(path: Path, overrides: Sequence[str] = (), data: Sequence[str] = ()) -> Study:
    """Read a study.

    Args:
        path: its file.
        overrides: recipe keys over those of all runs, as after `--set`.
        data: local rows for all suites, as after `corelora evaluate --data`.

    Raises:
        CoreLoraError: every mistake at once.
    """
    study = load_recipe(Study, path, [f"set.{text}" for text in overrides])
    missing = [r for r in _recipes(study) if not (path.parent / r).is_file()]
    problems = [f"recipe: {r} is no file beside {path.name}" for r in missing]
    problems += _hand_out(study, data)
    for group in study.groups:
        problems += [f"{group.name}: finalists: {p}" for p in _wrong_suites(group.finalists)]
        problems += [f"{group.name}: published: {p}" for p in _wrong_published(group.published, path.parent)]
    raise_all(problems, str(path))
    return study


def label(value: Any) -> str:
    """A value of an axis as tables show it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def labels(values: Any) -> list[str]:
    """All of an axis."""
    return [label(value) for value in values]


def _recipes(study: Study) -> list[str]:
    """Every recipe that a study names, in named values too."""
    named = [
        keys.get("recipe")
        for group in study.groups
        for values in group.axes.values()
        if isinstance(values, dict)
        for keys in values.values()
    ]
    return [str(r) for r in dict.fromkeys([study.recipe, *(g.recipe for g in study.groups), *named]) if r]


def _hand_out(study: Study, data: Sequence[str]) -> list[str]:
    """Give each group the local rows that its suites can use; what no suite of the study can is wrong."""
    known: set[str] = set()
    for final in (group.finalists for group in study.groups if group.finalists is not None and group.finalists.suites):
        suites = [load_suite(name) for name in final.suites if name in suite_names() or Path(name).is_file()]
        names = {f"{task}{end}" for suite in suites for task in suite.tasks for end in ("", ".train")}
        final.data += [text for text in data if "=" not in text or text.partition("=")[0] in names]
        known |= names
    unused = [name for text in data if (name := text.partition("=")[0]) not in known and "=" in text]
    return [f"--data {name}=...: {unknown_name('task', name, known)}" for name in unused]


def _wrong_suites(final: Finalists | None) -> list[str]:
    """What can't be evaluated: said before anything runs, not when the finalists are there."""
    found: list[str] = []
    suites = []
    for name in final.suites if final is not None else ():
        try:
            suites.append(load_suite(name))
            suites[-1].protocol(final.protocol if final else None)
        except CoreLoraError as error:
            found.append(str(error))
    try:
        if final is not None and len(suites) == len(final.suites):
            with_data(suites, final.data)
    except CoreLoraError as error:
        found.append(str(error))
    return found


def _wrong_published(published: Published | None, where: Path) -> list[str]:
    """A file that is not there, columns and labels that none of its rows has."""
    if published is None:
        return []
    try:
        data = json.loads((where / published.file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{published.file} can't be read ({error})"]
    known = sorted({key for row in data["rows"] for key in row} - {"values"})
    found = [unknown_name("column", c, data["columns"]) for c in published.columns if c not in data["columns"]]
    return found + [f"where: {unknown_name('label', key, known)}" for key in published.where if key not in known]


def _wrong_begin(group: Group) -> list[str]:
    """Rates to begin with that are not among those tuned."""
    axis = next((a for a in group.tune if SHORT.get(a, a) == RATE), None)
    if not group.begin or (axis in group.axes and not _fine(group.axes[axis])):
        return []
    if axis is None or axis not in group.axes or isinstance(group.axes[axis], dict):
        return ["begin: these are rates of a tuned axis: add `tune: [lr]`, and `lr` with a list of rates to axes"]
    known = [float(value) for value in group.axes[axis]]
    return [f"begin: {rate:g} is not among the rates, {labels(known)}" for rate in group.begin if rate not in known]


def _twice(seeds: Sequence[int]) -> list[int]:
    return sorted({n for n in seeds if list(seeds).count(n) > 1})


def _fine(values: Any) -> bool:
    if isinstance(values, list):
        return bool(values)
    return isinstance(values, dict) and bool(values) and all(isinstance(v, dict) for v in values.values())
