"""The layer that wraps a base layer and holds its adapters: PEFT's tuner layer, one class for all layer kinds."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from corelora.adapter import CoreAdapter, Factors
from corelora.errors import CoreLoraError
from corelora.folding import Foldable, before_load, fold_again, unfolded_state
from corelora.fusing import Fusable
from corelora.kernels.fast import fast_forward, wanted
from corelora.kernels.form import FormMaker
from corelora.layers import view_of
from corelora.loading import after_load, check_fingerprint, filled_by_file
from corelora.spec import AdapterSpec
from corelora.storage import BaseWeight, backend_of, makes_no_values, readable, settle

SLOTS = ("A", "core", "core_a", "core_b", "core2_a", "core2_b", "B")
PREFIX = "corelora_"


class CoreLoraLayer(Foldable, Fusable, nn.Module, BaseTunerLayer):
    """A base layer with adapters: y = base(x) + sum over active adapters of scale * path(x).

    Attributes:
        base_layer: the wrapped layer, never changed but by `merge`.
        cores: what each adapter is (`CoreAdapter`), by name.
        scaling: each adapter's scale, by name; diffusers changes it.
    """

    prefix = PREFIX
    adapter_layer_names = tuple(PREFIX + slot for slot in SLOTS)
    other_param_names = ("cores", "scaling", "corelora_dropout", "corelora_fingerprint")

    def __init__(self, base_layer: nn.Module, key: str, **backend_options: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        inner = self.get_base_layer()
        view = view_of(inner)
        if view is None:
            raise CoreLoraError(f"{key}: corelora has no view of a {type(inner).__name__}")
        self.view = view
        self.quantization_backend = backend_of(inner, **backend_options)
        self.cores: dict[str, CoreAdapter] = {}
        self.scaling: dict[str, float] = {}
        self._makers: dict[str, FormMaker] = {}  # forms of the fused path, by adapter
        self.unchecked: set[str] = set()  # adapters whose file may still have to be checked and completed
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.corelora_dropout = nn.ModuleDict()
        self.corelora_fingerprint = BufferDict(persistent=True)
        self.merged_adapters: list[str] = []
        self.tied = False  # the base weight is another layer's too (the tuner sets this)
        self._shared_weight: nn.Parameter | None = None  # the tied weight, while a merged copy stands in its place
        self._disable_adapters = False
        self._active_adapter: Any = []
        self.register_load_state_dict_pre_hook(before_load)
        self.register_load_state_dict_post_hook(after_load)
        self.register_state_dict_post_hook(unfolded_state)

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def weight_access(self) -> BaseWeight:
        """The base weight as W[o,i]."""
        return BaseWeight(self.get_base_layer(), self.view, self.quantization_backend)

    def add_adapter(
        self, name: str, spec: AdapterSpec, found: Any = None, *, init: bool = True, from_file: bool = False
    ) -> None:
        """Make an adapter called `name` on this layer.

        Args:
            name: the adapter's name in PEFT.
            spec: what it is.
            found: what was measured on this layer, where its start reads that.
            init: False starts the trained factors at random (PEFT's `init_weights=False`).
            from_file: values will be loaded; decompositions are not computed.

        Raises:
            CoreLoraError: the weight or the statistics can't be used; the message names the layer.
        """
        if self.merged:
            raise CoreLoraError(f"{self.key}: unmerge before adding an adapter, whose start reads the base weight")
        self.unfold()
        self._makers.pop(name, None)
        core = CoreAdapter.of(spec, self.view)
        with readable(self):
            weight = self.weight_access
            try:
                self._make(name, core, weight, found, init, from_file)
            except CoreLoraError as error:
                raise CoreLoraError(f"{self.key}: {error}") from None

    def _make(self, name: str, core: CoreAdapter, weight: BaseWeight, found: Any, init: bool, from_file: bool) -> None:
        meta = weight.is_meta or makes_no_values()
        if meta or from_file:
            factors = core.empty(weight)
            self.unchecked.add(name)
        else:
            factors = core.start(weight, found, self.key, init)
        for slot, factor in factors.items():
            getattr(self, PREFIX + slot)[name] = factor
        self.cores[name] = core
        self.scaling[name] = core.spec.scale
        self.corelora_dropout[name] = nn.Dropout(core.spec.dropout) if core.spec.dropout else nn.Identity()
        self.corelora_fingerprint[name] = torch.full((17,), torch.nan) if meta or from_file else weight.fingerprint()

    def factors(self, name: str) -> Factors:
        """The factor modules of an adapter by slot."""
        return {slot: getattr(self, PREFIX + slot)[name] for slot in self.cores[name].plans}

    def live_weight(self, name: str) -> Tensor | None:
        """W[o,i] as a view where the adapter reads slices of it in the forward pass, else None."""
        core = self.cores[name]
        if not core.reads_weight or not any(f.is_live for f in self.factors(name).values()):
            return None
        return self.view.matrix(self.get_base_layer().weight.detach())  # type: ignore[operator]

    def complete(self, name: str) -> None:
        """After values came from a file: check that the base is the right one, and derive what the file leaves out.

        Raises:
            CoreLoraError: the adapter was made on another base, or its file lacks factors.
        """
        if self.weight_access.is_meta:
            return
        gaps = [gap for gap, empty in filled_by_file(self, name).items() if empty]
        if gaps:
            raise CoreLoraError(
                f"{self.key}: no values were loaded for {', '.join(gaps)}. Load the adapter's file, or set the "
                "config's adapter_format to None to start a new adapter with it."
            )
        with readable(self), torch.no_grad():
            weight = self.weight_access
            check_fingerprint(self.key, self.corelora_fingerprint[name], weight)
            self.cores[name].derive(weight, self.factors(name), self.key)
        self.forget_forms()
        self.unchecked.discard(name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Factors keep their types (indices and transforms have their own); only the device follows the base."""
        if adapter_name not in self.cores:
            return
        target = device or next(iter(self.get_base_layer().parameters())).device
        for factor in self.factors(adapter_name).values():
            if not any(t.is_meta for t in (*factor.parameters(), *factor.buffers())):
                factor.to(target)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, with what this layer remembers besides."""
        self.unfold()
        super().delete_adapter(adapter_name)
        self.unchecked.discard(adapter_name)
        self._makers.pop(adapter_name, None)

    # -- scale (diffusers, transformers) ---------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times its own."""
        self.unfold()
        if adapter in self.cores:
            self.scaling[adapter] = scale * self.cores[adapter].spec.scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters."""
        self.unfold()
        for name in self._mine():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters, or give them their own again where `scale` is None."""
        self.unfold()
        for name in self._mine():
            self.scaling[name] = self.cores[name].spec.scale if scale is None else self.scaling[name] / scale

    def _mine(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.cores]

    # -- merging -----------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str, base_weight: Tensor | None = None) -> Tensor:
        """The change that an adapter makes to the base weight, in its layout, scale included, float32 or wider.

        Args:
            adapter: the adapter's name.
            base_weight: accepted for PEFT's sake; slices are read from the layer.
        """
        self.unfold()
        if adapter in self.unchecked:
            self.complete(adapter)
        core = self.cores[adapter]
        dtype = wide(self.weight_access.float_dtype)
        delta = core.delta(self.factors(adapter), self.live_weight(adapter), dtype)
        return self.view.weight(delta * (self.scaling[adapter] / core.spec.scale))

    def get_base_weight(self) -> Tensor:
        """As PEFT's; a quantised layer that has been inferring is first put back into its storage layout."""
        if self.quantization_backend is not None:
            settle(self.get_base_layer())
        return super().get_base_weight()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A delta can be converted to LoRA wherever it is one matrix on one input."""
        return self.view.factored

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' deltas to the base weight. Live slices are held first: they must stay the pretrained ones.

        Raises:
            ValueError: `safe_merge` and the result is not finite; the weight is then as before.
        """
        self.unfold()
        for name in [n for n in check_adapters_to_merge(self, adapter_names) if n in self.cores]:
            if not self.merged_adapters:
                self._hold_slices()
                self._untie()
                self._warn_of_rounding()
            delta = self.get_delta_weight(name)
            weight = self.get_base_weight()
            merged = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                self._release_if_unmerged()
                raise ValueError(f"{self.key}: NaN or infinity in the merged weight; adapter {name!r} seems broken")
            self._write(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged deltas out of the base weight again, last one first."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.cores:
                weight = self.get_base_weight()
                delta = self.get_delta_weight(name).to(weight.device)
                self._write((weight.to(delta.dtype) - delta).to(weight.dtype))
        self._release_if_unmerged()

    def _warn_of_rounding(self) -> None:
        if self.quantization_backend is not None:
            warnings.warn(
                f"merging into {self.quantization_backend.backend_name} weights rounds the sum to that storage: "
                "changes smaller than half a step vanish. For an exact merge, merge into the base in float.",
                stacklevel=2,
            )

    def _untie(self) -> None:
        """Merge into a copy of a tied weight: its other owner must not change."""
        base: Any = self.get_base_layer()
        if self.tied and self.quantization_backend is None:
            self._shared_weight = base.weight
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)

    def _retie(self) -> None:
        if self._shared_weight is not None:
            self.get_base_layer().weight, self._shared_weight = self._shared_weight, None

    def _write(self, weight: Tensor) -> None:
        if self.quantization_backend is None:
            self.get_base_layer().weight.data.copy_(weight)  # type: ignore[operator]
        else:
            self.set_base_weight(weight)

    def _hold_slices(self) -> None:
        for name in self.cores:
            W = self.live_weight(name)
            live = [] if W is None else [f for f in self.factors(name).values() if f.is_live]
            for factor in live:
                factor.set_start(factor.start_matrix(W).clone(), persistent=False)

    def _release_if_unmerged(self) -> None:
        if self.merged_adapters:
            return
        self._retie()
        if not self.weight_access.is_live:
            return
        for name, core in self.cores.items():
            for slot, factor in self.factors(name).items():
                if factor.plan.source and factor.plan.needs_start and not core.stores(slot, self.weight_access):
                    factor.set_start(None, persistent=False)

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' (or, with `adapter_names`, each sample's own)."""
        if adapter_names is not None:
            self.unfold()
        if adapter_names is None and not args and not kwargs and wanted(x):
            fused = fast_forward(self, x)
            if fused is not None:
                return fused
        if self.disable_adapters or (adapter_names is not None and self.merged):
            if self.merged:
                self.unmerge()
            if self.disable_adapters:
                return self.base_layer(x, *args, **kwargs)
        active = self._mine()
        result = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, result, adapter_names)
        if self.merged:
            return result
        if active and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in active:
            result = result + self.adapter_output(name, x).to(result.dtype)
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moves and casts make new tensors: what the fused path keeps is made from old ones; a fold is made anew."""
        self.forget_forms()
        before_load(self)
        super()._apply(*args, **kwargs)
        return fold_again(self)

    def adapter_output(self, name: str, x: Tensor) -> Tensor:
        """What adapter `name` adds to the base layer's output for the layer's input x, in the output's layout."""
        if name in self.unchecked:
            self.complete(name)
        core, factors = self.cores[name], self.factors(name)
        W = self.live_weight(name)
        scale: Any = self.scaling[name]
        if self.view.takes_ids:
            embed_scale = self._get_embed_scale()
            scale = scale if embed_scale is None else scale * embed_scale
        else:
            x = self.corelora_dropout[name](x)
        if self.view.factored:
            return scale * self.view.output(core.path(x, factors, W))
        return (scale / core.spec.scale) * self.view.dense(x, core.delta(factors, W, wide(x.dtype)).to(x.dtype))

    def _mixed(self, x: Tensor, result: Tensor, adapter_names: list[str]) -> Tensor:
        """Each sample of the batch with its own adapter; "__base__" is none."""
        if len(adapter_names) != len(x):
            raise CoreLoraError(
                f"{self.key}: adapter_names has {len(adapter_names)} names for a batch of {len(x)}: give one each; "
                "layers that see tokens without their samples can't be used with it"
            )
        result = result.clone()
        for name in sorted(set(adapter_names) & set(self.cores)):
            picked = [i for i, other in enumerate(adapter_names) if other == name]
            result[picked] += self.adapter_output(name, x[picked]).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "corelora." + super().__repr__()

    def copy_adapter(self, source: str, target: str) -> None:
        """Give `target` a copy of everything that `source` has on this layer."""
        for slot in self.cores[source].plans:
            store = getattr(self, PREFIX + slot)
            store[target] = copy.deepcopy(store[source])
        self.cores[target], self.scaling[target] = self.cores[source], self.scaling[source]
        self.corelora_dropout[target] = copy.deepcopy(self.corelora_dropout[source])
        self.corelora_fingerprint[target] = self.corelora_fingerprint[source].clone()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute a delta in: float32, or float64 where the layer is."""
    return torch.promote_types(dtype, torch.float32)
