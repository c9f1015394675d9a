"""A start that is subtracted once, in the base weight itself: how one layer runs so, and how it goes back.

With `start: subtract` an adapter is B core A - B0 core0 A0, and trains offsets from its start (factor.py). Folded, the
layer runs W' = W - scale B0 core0 A0 and plain factors A = A0 + dA, core, B: fewer products for the same sum, up to the
rounding of W' to its storage. Nothing else changes: the parameters are the same objects, and what is saved, merged or
exported are the offsets on W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from corelora.adapter import CoreAdapter
from corelora.factor import Factor, FactorPlan

if TYPE_CHECKING:
    from corelora.tuner_layer import CoreLoraLayer


@dataclass
class Fold:
    """One adapter's start in one layer's base weight.

    Attributes:
        name: of the adapter.
        keeps_on_cpu: where W stays meanwhile; else on its own device.
        unfolded: what the adapter is without the fold.
        original: W as it was; None while the fold is put aside, and W stands in its place.
    """

    name: str
    keeps_on_cpu: bool
    unfolded: CoreAdapter
    original: Tensor | None = None

    @property
    def slots(self) -> list[str]:
        """The factors that are offsets without the fold."""
        return [slot for slot, plan in self.unfolded.plans.items() if plan.offset]


class Foldable:
    """What a tuner layer needs for a fold; PEFT's own switches go past it."""

    fold: Fold | None = None

    @torch.no_grad()
    def fold_start(self: Any, name: str, keep: str) -> None:
        """Put the start of adapter `name` into the base weight.

        Args:
            name: the adapter; one that `fold_problem` has nothing against.
            keep: where the weight stays as it was: "cpu" or "device".
        """
        self.unfold()
        self.fold = Fold(name=name, keeps_on_cpu=keep == "cpu", unfolded=self.cores[name])
        self._put_in()

    def unfold(self: Any) -> None:
        """Go back to offsets on the weight as it was; nothing where nothing is folded."""
        if self.fold is not None:
            self._put_aside()
            self.fold = None

    @torch.no_grad()
    def _put_in(self: Any) -> None:
        fold: Fold = self.fold
        if fold.original is not None:
            return
        base, core, factors = self.get_base_layer().weight, fold.unfolded, self.factors(fold.name)
        self._hold_slices()
        start = self.scaling[fold.name] * _start_product(core, factors, torch.promote_types(base.dtype, torch.float32))
        fold.original = _kept(base.data, fold.keeps_on_cpu)
        base.data.copy_(base.data.to(start.dtype) - self.view.weight(start))
        for slot in fold.slots:
            factors[slot].weight.data.add_(factors[slot].start)
        plans = {slot: _plain(plan) for slot, plan in core.plans.items()}
        self._become(CoreAdapter(core.spec, core.view, plans), factors)

    @torch.no_grad()
    def _put_aside(self: Any) -> None:
        fold: Fold = self.fold
        if fold.original is None:
            return
        factors = self.factors(fold.name)
        for slot in fold.slots:
            factors[slot].weight.data.sub_(factors[slot].start)
        self.get_base_layer().weight.data.copy_(fold.original)
        fold.original = None
        self._become(fold.unfolded, factors)
        self._release_if_unmerged()

    @torch.no_grad()
    def settle(self: Any) -> None:
        """Round the factors to what a file has of them: an offset is rounded when the start is taken off."""
        if self.fold is not None and self.fold.original is not None:
            factors = self.factors(self.fold.name)
            for slot in self.fold.slots:
                factors[slot].weight.data.sub_(factors[slot].start).add_(factors[slot].start)

    def _become(self: Any, core: CoreAdapter, factors: dict[str, Factor]) -> None:
        self.cores[self.fold.name] = core
        for slot, plan in core.plans.items():
            factors[slot].plan = plan
        self.forget_forms()

    def enable_adapters(self: Any, enabled: bool) -> None:
        """As PEFT's; a layer without its adapters runs the weight as it was, bit for bit."""
        super().enable_adapters(enabled)  # type: ignore[misc]
        if self.fold is not None:
            self._put_in() if enabled else self._put_aside()

    def set_adapter(self: Any, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; another adapter does not see this one's fold."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self.fold is not None and names != [self.fold.name]:
            self.unfold()
        super().set_adapter(adapter_names, inference_mode)  # type: ignore[misc]


def fold_problem(layer: CoreLoraLayer, name: str) -> str | None:
    """Why the start of adapter `name` can't be folded into this layer's weight, or None."""
    weight: Any = layer.get_base_layer().weight
    if not layer.weight_access.is_live or isinstance(weight, DTensor) or weight.is_meta:
        return "its weight is quantised, sharded, offloaded or has no values"
    if layer.merged:
        return "an adapter is merged into it: call unmerge_adapter() first"
    if layer.active_adapters != [name]:
        return f"its active adapters are {layer.active_adapters}: call set_adapter({name!r}) first"
    if layer.tied:
        return "its weight is another layer's, too: exclude it"
    if name in layer.unchecked:
        return "the adapter's values have not been loaded"
    return None


def folds(layer: CoreLoraLayer, name: str) -> bool:
    """Whether adapter `name` computes a starting product on this layer: each factor has its own part of it."""
    core = layer.cores.get(name)
    plans = () if core is None else core.plans.values()
    return any(p.offset for p in plans) and all(p.needs_start or (p.trained and not p.offset) for p in plans)


def unfolded_state(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Runs when a layer's state dict is taken: it has the offsets and the weight as they are without the fold."""
    fold: Fold | None = layer.fold
    if fold is None or fold.original is None:
        return
    factors = layer.factors(fold.name)
    for slot in fold.slots:
        key = f"{prefix}{layer.prefix}{slot}.{fold.name}.weight"
        if key in state:
            state[key] = state[key].detach() - factors[slot].start.to(state[key])
    if f"{prefix}base_layer.weight" in state:
        state[f"{prefix}base_layer.weight"] = fold.original


def before_load(layer: Any, *args: Any) -> None:
    """Runs before a state dict goes into a layer: its values are offsets. `loading.after_load` folds again."""
    if layer.fold is not None:
        layer._put_aside()


def fold_again(layer: Any) -> Any:
    """Put a fold in that was put aside; returns the layer."""
    if layer.fold is not None and not layer.disable_adapters:
        layer._put_in()
    return layer


def _start_product(core: CoreAdapter, factors: dict[str, Factor], dtype: torch.dtype) -> Tensor:
    """B0 core0 A0 [o,i]: the chain with every offset at zero, the same however far training has gone."""
    offsets = [f for slot, f in factors.items() if core.plans[slot].offset]
    values = [f.weight.data.clone() for f in offsets if f.weight is not None]
    for factor in offsets:
        assert factor.weight is not None
        factor.weight.data.zero_()
    product = core.chain_matrices(factors, None, core.stages, dtype)[0]
    for factor, value in zip(offsets, values, strict=True):
        assert factor.weight is not None
        factor.weight.data.copy_(value)
    return product


def _plain(plan: FactorPlan) -> FactorPlan:
    """The plan of a factor in a fold: trained whole, or frozen as before."""
    if plan.offset:
        return replace(plan, offset=False, needs_start=False, source=None, needs_value=True)
    return replace(plan, needs_value=True)


def _kept(weight: Tensor, on_cpu: bool) -> Tensor:
    if not on_cpu or weight.device.type == "cpu":
        return weight.clone()
    copy = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
    return copy.copy_(weight)
