"""Folders in and out of an export: a result that appears whole or not at all, and a model opened from its adapter."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from corelora.config import CoreLoraConfig
from corelora.errors import CoreLoraError, unknown_name
from corelora.tuner_layer import CoreLoraLayer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The class that a task's base model is loaded with; a config without a task type names its class itself.
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@contextmanager
def finished_folder(out: str | os.PathLike[str], overwrite: bool, source: Any = None) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well; else nothing is left.

    Args:
        out: the folder to make.
        overwrite: replace one that is not empty.
        source: what is exported; where it is a folder, it can't be replaced.

    Raises:
        CoreLoraError: `out` is in the way.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise CoreLoraError(f"{out} is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CoreLoraError(f"{out} is not empty: choose another folder, or overwrite it (overwrite=True, --overwrite)")
    if isinstance(source, (str, os.PathLike)):
        spare_source(out, source, "the adapter that is being exported")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as spare:
        made, old = Path(spare) / "new", Path(spare) / "old"
        made.mkdir()
        yield made
        if out.exists():
            out.rename(old)
        try:
            made.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise


def spare_source(out: str | os.PathLike[str], source: str | os.PathLike[str], what: str) -> None:
    """Refuse to replace a folder that an export is made from, or one that holds it.

    Args:
        out: the folder to make.
        source: a folder that must stay; a hub's name, which is none, may be given too.
        what: what the source is, for the message.

    Raises:
        CoreLoraError: making `out` would remove `source`.
    """
    kept, made = Path(source).resolve(), Path(out).resolve()
    if Path(source).is_dir() and made in (kept, *kept.parents):
        raise CoreLoraError(f"{out} {'is' if made == kept else 'holds'} {what}: choose another folder")


def spare_base(out: str | os.PathLike[str], model: nn.Module, config: Any) -> None:
    """Refuse to replace the folder of the base model, which the export is of no use without.

    Args:
        out: the folder to make.
        model: the model under PEFT's wrapper.
        config: the adapter's.

    Raises:
        CoreLoraError: making `out` would remove the base model.
    """
    for place in (getattr(model, "name_or_path", ""), config.base_model_name_or_path):
        if place:
            spare_source(out, place, "the base model of the adapter")


def open_model(model_or_folder: Any, adapter_name: str, base_model: Any = None) -> nn.Module:
    """A model without what compiles or distributes it, or the model with the adapter that a folder holds, on its base.

    Args:
        model_or_folder: a model, or an adapter folder.
        adapter_name: which adapter; in a folder, `default` is in the folder itself, any other in one of its name.
        base_model: the base or its name, in place of the one that the folder names.

    Raises:
        CoreLoraError: the folder holds no corelora adapter of this name, or names no base model.
    """
    if isinstance(model_or_folder, nn.Module):
        # Wrappers would be in the names of layers, and so in the keys of the file.
        return extract_model_from_parallel(model_or_folder, keep_torch_compile=False)
    if not isinstance(model_or_folder, (str, os.PathLike)):
        raise CoreLoraError(f"an export takes a model or an adapter's folder, not a {type(model_or_folder).__name__}")
    folder = _adapter_folder(Path(model_or_folder), adapter_name)
    try:
        kind = json.loads((folder / CONFIG).read_text()).get("peft_type")
    except ValueError as error:
        raise CoreLoraError(f"{folder / CONFIG} is no JSON ({error}): copy or download the adapter again") from None
    if kind != "CORELORA":
        raise CoreLoraError(f"{folder} holds an adapter of type {kind}, not one of corelora's")
    if not (folder / WEIGHTS).is_file():
        raise CoreLoraError(f"{folder} holds a config but no {WEIGHTS}: copy or download the adapter again")
    config = CoreLoraConfig.from_pretrained(str(folder))
    base = base_model if isinstance(base_model, nn.Module) else _load_base(config, base_model, str(folder))
    return PeftModel.from_pretrained(base, str(folder), adapter_name=adapter_name)


def _adapter_folder(folder: Path, name: str) -> Path:
    """Where PEFT saved the adapter `name`: the default one in the folder itself, any other in a folder of its name.

    Raises:
        CoreLoraError: it is not there; the message says what is.
    """
    if not folder.is_dir():
        raise CoreLoraError(f"{folder} holds no adapter: there is no such folder")
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}
    if (folder / CONFIG).is_file():
        found |= {"default": folder, folder.name: folder}
    if name in found:
        return found[name]
    if not found:
        files = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise CoreLoraError(f"{folder} holds no adapter: there is no {CONFIG} in it, but {files}")
    raise CoreLoraError(f"{folder}: {unknown_name('adapter', name, found)}")


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, CoreLoraLayer]:
    """The layers that carry an adapter, by name.

    Args:
        model: the model under PEFT's wrapper.
        adapter_name: the adapter's name.

    Raises:
        CoreLoraError: there is no adapter of this name; the message names the nearest.
    """
    found = {key: m for key, m in model.named_modules() if isinstance(m, CoreLoraLayer)}
    if not found:
        raise CoreLoraError("the model has no corelora adapter")
    layers = {key: layer for key, layer in found.items() if adapter_name in layer.cores}
    if not layers:
        raise CoreLoraError(unknown_name("adapter", adapter_name, {n for m in found.values() for n in m.cores}))
    for layer in layers.values():
        layer.unfold()
        if adapter_name in layer.unchecked:
            layer.complete(adapter_name)
    return layers


def _load_base(config: Any, name: str | None, folder: str) -> nn.Module:
    name = name or config.base_model_name_or_path
    if not name:
        raise CoreLoraError(f"{folder} does not say which base model it is for: give base_model")
    mapping = config.auto_mapping or {}
    task = _task(config)
    if task is not None:
        model_class = getattr(transformers, _TASKS[task])
    elif mapping:
        model_class = getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"])
    else:
        raise CoreLoraError(f"{folder} does not say which class its base model has: give base_model as a model")
    labels = _labels(config, folder)
    head = {"num_labels": labels, "ignore_mismatched_sizes": True} if labels else {}  # the file has the head itself
    try:
        return model_class.from_pretrained(name, dtype="auto", **head)
    except (OSError, ValueError) as error:  # not a name, nothing there, or no network
        raise CoreLoraError(
            f"the base model {name!r} can't be loaded: give another one as base_model (--base) ({error})"
        ) from error


def _labels(config: Any, folder: str) -> int | None:
    """How many labels the head of a classifier has that is in the adapter's file, None where it holds none."""
    weights = Path(folder, WEIGHTS)
    shows_pictures = str((config.auto_mapping or {}).get("base_model_class")).endswith("ForImageClassification")
    if not (shows_pictures or _task(config) in ("SEQ_CLS", "TOKEN_CLS")) or not weights.is_file():
        return None
    with safe_open(weights, framework="pt") as file:
        heads = [k for k in file.keys() for m in config.modules_to_save or () if f".{m}." in k]  # noqa: SIM118
        shapes = [file.get_slice(k).get_shape() for k in heads if k.endswith("weight")]
    return min((shape[0] for shape in shapes), default=None)


def _task(config: Any) -> str | None:
    """A task type is an enum's member or its text."""
    return None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type))


def adapter_folder(given: str) -> str:
    """The adapter's folder that a user names; of a run's folder the one in it.

    Args:
        given: a folder, or a hub name, which is left alone.
    """
    own = Path(given)
    inside = own / "adapter"
    return str(inside) if not (own / CONFIG).is_file() and inside.is_dir() else given
