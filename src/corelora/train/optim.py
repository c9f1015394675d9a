"""Optimizers, and learning rates of their own for the outer factors, the core and the head.

LoRA+ (Hayou 2024) trains B at a multiple of A's rate; `optim.rates` says the same of three factors. RMSProp runs with
PyTorch's alpha (0.99) and eps (1e-8) and no momentum: the NLoRA paper's appendix D names no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from corelora.errors import CoreLoraError, nearest, unknown_name
from corelora.recipe.schema import OptimPart
from corelora.train.models import head_names
from corelora.tuner_layer import CoreLoraLayer

LORA_FA = "lora_fa"
LORA_PLUS = "lora_plus"
LORA_PLUS_RATE = 16.0  # B over A, as the LoRA+ paper recommends

# Short names of the recipes for transformers' names.
SHORT = {"adamw": "adamw_torch_fused", LORA_PLUS: "adamw_torch_fused", LORA_FA: "adamw_torch_fused"}

INNER = ("core_a", "core_b")  # a nested core's own factors; those of a second core count with them

# Optimizers that take whole models, or parameters in shapes of their own: no groups.
UNGROUPED = ("lomo", "adalomo", "galore", "apollo", "muon", "dion")


def optimizer_name(part: OptimPart) -> str:
    """transformers' name of the recipe's optimizer."""
    return SHORT.get(part.name, part.name)


def rates(part: OptimPart) -> dict[str, float]:
    """Multiples of the learning rate by group, LoRA+'s own included."""
    return {**({"B": LORA_PLUS_RATE} if part.name == LORA_PLUS else {}), **part.rates}


def _multiple(group: str, multiples: Mapping[str, float]) -> float:
    """A nested core's factor moves at its own rate, else at the core's."""
    whole = "core" if group in INNER else group
    return multiples.get(group, multiples.get(whole, 1.0))


def problems(part: OptimPart, method: Mapping[str, Any], steps: int | None = None) -> list[str]:
    """What is wrong with the optimizer's and the schedule's names, with their pairing with a method, with the warm-up.

    Args:
        part: of the recipe.
        method: of the recipe.
        steps: of the run, where it is known how many they are.
    """
    found = []
    known = [o.value for o in OptimizerNames]
    if optimizer_name(part) not in known:
        guess = nearest(part.name, [*SHORT, *known])
        hint = f" Did you mean {guess!r}?" if guess else ""
        found.append(f"optim.name: unknown optimizer {part.name!r}.{hint} Short names: rmsprop, {', '.join(SHORT)}.")
    schedules = [s.value for s in SchedulerType]
    if part.schedule not in schedules:
        found.append(f"optim.schedule: {unknown_name('schedule', part.schedule, schedules)}")
    if rates(part) and any(word in part.name for word in UNGROUPED):
        found.append(f"optim.rates: {part.name} takes no groups of parameters.")
    if part.name == LORA_FA and rates(part):
        found.append("optim.rates: lora_fa trains B only, at one rate: leave rates out.")
    if part.name == LORA_FA and method.get("name") not in ("peft:lora", "rslora", "dora", "peft:pissa", "olora"):
        found.append(
            f"optim.name: lora_fa projects the gradients of PEFT's LoRA: use it with method.name peft:lora, not "
            f"{method.get('name')!r}; corelora's method lora_fa freezes A with any optimizer."
        )
    for key, kinds in (("betas", ("adam",)), ("eps", ("adam", "rmsprop"))):
        takes = part.name != LORA_FA and any(kind in optimizer_name(part) for kind in kinds)
        if getattr(part, key) is not None and not takes:
            found.append(f"optim.{key}: {part.name} takes none.")
    return found + warmup_problems(part, steps)


def warmup_problems(part: OptimPart, steps: int | None) -> list[str]:
    """A warm-up that is longer than the run: the rate would never be what the recipe says."""
    if steps is None or part.warmup <= steps:
        return []
    return [f"optim.warmup: {part.warmup:g} steps of warm-up in a run of {steps}; give fewer, or a part such as 0.03."]


def factor_groups(model: nn.Module) -> dict[str, str]:
    """Name of each trained parameter -> A, core (nested: core_a, core_b), B, head or other.

    A corelora factor is told by the slot that holds it, PEFT's by the words lora_A and lora_B (or their embedding
    twins) in its name, a head by PEFT's copy of a whole module or, without an adapter, by its place on top.
    """
    if isinstance(model, PreTrainedModel):
        heads = head_names(model)
        return {n: "head" if n.split(".")[0] in heads else "other" for n, _ in _trained(model)}
    slots: dict[int, str] = {}
    for layer in (m for m in model.modules() if isinstance(m, CoreLoraLayer)):
        for adapter in layer.cores:
            for slot, factor in layer.factors(adapter).items():
                slots |= {id(p): slot.replace("core2_", "core_") for p in factor.parameters()}
    return {n: slots.get(id(p)) or _by_name(n) for n, p in _trained(model)}


def _by_name(name: str) -> str:
    for word, group in (("lora_A", "A"), ("lora_embedding_A", "A"), ("lora_B", "B"), ("lora_embedding_B", "B")):
        if f".{word}." in name or name.endswith(f".{word}"):
            return group
    return "head" if ".modules_to_save." in name else "other"


def rate_problems(part: OptimPart, model: nn.Module) -> list[str]:
    """Rates for groups that have no trained parameter in this model."""
    present = set(factor_groups(model).values())
    present |= {"core"} if present & set(INNER) else set()
    missing = [group for group in rates(part) if group not in present]
    return [
        f"optim.rates.{g}: no parameter of this group trains. Trained here: {', '.join(sorted(present)) or 'nothing'}."
        for g in missing
    ]


def parameter_groups(part: OptimPart, model: nn.Module, decayed: set[str]) -> list[dict[str, Any]]:
    """Trained parameters by rate and decay, each group with its `lr` and `weight_decay`.

    Args:
        part: the recipe's.
        model: with adapters.
        decayed: names of the parameters that weight decay is for.

    Raises:
        CoreLoraError: a rate for a group without parameters.
    """
    wrong = rate_problems(part, model)
    if wrong:
        raise CoreLoraError(" ".join(wrong))
    factors, multiples = factor_groups(model), rates(part)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in _trained(model):
        key = (_multiple(factors[name], multiples), name in decayed)
        decay = part.weight_decay if key[1] else 0.0
        empty: dict[str, Any] = {"params": [], "lr": part.lr * key[0], "weight_decay": decay}
        groups.setdefault(key, empty)["params"].append(parameter)
    return list(groups.values())


def make_optimizer(
    part: OptimPart, arguments: TrainingArguments, model: nn.Module, decayed: set[str]
) -> torch.optim.Optimizer | None:
    """The optimizer where transformers can't make it alone: groups with rates, LoRA-FA; else None.

    Args:
        part: the recipe's.
        arguments: Trainer's, which hold the optimizer's name and numbers.
        model: what trains.
        decayed: names of the parameters that weight decay is for.
    """
    if part.name == LORA_FA:
        return _lora_fa(part, model)
    if not rates(part):
        return None
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    return cls(parameter_groups(part, model, decayed), **options)


def _lora_fa(part: OptimPart, model: nn.Module) -> torch.optim.Optimizer:
    assert isinstance(model, PeftModel)
    config: Any = model.active_peft_config
    return create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=part.lr, weight_decay=part.weight_decay
    )


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)
