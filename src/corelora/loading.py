"""What happens when values from a file reach an adapter: is everything there, and is it the right base model.

`CoreAdapter.empty` leaves NaN in what a file has to fill, and -1 in indices, so that a gap is seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corelora.errors import CoreLoraError
from corelora.folding import fold_again
from corelora.storage import BaseWeight

if TYPE_CHECKING:
    from corelora.tuner_layer import CoreLoraLayer

FLOAT_TOLERANCE, QUANTIZED_TOLERANCE = 0.02, 0.35  # of the fingerprint's norm


def filled_by_file(layer: CoreLoraLayer, name: str) -> dict[str, bool]:
    """The tensors of an adapter that its file should fill, and whether each is still empty."""
    found = {}
    for slot, factor in layer.factors(name).items():
        for kind in ("weight", "start", "index"):
            tensor = getattr(factor, kind)
            derived = kind == "start" and layer.cores[name].follows_slices(slot)  # a float base's file has none
            if tensor is not None and not derived:
                found[f"{layer.prefix}{slot}.{kind}"] = tensor.is_meta or _is_empty(tensor.detach())
    return found


def _is_empty(tensor: Tensor) -> bool:
    first = tensor.flatten()[:1]
    return bool((first.isnan() if first.is_floating_point() else first < 0).any())


def has_no_values(layer: CoreLoraLayer, name: str) -> bool:
    """Nothing of an adapter that a file should fill has been filled."""
    return all(filled_by_file(layer, name).values())


def check_fingerprint(key: str, fingerprint: Tensor, weight: BaseWeight) -> None:
    """Compare sampled entries of the base weight with those that an adapter was made on.

    Args:
        key: the layer's name.
        fingerprint: [n], the entries then; NaN where the adapter was made on a base without values.
        weight: the base weight now.

    Raises:
        CoreLoraError: they differ by more than a change of dtype or a quantisation explains.
    """
    saved = fingerprint.float().cpu()
    if bool(torch.isnan(saved).any()):
        return
    now = weight.fingerprint()
    tolerance = QUANTIZED_TOLERANCE if bool(saved[-1]) or bool(now[-1]) else FLOAT_TOLERANCE
    error = float((now - saved)[:-1].norm() / saved[:-1].norm().clamp(min=1e-12))
    if error > tolerance:
        raise CoreLoraError(
            f"{key}: this adapter was made on another base model (sampled weights differ by {100 * error:.0f} %, "
            f"{100 * tolerance:.0f} % is allowed). Load it on the base that its adapter_config.json names."
        )


def after_load(layer: Any, incompatible_keys: Any) -> None:
    """Runs when a state dict went into a CoreLoraLayer: complete the adapters that came from a file."""
    layer.forget_forms()
    for name in sorted(layer.unchecked):
        if not has_no_values(layer, name):  # else this state dict was not for the adapter
            layer.complete(name)
    missing = set(incompatible_keys.missing_keys)
    for name in layer.cores:
        came = not any(key.endswith(f"{layer.key}.{layer.prefix}fingerprint.{name}") for key in missing)
        if came and name not in layer.unchecked and not layer.merged and _follows_indices(layer, name):
            layer.complete(name)
    fold_again(layer)


def _follows_indices(layer: CoreLoraLayer, name: str) -> bool:
    """Something that is not in the file was computed from sampled indices, which a file may have replaced."""
    sampled = [f for f in layer.factors(name).values() if f.index is not None]
    return any(f.transform is not None or f.start is not None for f in sampled)
