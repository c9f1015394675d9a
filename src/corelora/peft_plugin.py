"""corelora as a PEFT method: the tuner, and the registration that importing corelora runs once.

PEFT's `register_peft_method` takes only names of its closed `PeftType` enum, and a plain string key breaks
transformers' `load_adapter` (it asks for `.value`). So the enum grows by one member, here and nowhere else.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from peft.utils.peft_types import PeftType
from torch import nn
from tqdm.auto import tqdm

from corelora.combine import add_weighted_adapter
from corelora.config import CoreLoraConfig, unmatched_targets
from corelora.enums import grow
from corelora.errors import CoreLoraError, raise_all
from corelora.layers import LinearView, view_of
from corelora.loading import has_no_values
from corelora.measured import given_to, stats_problems
from corelora.registry import OUTERS, STATS
from corelora.tuner_layer import PREFIX, CoreLoraLayer

NAME = "corelora"


class CoreLoraModel(BaseTuner):
    """The tuner that PEFT makes for a CoreLoraConfig."""

    prefix = PREFIX
    tuner_layer_cls = CoreLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # -- making adapters ------------------------------------------------------------------------------------------

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_all_loaded)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; whatever fails on the way, the model is left as it was."""
        self._bar: Any = None
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            _take_out(model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
        _mark_tied(model)
        _keep_out_of_ddp_broadcast(model)

    def _check_merge_allowed(self) -> None:
        """Tied weights, which PEFT warns about here, are merged into copies (`CoreLoraLayer.merge`)."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Before anything is replaced: report every mistake that the model's layers can show, together."""
        targets = _targets(self, peft_config, model)
        self._stats = None if peft_config.from_file else _load_stats(peft_config)
        names = [key for key, _ in model.named_modules()]
        problems = [] if peft_config.from_file else unmatched_targets(peft_config, names)
        problems += _target_problems(peft_config, targets, self._stats)
        raise_all(problems, "CoreLoraConfig on this model")
        self._bar = tqdm(total=len(targets), desc=f"starting {peft_config.method}", unit="layer", delay=2, leave=False)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(target, CoreLoraLayer):
            layer = layer_class(target)(target, current_key, **_backend_options(self.model))
            layer.training = target.training
        assert isinstance(layer, CoreLoraLayer)
        spec = peft_config.spec_for(current_key, layer.view.shape)
        found = given_to(self._stats, current_key, spec)
        layer.add_adapter(
            adapter_name, spec, found, init=bool(peft_config.init_weights), from_file=peft_config.from_file
        )
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)
        if self._bar is not None:
            self._bar.update()

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "auto",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter whose delta is the weighted sum of others'; see `corelora.combine`."""
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, svd_rank)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; a merged adapter is refused before anything is deleted (PEFT does so from 0.21 on).

        Raises:
            ValueError: the adapter does not exist, or is merged.
        """
        if any(adapter_name in m.merged_adapters for m in self.modules() if isinstance(m, CoreLoraLayer)):
            raise CoreLoraError(f"adapter {adapter_name!r} is merged: unmerge before deleting it")
        super().delete_adapter(adapter_name)

    @classmethod
    def _get_adapter_state_dict(cls, *, state_dict: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As PEFT's (from 0.21 on), which finds nothing where FSDP1 put its own modules between the named ones."""
        found = super()._get_adapter_state_dict(state_dict=state_dict, **kwargs)
        return found or {k: v for k, v in state_dict.items() if f".{PREFIX}" in k}

    # -- inference with an adapter for each sample ----------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around a forward pass; `adapter_names` goes to every tuner layer."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise CoreLoraError("adapter_names is for inference: call model.eval() first")
        layers = [m for m in self.modules() if isinstance(m, (CoreLoraLayer, AuxiliaryTrainingWrapper))]
        known = {n for m in layers if isinstance(m, CoreLoraLayer) for n in m.cores}
        raise_all([f"no adapter is called {n!r}" for n in sorted(set(names) - known - {"__base__"})], "adapter_names")
        beams = kwargs.get("num_beams") or 1
        names = [n for n in names for _ in range(beams)]
        handles = [m.register_forward_pre_hook(partial(_pass_names, names=names), with_kwargs=True) for m in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class CoreLoraLinear(CoreLoraLayer):
    """A CoreLoraLayer on a linear layer. PEFT's "all-linear" knows adapted linear layers by this word in their name."""


def layer_class(base_layer: nn.Module) -> type[CoreLoraLayer]:
    """The class that wraps a base layer."""
    return CoreLoraLinear if isinstance(view_of(base_layer), LinearView) else CoreLoraLayer


def _all_loaded(tuner: nn.Module, incompatible_keys: Any) -> None:
    """Runs when a state dict went into a tuner: a file that filled nothing, or only some layers, is an error."""
    layers = [m for m in tuner.modules() if isinstance(m, CoreLoraLayer)]
    for name in sorted({n for layer in layers for n in layer.unchecked}):
        empty = [layer.key for layer in layers if name in layer.unchecked and has_no_values(layer, name)]
        total = sum(name in layer.cores for layer in layers)
        unknown = incompatible_keys.unexpected_keys
        if not empty or (len(empty) == total and not unknown):
            continue  # complete, or a state dict that was not for this adapter
        what = f"keys that match nothing here, such as {unknown[0]!r}" if unknown else "no such keys"
        raise CoreLoraError(
            f"the file loaded for adapter {name!r} has no values for {len(empty)} of {total} adapted layers "
            f"({', '.join(empty[:4])}{', ...' if len(empty) > 4 else ''}); it has {what}. "
            "It belongs to another model or to other target modules."
        )


def _pass_names(module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> tuple[Any, Any]:
    kwargs["adapter_names"] = names
    return args, kwargs


def _targets(tuner: CoreLoraModel, config: CoreLoraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that a config will adapt, by name; adapters' own parts are passed over."""
    resolved: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
    inside: list[str] = []
    found = {}
    for key, module in model.named_modules():
        if not key or any(key.startswith(p) for p in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(key + ".")
        if _matched(tuner, resolved, key):
            found[key] = module
    return found


def _matched(tuner: CoreLoraModel, config: CoreLoraConfig, key: str) -> bool:
    result = tuner._check_target_module_exists(config, key)
    return bool(result) and type(result).__name__ != "_ExcludedModule"


def _target_problems(config: CoreLoraConfig, targets: dict[str, nn.Module], stats: Any) -> list[str]:
    """Every mistake that the targeted layers show: kinds without a view, ranks that don't fit, statistics."""
    problems: list[str] = []
    shapes: dict[str, tuple[int, int]] = {}
    for key, module in targets.items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        view = view_of(base)
        if view is None:
            problems.append(f"{key} is a {type(base).__name__}, which corelora can't adapt: exclude it.")
        else:
            shapes[key] = view.shape
    outer = OUTERS[config.choices().outer]
    if outer.needs_rank and config.on_small_layer == "error":
        problems += _rank_problems(config, shapes)
    if not problems:
        for key, shape in shapes.items():
            try:
                config.spec_for(key, shape)
            except CoreLoraError as error:
                problems.append(f"{key}: {error}")
    if outer.needs_stats and not config.from_file:
        problems += stats_problems(config, stats, {k: targets[k] for k in shapes})
    return problems


def _rank_problems(config: CoreLoraConfig, shapes: dict[str, tuple[int, int]]) -> list[str]:
    small = {k: s for k, s in shapes.items() if config.rank_for(k) > min(s)}
    if not small:
        return []
    named = ", ".join(f"{k} [{o}, {i}]" for k, (o, i) in list(small.items())[:6])
    more = f" and {len(small) - 6} more" if len(small) > 6 else ""
    largest = min(min(s) for s in small.values())
    return [
        f"r = {config.r} exceeds the smaller side of {len(small)} targeted weight(s): {named}{more}. The largest r "
        f"that fits all is {largest}; `on_small_layer: clip` uses each small layer's own largest."
    ]


def _load_stats(config: CoreLoraConfig) -> Any:
    """The statistics that a config names: a live object, one read from its path, or None."""
    if config.stats_object is not None or config.stats in (None, "weight"):
        return config.stats_object
    stats = STATS[OUTERS[config.choices().outer].stats or "input"].load(config.stats)
    config.stats_fingerprint = stats.fingerprint
    return stats


def _backend_options(model: nn.Module) -> dict[str, Any]:
    """What PEFT's torchao backend asks for: the quantiser's own class factory, where there is one."""
    try:
        name = "hf_quantizer.quantization_config.get_apply_tensor_subclass"
        return {"get_apply_tensor_subclass": operator.attrgetter(name)(model)}
    except AttributeError:
        return {}


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Remove a half-made adapter; layers that hold no other go back to what they wrapped."""
    for key, module in list(model.named_modules()):
        if not isinstance(module, CoreLoraLayer):
            continue
        for attribute in module.adapter_layer_names + module.other_param_names:
            store = getattr(module, attribute)
            if adapter_name in store:
                del store[adapter_name]
        module.unchecked.discard(adapter_name)
        if not module.cores:
            parent, _, name = _get_submodules(model, key)
            setattr(parent, name, module.base_layer)


def _mark_tied(model: nn.Module) -> None:
    """Tell each layer whether its base weight belongs to another layer too."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for module in model.modules():
        if isinstance(module, CoreLoraLayer):
            module.tied = owners[id(module.get_base_layer()._parameters.get("weight"))] > 1


def _keep_out_of_ddp_broadcast(model: nn.Module) -> None:
    """Frozen factors are equal on all ranks: DDP must not broadcast them in every forward pass (0.6 GB for NoRA on 7B).

    DDP reads names from an attribute of the module it wraps, which may be this model or one around it.
    """
    frozen = [
        f"{key}.{name}"
        for key, module in model.named_modules()
        if isinstance(module, CoreLoraLayer)
        for name, _ in module.named_buffers()
        if name.startswith(PREFIX)
    ]
    names = [prefix + name for prefix in ("", "model.", "base_model.model.") for name in frozen]
    known = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = sorted(known | set(names))  # type: ignore[assignment]


def register() -> None:
    """Make PEFT know the type CORELORA; running it twice does nothing."""
    if NAME.upper() in PeftType.__members__:
        return
    grow(PeftType, NAME.upper())
    register_peft_method(name=NAME, config_cls=CoreLoraConfig, model_cls=CoreLoraModel, prefix=PREFIX)
