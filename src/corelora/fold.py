"""`fold` and `unfold`: train with the start in the base weight, which saves products (folding.py says how)."""

from __future__ import annotations

from typing import Any

from torch import nn

from corelora.errors import CoreLoraError, raise_all
from corelora.folding import fold_problem, folds
from corelora.tuner_layer import CoreLoraLayer

KEEPS = ("cpu", "device")


def fold(model: nn.Module, adapter_name: str = "default", keep: str = "cpu") -> int:
    """Subtract an adapter's start from the base weights once, so that its factors train as plain ones.

    For adapters with `start: subtract` (NLoRA and PiSSA by default) on float weights. Outputs stay the same up to the
    rounding of a weight in its storage. The trained parameters remain the same objects, so optimizers need not know.
    Files hold offsets as ever; a disabled adapter leaves the pretrained weight bit for bit. A merge, an export, another
    scale, another adapter's turn and `unfold` end the fold.

    Args:
        model: with the adapter active.
        adapter_name: which.
        keep: where the pretrained weights stay meanwhile: "cpu" (a copy in the host's memory) or "device".

    Returns:
        How many layers run folded; those of the adapter that have no start to subtract stay as they are.

    Raises:
        CoreLoraError: nothing to fold; weights that can't be changed (quantised, sharded, tied); all layers at once.
    """
    if keep not in KEEPS:
        raise CoreLoraError(f"keep must be {' or '.join(KEEPS)}, got {keep!r}")
    layers = [m for m in model.modules() if isinstance(m, CoreLoraLayer) and adapter_name in m.cores]
    if not layers:
        known = sorted({n for m in model.modules() if isinstance(m, CoreLoraLayer) for n in m.cores})
        raise CoreLoraError(f"no adapter is called {adapter_name!r} here. Adapters: {', '.join(known) or 'none'}.")
    foldable = [layer for layer in layers if layer.fold is None and folds(layer, adapter_name)]
    done = [layer for layer in layers if layer.fold is not None and layer.fold.name == adapter_name]
    if not foldable and not done:
        start = layers[0].cores[adapter_name].spec.choices.start
        raise CoreLoraError(
            f"adapter {adapter_name!r} has nothing to fold: it computes no starting product "
            f"(start: {start}). Methods that do by default: nlora, pissa."
        )
    raise_all([f"{x.key}: {p}" for x in foldable if (p := fold_problem(x, adapter_name))], "fold")
    for layer in foldable:
        layer.fold_start(adapter_name, keep)
    return len(foldable) + len(done)


def unfold(model: nn.Module) -> None:
    """Put every base weight back bit for bit and go on with offsets; nothing where nothing is folded.

    Args:
        model: with or without folded adapters.
    """
    for module in model.modules():
        if isinstance(module, CoreLoraLayer):
            module.unfold()


def settle(model: Any) -> None:
    """Go on from what was just saved, so that a run that is loaded from the file goes on alike, bit for bit.

    Args:
        model: any module.
    """
    for layer in folded_layers(model):
        layer.settle()


def folded_layers(model: Any) -> list[CoreLoraLayer]:
    """The layers that run folded.

    Args:
        model: any module.
    """
    return [m for m in model.modules() if isinstance(m, CoreLoraLayer) and m.fold is not None]
