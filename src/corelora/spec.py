"""The design space as data: four choices make a method, and AdapterSpec is one checked point of that space.

    outer (how A and B begin)  x  core (its structure)  x  train (which of A, core, B learn)  x  start

No tensors here. Shapes: W[o,i], A[r,i], core[r,r], B[o,r]; i in, o out, r outer rank, k inner rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from corelora.errors import raise_all, unknown_name
from corelora.registry import CORE_STARTS, CORES, METHODS, OUTERS, SAMPLINGS

FACTORS = ("A", "core", "B")
STARTS = ("zero", "as_is", "subtract")
SINGULAR_VALUES = ("left", "right", "split")
SLICE_SCALES = ("none", "unit", "orthonormal")
POSITIONS = ("w_a", "w_b", "both")
VARIANTS = ("default", "published")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices that make a method. A user may replace any of them in CoreLoraConfig."""

    outer: str
    core: str
    train: tuple[str, ...]
    start: str
    core_start: str = "kaiming"
    core_std: float | str = 1e-3  # or "1/r"
    sampling: str = "first"
    slice_scale: str = "none"
    pinv_rtol: float | None = 1e-2
    singular_values: str = "left"
    position: str = "w_a"

    def changed(self, **given: Any) -> Choices:
        """These choices with the given ones, those that are not None, in their place."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


CHOICE_NAMES = tuple(f.name for f in fields(Choices))


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published method: a named set of choices, where it comes from, and where our default departs from it.

    Attributes:
        default: what `variant="default"` uses: what measurements support.
        published: what the paper's formulas say, to the letter.
        settings: hyperparameters of the paper, for recipes (learning rate and so on).
    """

    name: str
    title: str
    paper: str
    default: Choices
    published: Choices
    departures: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)

    def choices(self, variant: str) -> Choices:
        """The choices of `variant`: "default" or "published"."""
        return self.published if variant == "published" else self.default


def register_method(
    name: str,
    *,
    title: str,
    paper: str,
    default: Choices,
    published: Choices | None = None,
    departures: str = "none",
    settings: dict[str, Any] | None = None,
) -> Method:
    """Add a method to the table, from inside the package or from outside.

    Args:
        name: what users write in `CoreLoraConfig(method=...)`.
        title: a readable name.
        paper: authors, year, and an address or a section.
        default: the choices of `variant="default"`.
        published: the paper's choices; the default's where it departs in nothing.
        departures: where the default departs from the paper and why.
        settings: the paper's hyperparameters.

    Returns:
        The method.

    Raises:
        CoreLoraError: the name is taken, or the choices don't exist or contradict each other.
    """
    method = Method(
        name=name,
        title=title,
        paper=paper,
        default=default,
        published=published or default,
        departures=departures,
        settings=settings or {},
    )
    problems = [p for variant in VARIANTS for p in choice_problems(method.choices(variant))]
    raise_all(list(dict.fromkeys(problems)), f"method {name!r}")
    return METHODS.add(name, method)


def list_methods() -> list[str]:
    """The names of all registered methods, in alphabetical order."""
    return sorted(METHODS)


def parse_train(value: str | Iterable[str]) -> tuple[str, ...]:
    """`"A core"` or `["A", "core"]` as a tuple in the order A, core, B; unknown words are kept for the check."""
    words = value.replace(",", " ").split() if isinstance(value, str) else list(value)
    known = [f for f in FACTORS if f in words]
    return tuple(known + sorted(set(words) - set(FACTORS)))


def _name_problems(c: Choices) -> list[str]:
    misses = [
        OUTERS.miss(c.outer),
        CORES.miss(c.core),
        CORE_STARTS.miss(c.core_start),
        SAMPLINGS.miss(c.sampling),
    ]
    for kind, value, known in (
        ("start", c.start, STARTS),
        ("singular_values", c.singular_values, SINGULAR_VALUES),
        ("slice_scale", c.slice_scale, SLICE_SCALES),
        ("position", c.position, POSITIONS),
    ):
        misses.append(None if value in known else unknown_name(kind, value, known))
    misses += [unknown_name("factor in `train`", t, FACTORS) for t in c.train if t not in FACTORS]
    if not c.train:
        misses.append("`train` is empty: name at least one of A, core, B.")
    return [m for m in misses if m]


def choice_problems(c: Choices) -> list[str]:
    """Every contradiction in a set of choices, one sentence each; empty where they make an adapter that learns."""
    problems = _name_problems(c)
    if problems:
        return problems
    structure, outer = CORES[c.core], OUTERS[c.outer]
    if c.core == "none" and "core" in c.train and len(c.train) == 1:
        problems.append("`train` names only the core, but `core` is 'none': nothing would learn.")
    if c.core != "none" and c.core_start not in structure.starts:
        problems.append(f"core {c.core!r} can't start as {c.core_start!r}: {', '.join(structure.starts)} can.")
    if c.core_start in ("nystrom", "pinv") and c.core != "none" and c.outer != "nystrom":
        problems.append(f"core_start {c.core_start!r} needs `outer: nystrom`, not {c.outer!r}.")
    if c.core_start == "singular" and c.core != "none" and c.outer not in ("svd", "awsvd"):
        problems.append(f"core_start 'singular' needs `outer: svd` or `awsvd`, not {c.outer!r}.")
    if c.position == "both" and not structure.has_both:
        problems.append(f"position 'both' is for nested and parallel cores, not for {c.core!r}.")
    if c.core_std != "1/r" and not (isinstance(c.core_std, (int, float)) and c.core_std >= 0):
        problems.append(f"core_std must be a number of at least 0, or '1/r', got {c.core_std!r}.")
    if c.pinv_rtol is not None and not 0 <= c.pinv_rtol < 1:
        problems.append(f"pinv_rtol must be in [0, 1), got {c.pinv_rtol}.")
    core_is_zero = structure.zero_start(c.core_start)
    b_decides = outer.zero_b and not (structure.writes_output and c.core_start != "zero_b")
    if c.start == "zero" and not (b_decides or core_is_zero):
        problems.append(
            f"start 'zero' needs a starting product of zero, but outer {c.outer!r} with core_start "
            f"{c.core_start!r} gives another: use 'subtract' or 'as_is'."
        )
    problems += _dead_problems(c, outer.zero_b and not structure.writes_output, core_is_zero)
    if outer.zero_b and structure.writes_output and c.core_start == "zero_b" and c.train == ("A",):
        problems.append("B and the branch beside it start at zero and are not trained: the adapter could do nothing.")
    return problems


def _dead_problems(c: Choices, b_is_zero: bool, core_is_zero: bool) -> list[str]:
    """Where two factors of a product are zero at once, or the only zero one is frozen, no gradient ever flows."""
    if b_is_zero and "B" not in c.train:
        return [f"B starts at zero under outer {c.outer!r} and is not trained: the adapter could do nothing."]
    if core_is_zero and "core" not in c.train:
        return ["the core starts at zero and is not trained: the adapter could do nothing."]
    if b_is_zero and core_is_zero:
        return ["B and the core both start at zero: neither would ever get a gradient."]
    return []


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """One adapter on one weight: the choices, the ranks and the scale. Checks itself.

    Attributes:
        r: outer rank, already clipped to the layer where the user asked for that.
        inner_r: inner rank k of nested and parallel cores.
        scale: what the adapter's product is multiplied by (alpha / r, or alpha / sqrt(r)).
        dropout: probability that an input feature is dropped before A, in training.
        seed: seed of sampled indices, frozen random factors and randomised decompositions.
        store_outer: keep frozen outer factors in the adapter's file, rather than making them again at load; None
            stores decompositions and random factors, and slices where the base is quantised.
        svd_solver: "auto", "exact" or "randomized".
        stats_power: exponent of the mean absolute input in AwSVD's scaling; 0.5 is the paper's Eq. 3.
    """

    choices: Choices
    r: int
    inner_r: int
    scale: float
    dropout: float = 0.0
    seed: int = 0
    store_outer: bool | None = None
    svd_solver: str = "auto"
    stats_power: float = 0.5

    def __post_init__(self) -> None:
        raise_all(choice_problems(self.choices) + self.rank_problems(), "adapter settings")

    def rank_problems(self) -> list[str]:
        """Every contradiction among the numbers."""
        problems = []
        if self.r < 1:
            problems.append(f"r must be at least 1, got {self.r}.")
        if CORES[self.choices.core].uses_inner_r and not 1 <= self.inner_r <= max(self.r, 1):
            problems.append(f"inner_r (k) must be between 1 and r = {self.r}, got {self.inner_r}.")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}.")
        return problems

    def trains(self, part: str) -> bool:
        """Whether the part "A", "core" or "B" learns."""
        return part in self.choices.train

    @property
    def subtracts(self) -> bool:
        """Whether trained factors are kept as offsets from their start (DESIGN: `start: subtract`)."""
        return self.choices.start == "subtract"
