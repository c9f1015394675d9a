"""A new adapter that is a weighted sum of others: delta = sum over k of weight_k delta_k, exact unless asked otherwise.

    linear   outer factors are frozen and shared on every layer: the cores add, and the new adapter keeps the ranks
    cat      any adapters: their LoRA pairs (convert.py) side by side, as a plain lora adapter whose ranks add up
    svd      the same, cut to a rank: the best approximation of the sum, by QR and a small SVD
    auto     linear where it is possible, else cat

PEFT's own `linear` for LoRA adds A and B factors one by one, which is not the sum of the deltas; ours always is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corelora.config import ADAPTER_FORMAT, CoreLoraConfig
from corelora.convert import lora_pair, truncated
from corelora.core import Par
from corelora.errors import raise_all, unknown_name
from corelora.spec import Choices
from corelora.storage import readable
from corelora.tuner_layer import CoreLoraLayer

COMBINATIONS = ("auto", "linear", "cat", "svd")
_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern")


@dataclass(frozen=True)
class _Sum:
    """What to add up: adapter names, their weights, and the layers that carry at least one of them, by name."""

    adapters: list[str]
    weights: list[float]
    layers: dict[str, CoreLoraLayer]

    def on(self, layer: CoreLoraLayer) -> list[tuple[str, float]]:
        """The adapters that this layer has, with their weights; a changed scale counts into the weight."""
        return [
            (n, w * layer.scaling[n] / layer.cores[n].spec.scale)
            for n, w in zip(self.adapters, self.weights, strict=True)
            if n in layer.cores
        ]


@torch.no_grad()
def add_weighted_adapter(
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "auto",
    svd_rank: int | None = None,
) -> None:
    """Add to `tuner` an adapter whose delta is the weighted sum of others'. It is not made active.

    Args:
        tuner: a CoreLoraModel.
        adapters: names of the adapters to add up.
        weights: one number each.
        adapter_name: name of the new adapter.
        combination_type: "auto", "linear", "cat" or "svd"; the module's docstring says what each does.
        svd_rank: the new rank under "svd"; None takes the largest rank of the given adapters.

    Raises:
        CoreLoraError: a name that does not exist or is taken, numbers that don't match, or "linear" where outer factors
            are trained or differ.
    """
    layers = {k: m for k, m in tuner.model.named_modules() if isinstance(m, CoreLoraLayer)}
    for layer in layers.values():
        layer.unfold()
    layers = {k: m for k, m in layers.items() if any(n in m.cores for n in adapters)}
    terms = _Sum(list(adapters), [float(w) for w in weights], layers) if len(adapters) == len(weights) else None
    raise_all(_problems(tuner, adapters, weights, adapter_name, combination_type, svd_rank), "add_weighted_adapter")
    assert terms is not None
    for layer in layers.values():
        for name in set(adapters) & layer.unchecked:
            layer.complete(name)
    reason = None if combination_type in ("cat", "svd") else _why_not_linear(terms)
    if combination_type == "linear":
        raise_all([reason] if reason else [], "add_weighted_adapter")
    if combination_type in ("auto", "linear") and reason is None:
        _add_cores(tuner, terms, adapter_name)
        return
    rank = svd_rank or max(layer.cores[n].spec.r for layer in layers.values() for n, _ in terms.on(layer))
    _add_pairs(tuner, terms, adapter_name, rank if combination_type == "svd" else None)


def _problems(
    tuner: Any, adapters: list[str], weights: list[float], name: str, combination: str, rank: int | None
) -> list[str]:
    problems = [unknown_name("adapter", a, tuner.peft_config) for a in adapters if a not in tuner.peft_config]
    if name in tuner.peft_config:
        problems.append(f"there is already an adapter called {name!r}.")
    if not adapters or len(adapters) != len(weights):
        problems.append(f"adapters and weights must be of one length, got {len(adapters)} and {len(weights)}.")
    if combination not in COMBINATIONS:
        problems.append(unknown_name("combination_type", combination, COMBINATIONS))
    if rank is not None and (combination != "svd" or rank < 1):
        problems.append(f"svd_rank is for combination_type 'svd' and at least 1, got {rank} with {combination!r}.")
    return problems


# -- cores add --------------------------------------------------------------------------------------------------------


def _why_not_linear(terms: _Sum) -> str | None:
    """Why the cores can't be added, or None where they can."""
    for key, layer in terms.layers.items():
        first = terms.on(layer)[0][0]
        for name, _ in terms.on(layer):
            core = layer.cores[name]
            if core.spec.trains("A") or core.spec.trains("B"):
                return f"adapter {name!r} trains its outer factors, so cores can't be added: use 'cat' or 'svd'."
            if any(isinstance(stage, Par) for stage in core.stages):
                return f"adapter {name!r} has a parallel core, which can't be added: use 'cat' or 'svd'."
            if not _same_outer(layer, first, name):
                return f"{key}: outer factors of {first!r} and {name!r} differ: use 'cat' or 'svd'."
    return None


def _same_outer(layer: CoreLoraLayer, one: str, other: str) -> bool:
    if one == other:
        return True
    with readable(layer):
        for slot in ("A", "B"):
            values = [layer.factors(n)[slot].start_matrix(layer.live_weight(n)) for n in (one, other)]
            if values[0].shape != values[1].shape or not torch.equal(*values):
                return False
    return True


def _add_cores(tuner: Any, terms: _Sum, name: str) -> None:
    """The new adapter: the shared outer factors with a dense core, core = sum of weight_k scale_k / scale core_k."""
    source = tuner.peft_config[terms.adapters[0]]
    choices: Choices = source.choices()
    config = _config(
        tuner,
        terms,
        {k: layer.cores[terms.on(layer)[0][0]].spec.r for k, layer in terms.layers.items()},
        method=source.method,
        outer=choices.outer,
        core="dense",
        train=["core"],
        start="zero",
        core_start="zeros",
        sampling=choices.sampling,
        slice_scale=choices.slice_scale,
        singular_values=choices.singular_values,
        store_outer=source.store_outer,
        adapter_format=ADAPTER_FORMAT,  # nothing is drawn or decomposed: all values are set here
    )
    _inject(tuner, name, config)
    for layer in terms.layers.values():
        _fill_core(layer, terms, name)


def _fill_core(layer: CoreLoraLayer, terms: _Sum, name: str) -> None:
    core, factors = layer.cores[name], layer.factors(name)
    here = terms.on(layer)
    model = layer.factors(here[0][0])
    total: Tensor | None = None
    for other, weight in here:
        theirs = layer.cores[other]
        value, diff = theirs.chain_matrices(layer.factors(other), layer.live_weight(other), theirs.stages[1:-1])
        matrix = diff if theirs.has_offsets else value
        assert matrix is not None
        term = (weight * theirs.spec.scale / core.spec.scale) * matrix
        total = term if total is None else total + term
    assert total is not None
    with readable(layer):
        for slot in ("A", "B"):
            factors[slot].set_slice(model[slot].index, model[slot].transform)
            start = model[slot].start
            if start is not None:
                factors[slot].set_start(start.clone(), persistent=core.stores(slot, layer.weight_access))
    _set(factors["core"].weight, total, like=_trained_dtype(layer, here[0][0]))
    layer.corelora_fingerprint[name] = layer.corelora_fingerprint[here[0][0]].clone()
    layer.unchecked.discard(name)


# -- pairs side by side -----------------------------------------------------------------------------------------------


def _add_pairs(tuner: Any, terms: _Sum, name: str, rank: int | None) -> None:
    pairs = {}
    for key, layer in terms.layers.items():
        found = []
        with readable(layer):
            for other, weight in terms.on(layer):
                right, left = lora_pair(layer.cores[other], layer.factors(other), layer.live_weight(other))
                found.append((right, weight * left))
        A, B = torch.cat([p[0] for p in found]), torch.cat([p[1] for p in found], dim=1)
        pairs[key] = (A, B) if rank is None else truncated(A, B, rank)[:2]
    config = _config(tuner, terms, {k: A.shape[0] for k, (A, _) in pairs.items()}, method="lora")
    _inject(tuner, name, config)
    for key, (A, B) in pairs.items():
        layer = terms.layers[key]
        dtype = _trained_dtype(layer, terms.on(layer)[0][0])
        _set(layer.factors(name)["A"].weight, A, like=dtype)
        _set(layer.factors(name)["B"].weight, B, like=dtype)


# -- shared -----------------------------------------------------------------------------------------------------------


def _config(tuner: Any, terms: _Sum, ranks: dict[str, int], **settings: Any) -> CoreLoraConfig:
    """A config for the new adapter: the first one's targets where all agree, else the layers by name; scale 1."""
    sources = [tuner.peft_config[a] for a in terms.adapters]
    first = sources[0]
    same = all(getattr(s, f) == getattr(first, f) for s in sources for f in _TARGETING)
    r = max(ranks.values())
    targets: dict[str, Any] = {"target_modules": sorted(terms.layers)}
    if same:
        targets = {f: getattr(first, f) for f in _TARGETING if f != "rank_pattern"}
        targets["target_modules"] = _plain(targets["target_modules"])
        targets["exclude_modules"] = _plain(targets["exclude_modules"])
    return CoreLoraConfig(
        r=r,
        alpha_pattern={f"^{key}": float(rank) for key, rank in ranks.items() if rank != r},
        alpha=float(r),
        rank_pattern={f"^{key}": rank for key, rank in ranks.items() if rank != r},
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        inference_mode=first.inference_mode,
        **targets,
        **settings,
    )


def _plain(names: Any) -> Any:
    return sorted(names) if isinstance(names, set) else names


def _inject(tuner: Any, name: str, config: CoreLoraConfig) -> None:
    tuner.peft_config[name] = config
    tuner.inject_adapter(tuner.model, name)


def _trained_dtype(layer: CoreLoraLayer, name: str) -> torch.dtype:
    return next(f.weight.dtype for f in layer.factors(name).values() if f.weight is not None)


def _set(parameter: Tensor | None, value: Tensor, like: torch.dtype) -> None:
    assert parameter is not None
    parameter.data = value.to(device=parameter.device, dtype=like).contiguous()
