"""Core structures: which factors stand between A[r,i] and B[o,r], in which order, and how they begin.

A structure is a chain of stages from input to output. A stage is a factor's name, or `Par`: branches that share an
input and whose outputs add up. The same chain is read twice, on features (the path) and on matrices (the delta).

    none        A, B
    diagonal    A, core[r], B
    dense       A, core[r,r], B
    nested      A, core_a[k,r], core_b[r,k], B              (A', B' of the NoRA paper, Eq. 2)
    parallel_b  A, B + core_b[o,k] core_a[k,r]              (NoRA paper, Eq. 8: (B + C A') A)
    parallel_a  A + core_b[r,k] core_a[k,i], B              (its mirror: B (A + C A'))

Position `both` puts two nested cores in a row (core_*, then core2_*), or a parallel branch at each end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corelora.errors import CoreLoraError
from corelora.outer import OuterStart, kaiming_uniform
from corelora.registry import CORE_STARTS, CORES
from corelora.spec import AdapterSpec

Dims = dict[str, int]  # o, i, r, k


@dataclass(frozen=True)
class Slot:
    """One factor: its name, its shape in letters of {o, i, r, k}, and the part (A, core or B) that it belongs to."""

    name: str
    rows: str
    cols: str
    part: str = "core"
    diagonal: bool = False

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """[rows, cols], or [r] for a diagonal."""
        return (dims[self.rows],) if self.diagonal else (dims[self.rows], dims[self.cols])


@dataclass(frozen=True)
class Par:
    """Branches that share an input; each is a chain of factor names, and their outputs add up."""

    branches: tuple[tuple[str, ...], ...]


Stage = str | Par
SLOT_A, SLOT_B = Slot("A", "r", "i", "A"), Slot("B", "o", "r", "B")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """An entry of the CORES table.

    Attributes:
        slots: the core's own factors at positions w_a and w_b.
        stages: the chain, A and B included.
        both_slots, both_stages: the same at position `both`; empty where there is none.
        starts: names of core starts that fit.
        zero_starts: those under which the starting product is zero whatever A and B are.
        cut: how many stages belong to the right half of the effective pair left[o,q], right[q,i].
        writes_output: a branch reaches the output past B.
    """

    name: str
    slots: tuple[Slot, ...]
    stages: tuple[Stage, ...]
    starts: tuple[str, ...]
    zero_starts: tuple[str, ...] = ()
    both_slots: tuple[Slot, ...] = ()
    both_stages: tuple[Stage, ...] = ()
    cut: int = 1
    writes_output: bool = False

    @property
    def has_both(self) -> bool:
        """Whether position `both` exists."""
        return bool(self.both_stages)

    @property
    def uses_inner_r(self) -> bool:
        """Whether the inner rank k matters."""
        return any("k" in (s.rows, s.cols) for s in self.slots)

    def zero_start(self, core_start: str) -> bool:
        """Whether the starting product is zero by the core alone."""
        return core_start in self.zero_starts

    def at(self, position: str) -> tuple[tuple[Slot, ...], tuple[Stage, ...]]:
        """(all slots with A and B, stages) at a position."""
        slots, stages = (self.both_slots, self.both_stages) if position == "both" else (self.slots, self.stages)
        return (SLOT_A, *slots, SLOT_B), stages


def _register(structure: Structure) -> Structure:
    return CORES.add(structure.name, structure)


_SQUARE = ("kaiming", "gaussian", "singular", "nystrom", "pinv", "orthogonal", "identity", "zeros")
_TWO = ("zero_b", "gaussian", "kaiming", "orthogonal")
_NESTED = (Slot("core_a", "k", "r"), Slot("core_b", "r", "k"))
_SECOND = (Slot("core2_a", "k", "r"), Slot("core2_b", "r", "k"))
_SIDE_A = (Slot("core_a", "k", "i"), Slot("core_b", "r", "k"))

NONE = _register(Structure(name="none", slots=(), stages=("A", "B"), starts=(*_SQUARE, "zero_b")))
DIAGONAL = _register(
    Structure(
        name="diagonal",
        slots=(Slot("core", "r", "r", diagonal=True),),
        stages=("A", "core", "B"),
        starts=("gaussian", "singular", "identity", "zeros"),
        zero_starts=("zeros",),
    )
)
DENSE = _register(
    Structure(
        name="dense",
        slots=(Slot("core", "r", "r"),),
        stages=("A", "core", "B"),
        starts=_SQUARE,
        zero_starts=("zeros",),
    )
)
NESTED = _register(
    Structure(
        name="nested",
        slots=_NESTED,
        stages=("A", "core_a", "core_b", "B"),
        starts=(*_TWO, "singular"),
        zero_starts=("zero_b",),
        both_slots=_NESTED + _SECOND,
        both_stages=("A", "core_a", "core_b", "core2_a", "core2_b", "B"),
        cut=2,
    )
)
PARALLEL_B = _register(
    Structure(
        name="parallel_b",
        slots=(Slot("core_a", "k", "r"), Slot("core_b", "o", "k")),
        stages=("A", Par((("B",), ("core_a", "core_b")))),
        starts=_TWO,
        both_slots=(*_SIDE_A, Slot("core2_a", "k", "r"), Slot("core2_b", "o", "k")),
        both_stages=(Par((("A",), ("core_a", "core_b"))), Par((("B",), ("core2_a", "core2_b")))),
        writes_output=True,
    )
)
PARALLEL_A = _register(
    Structure(
        name="parallel_a",
        slots=_SIDE_A,
        stages=(Par((("A",), ("core_a", "core_b"))), "B"),
        starts=_TWO,
        both_slots=PARALLEL_B.both_slots,
        both_stages=PARALLEL_B.both_stages,
    )
)

CoreStartFunction = Callable[[Slot, tuple[int, ...], AdapterSpec, OuterStart], Tensor]


def core_start(name: str) -> Callable[[CoreStartFunction], CoreStartFunction]:
    """Decorator that adds a function (slot, shape, spec, outer start) -> tensor to the CORE_STARTS table."""

    def add(make: CoreStartFunction) -> CoreStartFunction:
        return CORE_STARTS.add(name, make)

    return add


@core_start("kaiming")
def _kaiming(slot: Slot, shape: tuple[int, ...], spec: AdapterSpec, outer: OuterStart) -> Tensor:
    return kaiming_uniform((shape[0], shape[1]))


@core_start("gaussian")
def _gaussian(slot: Slot, shape: tuple[int, ...], spec: AdapterSpec, outer: OuterStart) -> Tensor:
    std = 1 / spec.r if spec.choices.core_std == "1/r" else float(spec.choices.core_std)
    return torch.randn(shape) * std


@core_start("zeros")
def _zeros(slot: Slot, shape: tuple[int, ...], spec: AdapterSpec, outer: OuterStart) -> Tensor:
    return torch.zeros(shape)


@core_start("identity")
def _identity(slot: Slot, shape: tuple[int, ...], spec: AdapterSpec, outer: OuterStart) -> Tensor:
    return torch.ones(shape) if slot.diagonal else torch.eye(*shape)


@core_start("zero_b")
def _zero_b(slot: Slot, shape: tuple[int, ...], spec: AdapterSpec, outer: OuterStart) -> Tensor:
    """A' Kaiming, B' (or C) zero. With two nested cores the last B' is zero and the first core Kaiming."""
    last_b = "core2_b" if spec.choices.position == "both" and spec.choices.core == "nested" else None
    is_zero = slot.name == last_b if last_b else slot.name.endswith("_b")
    return torch.zeros(shape) if is_zero else kaiming_uniform((shape[0], shape[1]))


@core_start("singular")
def _singular(slot: Slot, shape: tuple[int, ...], spec: AdapterSpec, outer: OuterStart) -> Tensor:
    """diag(S_r), cut to the slot's shape (NoRA paper, Table 5: diag(Sigma_r) for A' and B' alike)."""
    if outer.singular is None:
        raise CoreLoraError("core_start 'singular' needs an outer start with singular values")
    if slot.diagonal:
        return outer.singular
    full = torch.zeros(shape, device=outer.singular.device)
    n = min(shape)
    full[torch.arange(n), torch.arange(n)] = outer.singular[:n]
    return full


def _first_core(slot: Slot, shape: tuple[int, ...], spec: AdapterSpec, outer: OuterStart) -> Tensor:
    if outer.core is None:
        raise CoreLoraError(f"core_start {spec.choices.core_start!r} needs an outer start that offers a core")
    return outer.core


# `nystrom` keeps W[I, J], `pinv` its pseudo-inverse; outer.nystrom has made whichever was asked for.
CORE_STARTS.add("nystrom", _first_core)
CORE_STARTS.add("pinv", _first_core)


@core_start("orthogonal")
def _orthogonal(slot: Slot, shape: tuple[int, ...], spec: AdapterSpec, outer: OuterStart) -> Tensor:
    return torch.nn.init.orthogonal_(torch.empty(shape))


def slot_starts(slots: tuple[Slot, ...], dims: Dims, spec: AdapterSpec, outer: OuterStart) -> dict[str, Tensor]:
    """The first value of each core factor among `slots`, by name."""
    make = CORE_STARTS[spec.choices.core_start]
    return {s.name: make(s, s.shape(dims), spec, outer) for s in slots if s.part == "core"}
