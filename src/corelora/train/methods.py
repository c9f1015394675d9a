"""What a recipe's `method` means: a corelora config, a PEFT config, full fine-tuning, or a new head alone.

A bare name is corelora's where corelora has it, else PEFT's. `peft:NAME` is always PEFT's, so that `lora` and
`peft:lora`, which differ in code but not in mathematics, can be compared.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType
from torch import nn

from corelora.config import CoreLoraConfig
from corelora.errors import CoreLoraError, UnknownSettingError, nearest, raise_all, unknown_name
from corelora.registry import METHODS, OUTERS
from corelora.tuner_layer import CoreLoraLayer

FULL = "full"
HEAD = "head"  # frozen features: the baseline of every adapter under a new head
WHOLE = {FULL: "full fine-tuning", HEAD: "training the head alone"}
PEFT_PREFIX = "peft:"
TOKENS = "num_virtual_tokens"  # of prompt methods, which have no default for it

# PEFT's names for variants of its LoRA: the fields that make them.
LORA_VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@dataclass(frozen=True, kw_only=True)
class AdapterNeeds:
    """What an adapter's config takes from the rest of the run.

    Attributes:
        task_type: PEFT's name of the task, such as CAUSAL_LM; None: it has none.
        heads: modules on top of the pretrained model that are new and train whole.
        unused: modules that the loss does not depend on, where an adapter would never learn.
        total_steps: optimizer steps of the run, for methods that schedule themselves (AdaLoRA); None: not known yet.
    """

    task_type: str | None
    heads: Sequence[str] = ()
    unused: Sequence[str] = ()
    total_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class WantedStats:
    """The statistics that a method's start reads.

    Attributes:
        kind: as `Outer.stats` names it.
        targets: the method's `target_modules`, or None for all layers that can be adapted.
        rank: triplets of a gradient that the start reaches for.
        seed: the method's.
    """

    kind: str
    targets: Any = None
    rank: int = 1
    seed: int = 0


MANY_STEPS = 1_000_000  # where a run's length is not known yet: a schedule of any length fits into it


def method_names() -> list[str]:
    """Every name that `method.name` can have, PEFT's own ones with their prefix where corelora has the bare one."""
    peft_names = [*LORA_VARIANTS, *(_lower(t) for t in PEFT_TYPE_TO_CONFIG_MAPPING if _lower(t) != "corelora")]
    own = set(METHODS)
    return sorted({FULL, HEAD, *own, *(PEFT_PREFIX + n if n in own else n for n in peft_names)})


def is_full(method: Mapping[str, Any]) -> bool:
    """Whether everything trains, without an adapter."""
    return method.get("name") == FULL


def is_head(method: Mapping[str, Any]) -> bool:
    """Whether only a new head trains, on frozen features."""
    return method.get("name") == HEAD


def is_whole(method: Mapping[str, Any]) -> bool:
    """Whether the run has no adapter, so that its result is a whole model."""
    return is_full(method) or is_head(method)


def freeze_below(model: nn.Module, heads: Sequence[str]) -> None:
    """Let nothing but a model's heads train.

    Args:
        model: without an adapter.
        heads: names of the modules that train.

    Raises:
        CoreLoraError: there is no head.
    """
    if not heads:
        raise CoreLoraError(f"method.name: {HEAD} trains a new head alone, and this task's model has none")
    model.requires_grad_(False)
    for name in heads:
        model.get_submodule(name).requires_grad_(True)


def is_corelora(method: Mapping[str, Any]) -> bool:
    """Whether the method is one of corelora's own."""
    return method.get("name") in METHODS


def needs_stats(method: Mapping[str, Any]) -> bool:
    """Whether the method's start reads statistics that the recipe doesn't give."""
    return wanted_stats(method) is not None


def wanted_stats(method: Mapping[str, Any]) -> WantedStats | None:
    """What the method's start reads that the recipe doesn't give; None where that is nothing."""
    if not is_corelora(method) or method.get("stats") is not None:
        return None
    config = CoreLoraConfig(**_corelora_fields(method))
    outer = OUTERS[config.choices().outer]
    if outer.stats is None:
        return None
    rank = outer.reach * max(config.r, *config.rank_pattern.values(), 1)
    return WantedStats(kind=outer.stats, targets=method.get("target_modules"), rank=rank, seed=config.seed)


def problems(method: Mapping[str, Any], needs: AdapterNeeds | None = None) -> list[str]:
    """Every mistake in a recipe's `method`, one sentence each, without a model.

    Args:
        method: `name` and the fields of that method's config.
        needs: as for `adapter_config`; a language model's where None.
    """
    name = method.get("name")
    if name is None:
        return [f"method.name is missing. Known: {', '.join(method_names())}."]
    if is_whole(method):
        return [f"method.{key}: {WHOLE[str(name)]} has no settings." for key in method if key != "name"]
    if not is_corelora(method) and _peft_type(str(name)) is None:
        return [f"method.name: {unknown_name('method', name, method_names())}"]
    found = _unknown_fields(method)
    if found:
        return found
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = _build(method, needs or AdapterNeeds(task_type="CAUSAL_LM", total_steps=MANY_STEPS))
    except (CoreLoraError, ValueError, TypeError, UnknownSettingError) as error:
        return [f"method: {line}" for line in _lines(error)]
    if getattr(built, TOKENS, 0) is None:
        return [f"method.{TOKENS} is missing: how many tokens {name} puts in front of each row and learns, such as 20."]
    return []


def adapter_config(
    method: Mapping[str, Any],
    task_type: str | None,
    heads: Sequence[str] = (),
    total_steps: int | None = None,
    unused: Sequence[str] = (),
) -> PeftConfig | None:
    """The config of a recipe's `method`, or None where the run has no adapter.

    Args:
        method: `name` and the fields of that method's config.
        task_type, heads, total_steps, unused: as in `AdapterNeeds`.

    Raises:
        CoreLoraError: every mistake in `method` at once.
    """
    needs = AdapterNeeds(task_type=task_type, heads=tuple(heads), unused=tuple(unused), total_steps=total_steps)
    raise_all(problems(method, needs), "recipe")
    return None if is_whole(method) else _build(method, needs)


def clipped_ranks(model: nn.Module) -> str | None:
    """How many layers have a smaller rank than was asked for, in one line; None where none has.

    Args:
        model: with or without an adapter, on any device.
    """
    if not isinstance(model, PeftModel):
        return None
    config: Any = model.active_peft_config
    layers = [m for m in model.modules() if isinstance(m, CoreLoraLayer)]
    small = [m for m in layers if m.cores[model.active_adapter].spec.r < config.rank_for(m.key)]
    if not small:
        return None
    return f"rank {config.r} is clipped to the smaller side of {len(small)} of {len(layers)} layers"


def _build(method: Mapping[str, Any], needs: AdapterNeeds) -> PeftConfig:
    if is_corelora(method):
        return CoreLoraConfig(**_corelora_fields(method), **_shared(CoreLoraConfig, method, needs))
    cls, fields = _peft_fields(method)
    fields |= _shared(cls, method, needs)
    names = _field_names(cls)
    if "total_step" in names and fields.get("total_step") is None and needs.total_steps is not None:
        fields["total_step"] = needs.total_steps
    return cls(**fields)


def _shared(cls: type, method: Mapping[str, Any], needs: AdapterNeeds) -> dict[str, Any]:
    """Fields that come from the task, where the config has them and the recipe doesn't set them."""
    wanted: dict[str, Any] = {"task_type": needs.task_type}
    if needs.heads:
        wanted["modules_to_save"] = list(needs.heads)
    if left_out := [*needs.heads, *map(re.escape, needs.unused)]:
        wanted["exclude_modules"] = rf"(.*\.)?({'|'.join(left_out)})(\..*)?"
    names = _field_names(cls)
    return {k: v for k, v in wanted.items() if k in names and method.get(k) is None}


def _corelora_fields(method: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": method["name"], **{k: v for k, v in method.items() if k != "name"}}


def _peft_fields(method: Mapping[str, Any]) -> tuple[type[PeftConfig], dict[str, Any]]:
    name = str(method["name"]).removeprefix(PEFT_PREFIX)
    kind = _peft_type(str(method["name"]))
    assert kind is not None
    given = {k: v for k, v in method.items() if k != "name"}
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind], {**LORA_VARIANTS.get(name, {}), **given}


def _peft_type(name: str) -> PeftType | None:
    name = name.removeprefix(PEFT_PREFIX)
    if name in LORA_VARIANTS:
        return PeftType.LORA
    return next((t for t in PEFT_TYPE_TO_CONFIG_MAPPING if _lower(t) == name and name != "corelora"), None)


def _lower(kind: Any) -> str:
    """PEFT's type as a recipe writes it; the table's keys are members of a str enum or plain strings."""
    return str(getattr(kind, "value", kind)).lower()


def _unknown_fields(method: Mapping[str, Any]) -> list[str]:
    cls: type = CoreLoraConfig if is_corelora(method) else _peft_fields(method)[0]
    names = _field_names(cls) - {"method", "peft_type", "task_type"}
    found = []
    for key in method:
        if key == "name" or key in names:
            continue
        guess = nearest(key, names)
        hint = f" Did you mean {guess!r}?" if guess else ""
        found.append(f"unknown key 'method.{key}' for {method['name']}.{hint}")
    return found


def _field_names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls) if f.init}


def _lines(error: Exception) -> list[str]:
    """The mistakes in an error's message, one a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and all(line.startswith("- ") for line in lines[1:]):
        return [line[2:] for line in lines[1:]]
    return [" ".join(lines) or type(error).__name__]
