"""A loss or gradient that is not finite: found before the update, and traced to a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from corelora.recipe import Recipe


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm over all gradients that are there, on their device; 0 where there are none."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def all_finite(losses: Sequence[Tensor], norm: Tensor | None = None) -> bool:
    """Whether the losses of a step, and the norm of its gradients, are finite; one wait for the device.

    Args:
        losses: the step's, one a forward pass.
        norm: of the gradients; None to look at the losses alone.
    """
    values = [torch.isfinite(torch.stack([loss.float() for loss in losses])).all()]
    if norm is not None:
        values.append(torch.isfinite(norm).to(values[0].device))
    return bool(torch.stack(values).all())


def first_bad_gradient(model: nn.Module) -> str | None:
    """The first parameter, in the model's order, whose gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(_local(parameter.grad)).all()):
            return plain(name)
    return None


@torch.no_grad()
def first_bad_output(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> str | None:
    """The first module, in the order of the forward pass, whose output is not finite on these batches.

    The passes are made again with hooks, so dropout draws anew; None where that pass is finite.
    """
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
            if not found and any(not bool(torch.isfinite(_local(t)).all()) for t in leaves):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(look(plain(n) or "the model")) for n, m in model.named_modules()]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def advice(recipe: Recipe) -> list[str]:
    """What to change after values that are not finite: what this recipe makes likely first."""
    optim, loop = recipe.optim, recipe.loop
    found = []
    if "float16" in (loop.precision, recipe.model.dtype):
        found.append("float16 overflows at 65,504: --set loop.precision=bfloat16 --set model.dtype=bfloat16")
    if recipe.method.get("variant") == "published" or recipe.method.get("start") == "as_is":
        found.append("a start that is added as it stands can be large: --set method.start=subtract")
    if optim.max_grad_norm == 0:
        found.append("gradients are not clipped: --set optim.max_grad_norm=1.0")
    found.append(f"a lower learning rate: --set optim.lr={optim.lr / 4:.1e}")
    if optim.warmup == 0:
        found.append("a warm-up: --set optim.warmup=0.03")
    if any(rate > 1 for rate in optim.rates.values()):
        found.append("smaller multiples in optim.rates")
    return found


def plain(name: str) -> str:
    """A name without what wrappers put around it."""
    for part in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(part)
    return name.replace(".default.weight", "").replace(".default", "")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
