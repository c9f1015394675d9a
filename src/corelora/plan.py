"""What an adapter will cost, before anything is loaded: trained parameters, file size, memory of a training step.

The model is built from its config on the meta device and each method's adapters are really injected there by PEFT, so
counts and names are those of a run. No weight is downloaded or made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from corelora.config import CoreLoraConfig
from corelora.errors import CoreLoraError, nearest, raise_all, unknown_name
from corelora.plan_memory import GIB, RESERVE, Step, StepMemory, StepSimulator, largest_batch, training_inputs
from corelora.registry import METHODS, OUTERS
from corelora.tuner_layer import CoreLoraLayer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# From model types to class names, for configs that name no class.
_LANGUAGE_MODELS = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES)
_ENCODER_DECODERS = (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)

_OWN_OPTIONS = ("method", "variant", "r", "inner_r")  # of a request, so they are no `settings`

# Names of types in a safetensors header, in the order in which the format lays tensors out (widest first).
_SAFE_DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
_SAFE_DTYPES |= {torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to plan.

    Attributes:
        model: a folder with a config.json, a config file, a model type such as "llama", or a name on the hub.
        methods: names of methods.
        variant, r, inner_r, target_modules: as in CoreLoraConfig.
        settings: other settings of CoreLoraConfig.
        dtype: type of the base weights: float32, bfloat16 or float16.
        gpu: size of the GPU in GiB.
        step: the training step.
    """

    model: str
    methods: tuple[str, ...]
    variant: str = "default"
    r: int = 16
    inner_r: int | None = None
    target_modules: Any = "all-linear"
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    gpu: float = 24.0
    step: Step = field(default_factory=Step)

    def __post_init__(self) -> None:
        problems = [p for p in (METHODS.miss(m) for m in self.methods) if p]
        if not self.methods:
            problems.append("name at least one method.")
        if self.dtype not in DTYPES:
            problems.append(unknown_name("dtype", self.dtype, DTYPES))
        if not self.gpu > 0:
            problems.append(f"gpu must be a size in GiB above 0, got {self.gpu}.")
        problems += [
            f"{key!r} has its own option (--{key.replace('_', '-')}): it can't be set with --set."
            for key in _OWN_OPTIONS
            if key in self.settings
        ]
        raise_all(problems + self.step.problems(), "plan")

    def config_for(self, method: str, **changes: Any) -> CoreLoraConfig:
        """The adapter's config for one method. Statistics change no shape, so weight statistics stand in for them."""
        stats = {"stats": "weight"} if OUTERS[METHODS[method].choices(self.variant).outer].needs_stats else {}
        given = {"r": self.r, "inner_r": self.inner_r, "target_modules": self.target_modules, "variant": self.variant}
        return CoreLoraConfig(method=method, **{**given, **stats, **self.settings, **changes})


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One method's plan. Sizes in bytes; whatever could not be had is None and `problem` says why.

    Attributes:
        modules: how many modules carry an adapter.
        trained: numbers that train.
        file_bytes: the adapter's safetensors file as PEFT trains and saves it: trained factors in float32.
        file_bytes_native: the same with trained factors in the base's type (`autocast_adapter_dtype=False`).
        file_bytes_small: as `file_bytes_native`, with frozen outer factors left out (`store_outer: false`); None where
            none are stored or a load could not make them again.
        memory: what is alive at the peak of a training step.
        length: tokens of a sequence in that step, None where the model reads no tokens.
        largest_batch: the largest batch that fits the GPU, by the line through two batches.
    """

    method: str
    r: int
    inner_r: int
    modules: int | None = None
    trained: int | None = None
    file_bytes: int | None = None
    file_bytes_native: int | None = None
    file_bytes_small: int | None = None
    memory: StepMemory | None = None
    length: int | None = None
    fits: bool | None = None
    largest_batch: int | None = None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the peak spelled out."""
        data = asdict(self)
        if self.memory is not None:
            data["memory"]["peak"] = self.memory.peak
        return data


def make_plan(request: PlanRequest, *, memory: bool = True, progress: bool = True) -> list[MethodPlan]:
    """A plan for each method of the request.

    Args:
        request: what to plan.
        memory: estimate the memory of a training step too.
        progress: show a progress bar once two seconds have passed.

    Returns:
        The plans in the request's order; a method that this model can't take has its `problem`.

    Raises:
        CoreLoraError: there is no such model.
    """
    config = load_config(request.model)
    bar = tqdm(request.methods, desc="planning", unit="method", delay=2, disable=not progress, leave=False)
    return [plan_method(request, config, method, memory) for method in bar]


def plan_method(request: PlanRequest, config: PretrainedConfig, method: str, memory: bool = True) -> MethodPlan:
    """The plan of one method on the model of `config`."""
    inner = request.inner_r if request.inner_r is not None else max(1, request.r // 2)
    known: dict[str, Any] = {"method": method, "r": request.r, "inner_r": inner}
    try:
        model = adapted_on_meta(config, request.config_for(method), DTYPES[request.dtype], float32=True)
        known |= _sizes(model, request, config, method)
        if memory:
            known |= _memory(model, request)
    except CoreLoraError as error:
        known["problem"] = str(error)
    return MethodPlan(**known)


def _sizes(model: PeftModel, request: PlanRequest, config: PretrainedConfig, method: str) -> dict[str, Any]:
    state = adapter_state(model)
    native = adapted_on_meta(config, request.config_for(method), DTYPES[request.dtype])
    found = {
        "modules": sum(isinstance(m, CoreLoraLayer) for m in model.modules()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "file_bytes": file_bytes(state),
        "file_bytes_native": file_bytes(adapter_state(native)),
    }
    repeatable = OUTERS[request.config_for(method).choices().outer].repeatable
    if repeatable and any(key.endswith((".corelora_A.start", ".corelora_B.start")) for key in state):
        small = adapted_on_meta(config, request.config_for(method, store_outer=False), DTYPES[request.dtype])
        found["file_bytes_small"] = file_bytes(adapter_state(small))
    return found


def _memory(model: PeftModel, request: PlanRequest) -> dict[str, Any]:
    step = request.step
    simulator = StepSimulator(model, step.device, step.fast)
    other = Step(**{**asdict(step), "batch": max(1, step.batch // 2) if step.batch > 1 else 2})
    here, there = simulator.measure(step), simulator.measure(other)
    room = int(request.gpu * GIB) - RESERVE
    small, large = sorted(((step.batch, here.peak), (other.batch, there.peak)))
    with torch.device("meta"):
        ids = training_inputs(model, step.batch, step.length).get("input_ids")
    return {
        "memory": here,
        "length": ids.shape[1] if isinstance(ids, Tensor) else None,
        "fits": here.peak <= room,
        "largest_batch": largest_batch(small, large, room),
    }


# -- models ------------------------------------------------------------------------------------------------------


def load_config(model: str) -> PretrainedConfig:
    """The config of a model, from a folder, a config file, a model type or the hub.

    Raises:
        CoreLoraError: there is none; the message says what was looked for.
    """
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        what = (
            "an adapter's folder, not a model's: give its base model" if _is_adapter(path) else "no config.json in it"
        )
        raise CoreLoraError(f"{model}: {what}")
    if not path.exists() and (path.is_absolute() or model.startswith(".") or path.suffix == ".json"):
        raise CoreLoraError(f"{model}: there is no such file or folder")
    if not path.exists() and model in transformers.CONFIG_MAPPING:
        return AutoConfig.for_model(model)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        if path.exists():
            raise CoreLoraError(f"{model}: not a model's config ({_first_line(error)})") from None
        guess = nearest(model, transformers.CONFIG_MAPPING) if "/" not in model else None
        hint = f" Did you mean the model type {guess!r}?" if guess else ""
        raise CoreLoraError(
            f"{model!r} is no folder, no config file and no model type, and no config was found for it on the hub "
            f"({_first_line(error)}).{hint}"
        ) from None


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a config on the meta device: the class that the config names, else the type's language model."""
    name = next(iter(config.architectures or []), None)
    for mapping in _ENCODER_DECODERS if config.is_encoder_decoder else _LANGUAGE_MODELS:
        name = name or mapping.get(config.model_type)
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    return model.to(dtype)


def adapted_on_meta(
    config: PretrainedConfig, adapter: CoreLoraConfig, dtype: torch.dtype = torch.float32, float32: bool = False
) -> PeftModel:
    """The model of a config with adapters, on the meta device.

    Args:
        config: the model's.
        adapter: the adapter's.
        dtype: of the base weights, and of the trained factors.
        float32: trained factors in float32 over a smaller base, which is PEFT's default.

    Raises:
        CoreLoraError: targets that match nothing, ranks that don't fit.
    """
    model = build_on_meta(config, dtype)
    try:
        with torch.device("meta"):
            return get_peft_model(model, adapter, autocast_adapter_dtype=float32)
    except CoreLoraError:
        raise
    except ValueError as error:  # PEFT's own: target modules that match nothing
        raise CoreLoraError(_first_line(error)) from None


# -- files -------------------------------------------------------------------------------------------------------


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """What `save_pretrained` would write, by name."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def file_bytes(state: Mapping[str, Tensor]) -> int:
    """Size of a safetensors file with these tensors as PEFT writes it, header included, exact.

    The format: 8 bytes with the header's size, the header (JSON, padded with spaces to a multiple of 8), the tensors.
    """
    order = list(_SAFE_DTYPES)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(state.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _SAFE_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + (text + 7) // 8 * 8 + end
