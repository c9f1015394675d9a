"""Does the adapter learn? A check of the first training steps, for any loop and for transformers' Trainer.

A factor that never gets a gradient trains nothing and nobody notices. Some zero gradients are harmless, though, and are
told apart:

- waiting: another factor of the same product is still zero and does get a gradient (A under B = 0, A' under B' = 0). It
  moves as soon as the learning rate does, so a warm-up that begins at zero is harmless too.
- unreached: the layer saw no input (an expert that no token was sent to).
- bypassed, which is not harmless: the module around a layer ran, but read the weight without calling the layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from corelora.errors import CoreLoraError
from corelora.factor import Factor
from corelora.tuner_layer import CoreLoraLayer


@dataclass
class _Watched:
    """One trained factor and what was seen of it."""

    name: str
    layer: str
    factor: Factor
    partners: list[Factor]  # the other trained factors of the same product
    alive: bool = False
    waiting: bool = False
    misses: int = 0


class GradientCheck:
    """Watches the trained factors of a model's active adapters through its first steps.

        check = corelora.check_training(model)
        for batch in batches:
            loss(batch).backward()
            check.after_backward()     # before optimizer.step()
            optimizer.step()
            ...                        # after a few steps:
        check.raise_if_dead()
        check.close()

    Args:
        model: a model with adapters, before or after wrapping by an accelerator.

    Raises:
        CoreLoraError: no module carries an adapter, or no factor of the active adapters is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = {k: m for k, m in model.named_modules() if isinstance(m, CoreLoraLayer)}
        if not layers:
            raise CoreLoraError("training check: no module of this model carries a corelora adapter")
        self.watched = [w for key, layer in layers.items() for w in _watch(key, layer)]
        if not self.watched:
            raise CoreLoraError(
                "training check: no factor of the active adapters is trained. An adapter that was loaded for inference "
                "is frozen: load it with is_trainable=True, or call set_adapter(name) first."
            )
        self.steps = 0
        self._ran: set[str] = set()  # since the last after_backward
        self._ever: set[str] = set()
        self._parents: dict[str, str] = {}
        self._handles = [
            layer.register_forward_pre_hook(self._seen(key), with_kwargs=True) for key, layer in layers.items()
        ]
        for key in layers:
            parent = model.get_submodule(key.rpartition(".")[0])
            self._parents[key] = "parent of " + key
            hook = self._seen(self._parents[key])
            self._handles.append(parent.register_forward_pre_hook(hook, with_kwargs=True))

    def _seen(self, key: str) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if not tensors or any(t.numel() for t in tensors):
                self._ran.add(key)

        return note

    def after_backward(self) -> None:
        """Look at the gradients; call it between `loss.backward()` and `optimizer.step()`."""
        self.steps += 1
        live = {id(w.factor): _has_gradient(w.factor) for w in self.watched}
        for w in self.watched:
            if live[id(w.factor)]:
                w.alive = True
                continue
            w.waiting = any(live.get(id(p), False) and _is_zero(p) for p in w.partners)
            if w.layer in self._ran and not w.waiting:
                w.misses += 1
        self._ever |= self._ran
        self._ran = set()

    def dead(self) -> list[str]:
        """Names of the factors that got no gradient although their layer was used and nothing excuses it."""
        return [w.name for w in self.watched if not w.alive and (w.misses or self._bypassed(w.layer))]

    def waiting(self) -> list[str]:
        """Names of the factors whose gradient is zero only because a partner has not left zero yet."""
        return [w.name for w in self.watched if not w.alive and w.waiting and not w.misses]

    def unreached(self) -> list[str]:
        """Names of the layers that saw no input, such as experts that no token was sent to."""
        names = {w.layer for w in self.watched if not w.alive and w.layer not in self._ever}
        return sorted(n for n in names if not self._bypassed(n))

    def _bypassed(self, layer: str) -> bool:
        return layer not in self._ever and self._parents[layer] in self._ever

    def report(self) -> dict[str, Any]:
        """What was seen so far: steps, factors that learn, and the names of the dead, waiting and unreached ones."""
        return {
            "steps": self.steps,
            "learning": sum(w.alive for w in self.watched),
            "factors": len(self.watched),
            "dead": self.dead(),
            "waiting": self.waiting(),
            "unreached": self.unreached(),
        }

    def raise_if_dead(self) -> None:
        """Raise where some factor can't learn, or where no factor learned and none waits.

        Raises:
            CoreLoraError: names the factors, and says for each kind what usually causes it.
        """
        dead = self.dead()
        bypassed = sorted({w.layer for w in self.watched if not w.alive and self._bypassed(w.layer)})
        if dead:
            hint = (
                f" {_some(bypassed)} never ran although the module around it did: that module reads the weight itself, "
                "so exclude it (exclude_modules)."
                if bypassed
                else " Usual causes: a frozen or detached input under reentrant gradient checkpointing (call "
                "enable_input_require_grads()), a loss that does not depend on these layers, a base weight of zeros."
            )
            raise CoreLoraError(
                f"training check: {len(dead)} of {len(self.watched)} trained factors got no gradient in {self.steps} "
                f"step(s): {_some(dead)}.{hint}"
            )
        if self.steps and not any(w.alive or w.waiting for w in self.watched):
            raise CoreLoraError(f"training check: no adapted layer saw any input in {self.steps} step(s)")

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def check_training(model: nn.Module) -> GradientCheck:
    """Start watching whether a model's adapters learn; see `GradientCheck`.

    Args:
        model: a model with corelora adapters.

    Raises:
        CoreLoraError: no module carries an adapter, or nothing of the active adapters is trained.
    """
    return GradientCheck(model)


class GradientCheckCallback(TrainerCallback):
    """`GradientCheck` for transformers' Trainer: `Trainer(..., callbacks=[GradientCheckCallback()])`.

    Args:
        steps: optimizer steps to watch before judging. Factors that still wait then are watched on, up to 100 steps.
    """

    def __init__(self, steps: int = 3) -> None:
        self.steps = steps
        self.check: GradientCheck | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Begin to watch."""
        assert model is not None
        self.check = GradientCheck(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are there, parameters have not moved: look, and judge once enough was seen."""
        if self.check is None:
            return
        self.check.after_backward()
        if self.check.steps < self.steps:
            return
        self.check.raise_if_dead()
        if not self.check.waiting() or self.check.steps >= 100:
            self._end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A training shorter than `steps` is judged by what it had."""
        if self.check is not None and self.check.steps:
            self.check.raise_if_dead()
        self._end()

    def _end(self) -> None:
        if self.check is not None:
            self.check.close()
            self.check = None


def _watch(key: str, layer: CoreLoraLayer) -> list[_Watched]:
    found = []
    for adapter in layer.active_adapters:
        if adapter not in layer.cores:
            continue
        slots = layer.factors(adapter)
        learning = {s: f for s, f in slots.items() if f.weight is not None and f.weight.requires_grad}
        for slot, factor in learning.items():
            partners = [other for s, other in learning.items() if s != slot]
            found.append(_Watched(f"{key}.{slot} ({adapter})", key, factor, partners))
    return found


def _has_gradient(factor: Factor) -> bool:
    assert factor.weight is not None
    grad = factor.weight.grad
    return grad is not None and bool(torch.any(_full(grad) != 0))


def _is_zero(factor: Factor) -> bool:
    """The factor itself is zero; an offset of zero stands on a start that is not."""
    assert factor.weight is not None
    return not factor.plan.offset and not bool(torch.any(_full(factor.weight.detach()) != 0))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _some(names: Iterable[str], shown: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
