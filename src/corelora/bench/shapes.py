"""Models to measure on: shapes by name with random weights, or a folder's real ones.

Time and memory of a step do not depend on what the weights are, so a model that nobody has downloaded can be measured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig

from corelora.errors import CoreLoraError, unknown_name
from corelora.plan import load_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# From the models' public configs.
_LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
_LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
_SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}

SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama-2-7b": (LlamaConfig, {**_LLAMA_2_7B, "num_hidden_layers": 32, "vocab_size": 32000}),
    "llama-3-8b": (LlamaConfig, {**_LLAMA_3_8B, "num_hidden_layers": 32, "vocab_size": 128256}),
    "mistral-7b": (MistralConfig, {**_LLAMA_3_8B, "num_hidden_layers": 32, "vocab_size": 32000}),
    "smollm2": (LlamaConfig, {**_SMOLLM2, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True}),
    "tiny": (LlamaConfig, {**_TINY, "num_hidden_layers": 2, "vocab_size": 320}),
}


def shape_config(model: str, layers: int | None = None) -> PretrainedConfig:
    """The config of a model, with another number of layers where asked for, and no cache of keys and values.

    Args:
        model: a name in `SHAPES`, a folder with a config.json, a config file, or a model type.
        layers: how many decoder layers; the config's own where None.

    Raises:
        CoreLoraError: there is no such model, or it is no causal language model.
    """
    if model in SHAPES:
        cls, sizes = SHAPES[model]
        config = cls(**sizes)
    elif not Path(model).exists() and model not in transformers.CONFIG_MAPPING:
        raise CoreLoraError(f"{unknown_name('model', model, SHAPES)} A model's folder or config.json will do as well.")
    else:
        config = load_config(model)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CoreLoraError(f"{model}: {type(config).__name__} is no causal language model's config")
    if layers is not None:
        config = _with_layers(config, layers)
    config.use_cache = False
    return config


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same shapes with fewer or more layers; lists with one entry a layer are cut to fit."""
    data = copy.deepcopy(config.to_dict())
    data["num_hidden_layers"] = layers
    if data.get("layer_types") is not None:
        kinds = data["layer_types"]
        data["layer_types"] = [kinds[n % len(kinds)] for n in range(layers)]
    return type(config).from_dict(data)


def random_model(config: PretrainedConfig, device: str, dtype: torch.dtype) -> Any:
    """The config's causal language model with random weights, frozen, made on its device in its type."""
    with default_dtype(dtype), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def real_model(folder: str, device: str, dtype: torch.dtype) -> Any:
    """The causal language model of a folder with its own weights, frozen."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).requires_grad_(False)


def shown_name(model: str) -> str:
    """How results call a model: the name of a shape or type, or the last part of a path."""
    return Path(model).name if Path(model).exists() else model


def has_weights(model: str) -> bool:
    """Whether `model` is a folder that holds weights beside its config."""
    path = Path(model)
    return path.is_dir() and any(path.glob("*.safetensors"))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's default type for the time of a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
