"""What is looked at before and in the first steps: one sample as the model sees it, and whether everything learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from corelora.checks import GradientCheckCallback
from corelora.errors import CoreLoraError
from corelora.tuner_layer import CoreLoraLayer

GREEN, PLAIN = "\033[32m", "\033[0m"
ADAPTER = "default"  # PEFT's name for the adapter of a run, a level of its parameters' names


def marked(pieces: Sequence[tuple[str, bool]], colour: bool) -> str:
    """A sample as one text, its trained parts in green, or in double brackets.

    Args:
        pieces: text, and whether it is trained.
        colour: the text goes to a terminal.
    """
    before, after = (GREEN, PLAIN) if colour else ("[[", "]]")
    return "".join(f"{before}{text}{after}" if trained else text for text, trained in pieces)


def first_steps(model: nn.Module, steps: int = 3) -> list[TrainerCallback]:
    """The callbacks that watch whether a model learns.

    Args:
        model: with its adapter, or trained whole.
        steps: optimizer steps after which a module must have had a gradient and moved.
    """
    if PartialState().distributed_type == DistributedType.DEEPSPEED:
        return []  # its engine holds gradients and parameters out of sight
    watching: list[TrainerCallback] = [LearningCheck(steps)]
    if any(isinstance(m, CoreLoraLayer) for m in model.modules()):
        watching.append(GradientCheckCallback(steps))  # knows which zero gradients are harmless
    return watching


@dataclass
class _Module:
    """What was seen of one module's trained parameters."""

    parameters: dict[str, nn.Parameter]
    before: dict[str, tuple[float, float]]
    ran: bool = False
    got_gradient: bool = False


class LearningCheck(TrainerCallback):
    """Every module with trained parameters got a gradient and moved, by a step early in the run.

    A module that was never called (an expert that no token was sent to) is no mistake. Works for any adapter and for
    full fine-tuning: a module is where the parameter sits, without PEFT's levels below it.

    Args:
        steps: optimizer steps to watch before judging.
    """

    def __init__(self, steps: int = 3) -> None:
        self.steps, self.seen = steps, 0
        self.modules: dict[str, _Module] = {}
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Remember where everything stands."""
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise CoreLoraError("nothing of this model is trained: check method.train and method.target_modules")
        for name, parameter in trained:
            module = self.modules.setdefault(owner(name), _Module({}, {}))
            module.parameters[name] = parameter
            module.before[name] = _print(parameter)
        for name, module in self.modules.items():
            hook = model.get_submodule(name).register_forward_pre_hook(_note(module))
            self._handles.append(hook)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients."""
        for module in self._unsure():
            module.got_gradient = any(_has_gradient(p) for p in module.parameters.values())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge once enough steps were made."""
        self.seen += 1
        if self.modules and self.seen == self.steps:
            self._judge()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A shorter run has no verdict on what moved; what was held is let go."""
        self._end()

    def _unsure(self) -> list[_Module]:
        return [m for m in self.modules.values() if not m.got_gradient] if self.seen < self.steps else []

    def _judge(self) -> None:
        dead = [n for n, m in self.modules.items() if m.ran and not m.got_gradient]
        still = [n for n, m in self.modules.items() if m.got_gradient and not _moved(m)]
        steps, count = self.steps, len(self.modules)
        self._end()
        if dead:
            raise CoreLoraError(
                f"after {steps} steps {len(dead)} of {count} trained modules got no gradient: {_some(dead)}. Usual "
                "causes: the loss does not depend on them, or their input is detached."
            )
        if len(still) == count:
            raise CoreLoraError(
                f"after {steps} steps nothing has moved, though there are gradients: {_some(still)}. Usual causes: a "
                "learning rate or warm-up too small for the type of the trained parameters, gradients clipped to zero."
            )
        if still:
            raise CoreLoraError(
                f"after {steps} steps {len(still)} of {count} trained modules have not moved: {_some(still)}. Usual "
                "causes: they are missing from the optimizer, or their type is too coarse for the learning rate."
            )

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.modules = [], {}


def owner(name: str) -> str:
    """The module that a trained parameter belongs to, by the parameter's name.

    PEFT writes `layer.lora_A.default.weight` and `head.modules_to_save.default.dense.weight`: the levels from the one
    before the adapter's name on are its own.
    """
    parts = name.split(".")
    if ADAPTER in parts[1:]:
        return ".".join(parts[: parts.index(ADAPTER, 1) - 1])
    return ".".join(parts[:-1])


def _note(module: _Module) -> Any:
    def hook(*args: Any) -> None:
        module.ran = True

    return hook


def _has_gradient(parameter: nn.Parameter) -> bool:
    grad = parameter.grad
    return grad is not None and bool(torch.any(_whole(grad) != 0))


def _print(parameter: nn.Parameter) -> tuple[float, float]:
    """Two sums that change when the parameter does."""
    values = _whole(parameter.detach()).double()
    return float(values.sum()), float(values.abs().sum())


def _moved(module: _Module) -> bool:
    return any(_print(p) != module.before[n] for n, p in module.parameters.items())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _some(names: Sequence[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
