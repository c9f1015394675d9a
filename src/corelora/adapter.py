"""CoreAdapter: one adapter on one weight. Which factors there are, how they begin, the path and the delta.

The factors themselves live in the layer that wraps the weight (PEFT wants one ModuleDict for each name); a CoreAdapter
is what is known about them, and is handed a mapping from factor names to modules.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corelora.core import Dims, Par, Slot, Stage, slot_starts
from corelora.errors import CoreLoraError
from corelora.factor import Factor, FactorPlan, Pair, add
from corelora.layers import View
from corelora.outer import OuterStart, kaiming_uniform, nystrom_at
from corelora.registry import CORES, OUTERS
from corelora.spec import AdapterSpec
from corelora.storage import BaseWeight

Factors = Mapping[str, Factor]


@dataclass(frozen=True)
class CoreAdapter:
    """One adapter on one weight W[o,i].

    Attributes:
        spec: the choices, ranks and scale.
        view: the layer's view.
        plans: the plan of each factor, in the order of the chain.
    """

    spec: AdapterSpec
    view: View
    plans: dict[str, FactorPlan]

    @classmethod
    def of(cls, spec: AdapterSpec, view: View) -> CoreAdapter:
        """Decide what each factor of `spec` is on a layer with this view."""
        slots, stages = CORES[spec.choices.core].at(spec.choices.position)
        o, i = view.shape
        dims: Dims = {"o": o, "i": i, "r": spec.r, "k": spec.inner_r}
        subtracts = spec.subtracts and not _product_starts_at_zero(spec)
        offsets = {s.name for s in slots if subtracts and spec.trains(s.part)}
        needs_value = _who_needs_value(stages, offsets) if subtracts else {s.name for s in slots}
        has_diff = _who_sees_diff(stages, offsets)
        plans = {}
        for slot in slots:
            trained = spec.trains(slot.part)
            plans[slot.name] = FactorPlan(
                shape=slot.shape(dims),
                trained=trained,
                offset=slot.name in offsets,
                source=_slice_source(spec, slot),
                needs_start=(not trained or slot.name in offsets)
                and (slot.name in needs_value or slot.name in has_diff),
                needs_value=slot.name in needs_value,
                view=view if slot.cols == "i" else None,
            )
        return cls(spec, view, plans)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The chain from input to output."""
        return CORES[self.spec.choices.core].at(self.spec.choices.position)[1]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All factors with their shapes in letters."""
        return CORES[self.spec.choices.core].at(self.spec.choices.position)[0]

    def slot(self, name: str) -> Slot:
        """The factor called `name`, with its shape in letters."""
        return next(s for s in self.slots if s.name == name)

    @property
    def has_offsets(self) -> bool:
        """Trained factors are offsets, so the output is the difference d of the chain and not its value v."""
        return any(p.offset for p in self.plans.values())

    @property
    def reads_weight(self) -> bool:
        """Some start is a slice of the base weight."""
        return any(p.source and p.needs_start for p in self.plans.values())

    def trained_parameters(self) -> int:
        """How many numbers this adapter trains."""
        return sum(_numel(p.shape) for p in self.plans.values() if p.trained)

    # -- starting ------------------------------------------------------------------------------------------------

    def start(self, weight: BaseWeight, found: Any, key: str, init: bool = True) -> dict[str, Factor]:
        """Make the factors and give them their first values.

        Args:
            weight: the base weight; starts read it in float32.
            found: what was measured on this layer (`Outer.stats`), or None.
            key: the layer's name; with `spec.seed` it seeds whatever is sampled.
            init: False gives random non-zero trained factors (PEFT's `init_weights=False`).

        Returns:
            The factors by name, on the weight's device.
        """
        outer = OUTERS[self.spec.choices.outer].make(weight, self.spec, found, self._generator(key))
        values = self.first_values(outer)
        factors = {name: Factor(plan) for name, plan in self.plans.items()}
        native = weight.native()
        for name, factor in factors.items():
            self._fill(factor, values.get(name), outer, weight, name)
            if factor.plan.trained:
                factor.set_trained(self._trained_start(factor, values.get(name), weight, outer, init))
            factor.to(native.device)
            if native.is_floating_point():
                _cast(factor, native.dtype)
        remade = self.remade(weight)
        for name in remade:
            factors[name].set_probe(factors[name].probe_now(), outer.channel_scale if name == remade[0] else None)
        return factors

    def _generator(self, key: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.spec.seed} {key}".encode()))  # PyTorch takes 32 bits

    def remade(self, weight: BaseWeight) -> list[str]:
        """The frozen outer factors that the file leaves out and a load computes again, checked by their probes."""
        return [
            n
            for n in ("A", "B")
            if self.plans[n].needs_start and self.plans[n].source is None and not self.stores(n, weight)
        ]

    @property
    def keeps_indices(self) -> bool:
        """Sampled slices that take part in the path: the file says which rows and columns they are."""
        choices = self.spec.choices
        sampled = choices.outer == "nystrom" and choices.sampling != "first"
        return sampled and any(p.needs_start for p in self.plans.values())

    def empty(self, weight: BaseWeight) -> dict[str, Factor]:
        """Factors without a start, for values that come from a file: all NaN until then, so that a gap is seen."""
        device = next(iter(weight.layer.parameters(recurse=False))).device
        dtype = weight.float_dtype
        factors = {name: Factor(plan) for name, plan in self.plans.items()}
        remade = self.remade(weight)
        for name, factor in factors.items():
            plan = factor.plan
            if plan.trained:
                factor.set_trained(torch.full(plan.shape, torch.nan, device=device, dtype=dtype))
            if plan.source and self.keeps_indices:
                r = self.spec.r
                factor.set_slice(torch.full((r,), -1, dtype=torch.int32, device=device), None)
            if name in remade:
                with_d = OUTERS[self.spec.choices.outer].needs_stats and name == remade[0]
                nan = torch.full((self.spec.r + self.view.shape[1],), torch.nan, device=device)
                factor.set_probe(nan[: self.spec.r].clone(), nan[self.spec.r :].clone() if with_d else None)
            if self.stores(name, weight):
                factor.set_start(torch.full(plan.shape, torch.nan, device=device, dtype=dtype), persistent=True)
        return factors

    def first_values(self, outer: OuterStart) -> dict[str, Tensor | None]:
        """The first value of each factor; None where it is a slice of W."""
        return {"A": outer.A, "B": outer.B, **slot_starts(self.slots, self._dims, self.spec, outer)}

    def stores(self, name: str, weight: BaseWeight) -> bool:
        """Whether the start of factor `name` is kept in the adapter's file."""
        plan, asked = self.plans[name], self.spec.store_outer
        if not plan.needs_start:
            return False
        if plan.source is not None:
            return bool(weight.is_quantized if asked is None else asked)
        if self.follows_slices(name):
            return weight.is_quantized and asked is not False
        if name in ("A", "B"):
            return asked is not False
        return True

    def derive(self, weight: BaseWeight, factors: Factors, key: str) -> None:
        """Make again what the file does not hold: slices' transforms, the first core, unstored outer factors.

        Runs after a load, on the base weight; trained factors are left alone.

        Args:
            weight: the base weight.
            factors: the factors, with the file's values.
            key: the layer's name, as it was for `start`.

        Raises:
            CoreLoraError: indices don't fit the weight, or a recomputed factor is not the one that was trained with.
        """
        missing = [n for n, f in factors.items() if self._is_missing(n, f, weight)]
        if not missing:
            return
        remade = [n for n in self.remade(weight) if n in missing]
        if self.spec.choices.outer == "nystrom":
            outer = nystrom_at(weight, self.spec, *self._indices(factors, key))
        else:
            d = factors[remade[0]].channel_scale if remade else None
            outer = OUTERS[self.spec.choices.outer].make(weight, self.spec, d, self._generator(key))
        core_slots = tuple(s for s in self.slots if s.name in missing)
        values = {"A": outer.A, "B": outer.B, **slot_starts(core_slots, self._dims, self.spec, outer)}
        for name in missing:
            factor = factors[name]
            self._fill(factor, values.get(name), outer, weight, name)
            factor.to(weight.native().device)
            if name in remade:
                factor.check_probe(f"{key}: {name}")

    def _is_missing(self, name: str, factor: Factor, weight: BaseWeight) -> bool:
        """A start that is to be made again. Slices move between bases: a file from a float base has none for a
        quantised one, which then takes its own, and a file from a quantised base brings them to a float one."""
        if not self.plans[name].needs_start:
            return False
        if self.stores(name, weight):
            return self.follows_slices(name) and not factor.has_start
        return not (factor.has_start and factor.start_is_saved)

    def follows_slices(self, name: str) -> bool:
        """The start of factor `name` is a slice of the base weight, or follows from the slices' indices."""
        choices = self.spec.choices
        by_core = choices.outer == "nystrom" and choices.core_start in ("nystrom", "zeros", "identity")
        return self.plans[name].source is not None or (by_core and name not in ("A", "B"))

    def _indices(self, factors: Factors, key: str) -> tuple[Tensor, Tensor]:
        """(rows[r], cols[r]) of the slices: those of the file, or the leading ones."""
        found = []
        for name, size in zip(("A", "B"), self.view.shape, strict=True):
            index = factors[name].index
            index = torch.arange(self.spec.r) if index is None else index.long().cpu()
            if int(index.min()) < 0 or int(index.max()) >= size:
                what = "rows" if name == "A" else "columns"
                raise CoreLoraError(
                    f"{key}: the file's sampling indices for {name} run from {int(index.min())} to {int(index.max())}, "
                    f"but the weight has {size} {what}: the file is damaged or belongs to another model."
                )
            found.append(index)
        return found[0], found[1]

    @property
    def _dims(self) -> Dims:
        o, i = self.view.shape
        return {"o": o, "i": i, "r": self.spec.r, "k": self.spec.inner_r}

    def _fill(self, factor: Factor, value: Tensor | None, outer: OuterStart, weight: BaseWeight, name: str) -> None:
        """Give a factor its start: a slice that is read live, a slice that is held, or values."""
        plan = factor.plan
        dtype = weight.native().dtype
        if plan.source is not None:
            index = outer.rows if plan.source == "rows" else outer.cols
            transform = outer.a_transform if plan.source == "rows" else outer.b_transform
            assert index is not None
            device = weight.native().device
            factor.set_slice(index.to(device) if self.keeps_indices else None, transform if plan.needs_start else None)
            if not plan.needs_start:
                return
            factor.set_start(None, persistent=False)  # an empty or older one is no source
            if not weight.is_live or self.stores(name, weight):
                factor.set_start(factor.start_matrix(weight.native()), persistent=self.stores(name, weight))
        elif plan.needs_start:
            assert value is not None
            # Contiguous, as a load will have it: other strides round in another order.
            factor.set_start(value.to(dtype).contiguous(), persistent=self.stores(name, weight))

    def _trained_start(
        self, factor: Factor, value: Tensor | None, weight: BaseWeight, outer: OuterStart, init: bool
    ) -> Tensor:
        plan = factor.plan
        if not init:
            shape = plan.shape if len(plan.shape) == 2 else (1, *plan.shape)
            return kaiming_uniform((shape[0], shape[1])).reshape(plan.shape)
        if plan.offset:
            native = weight.native()  # made where they stay: zeros for a 7B model take a second to be brought to a GPU
            return torch.zeros(plan.shape, device=native.device, dtype=native.dtype)
        if value is None:  # a plain trained factor that begins as a slice: copied out once
            index = outer.rows if plan.source == "rows" else outer.cols
            assert index is not None
            probe = Factor(plan)
            probe.set_slice(index.to(weight.native().device), outer.a_transform)
            if plan.source == "cols":
                probe.set_slice(index.to(weight.native().device), outer.b_transform)
            return probe.start_matrix(weight.native().float())
        return value

    # -- using ---------------------------------------------------------------------------------------------------

    def path(self, x: Tensor, factors: Factors, W: Tensor | None = None) -> Tensor:
        """The adapter's output for the layer's input, before `scale`, as features [..., o].

        Args:
            x: the layer's own input (ids for an embedding).
            factors: the factors by name.
            W: the base weight W[o,i], where `reads_weight`.
        """
        pair: Pair = (x, None)
        for stage in self.stages:
            pair = run_stage(stage, pair, lambda name, p: factors[name](*p, W))
        out = pair[1] if self.has_offsets else pair[0]
        assert out is not None
        return out

    def chain_matrices(
        self, factors: Factors, W: Tensor | None, stages: tuple[Stage, ...], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor | None]:
        """(value, difference from the start) of a part of the chain as one matrix; None: it does not differ."""
        pair: Pair | None = None
        for stage in stages:
            pair = run_stage(stage, pair, lambda name, p: factors[name].on_matrices(p, W, dtype))
        assert pair is not None
        return pair  # type: ignore[return-value]

    def delta(self, factors: Factors, W: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The change of the weight, delta[o,i], scale included."""
        value, diff = self.chain_matrices(factors, W, self.stages, dtype)
        out = diff if self.has_offsets else value
        assert out is not None
        return self.spec.scale * out


def run_stage(stage: Stage, pair, step) -> Pair:
    """One stage of a chain on a pair: a factor (`step`), or branches that share the input and add up."""
    if isinstance(stage, str):
        return step(stage, pair)
    assert isinstance(stage, Par)
    total: Pair = (None, None)
    for branch in stage.branches:
        out = pair
        for name in branch:
            out = step(name, out)
        total = (add(total[0], out[0]), add(total[1], out[1]))
    return total


def _branches(stage: Stage, reverse: bool = False) -> tuple[tuple[str, ...], ...]:
    branches = ((stage,),) if isinstance(stage, str) else stage.branches
    return tuple(branch[::-1] for branch in branches) if reverse else branches


def _who_needs_value(stages: tuple[Stage, ...], offsets: set[str]) -> set[str]:
    """The factors whose v' some later factor with an offset asks for."""
    return _beyond_an_offset([_branches(s, reverse=True) for s in reversed(stages)], offsets)


def _who_sees_diff(stages: tuple[Stage, ...], offsets: set[str]) -> set[str]:
    """The factors that an earlier factor's offset reaches as d."""
    return _beyond_an_offset([_branches(s) for s in stages], offsets)


def _beyond_an_offset(walk: list[tuple[tuple[str, ...], ...]], offsets: set[str]) -> set[str]:
    """The factors that a walk over the stages' branches reaches after an offset, in the same branch or before it."""
    found: set[str] = set()
    passed = False
    for branches in walk:
        for branch in branches:
            first = 0 if passed else next((n for n, name in enumerate(branch, 1) if name in offsets), len(branch))
            found.update(branch[first:])
        passed = passed or any(name in offsets for branch in branches for name in branch)
    return found


def _product_starts_at_zero(spec: AdapterSpec) -> bool:
    structure = CORES[spec.choices.core]
    by_b = OUTERS[spec.choices.outer].zero_b and not structure.writes_output
    return by_b or structure.zero_start(spec.choices.core_start)


def _slice_source(spec: AdapterSpec, slot: Slot) -> str | None:
    if spec.choices.outer != "nystrom":
        return None
    return {"A": "rows", "B": "cols"}.get(slot.name)


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _cast(factor: Factor, dtype: torch.dtype) -> None:
    """The trained part and the start in the base's type; the small transform stays in float32."""
    if factor.weight is not None:
        factor.weight.data = factor.weight.data.to(dtype)
    if factor.start is not None:
        factor.start = factor.start.to(dtype)
