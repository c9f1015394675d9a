"""A whole model with an adapter merged into it, as `save_pretrained` writes models: for software without adapters.

The model that is exported keeps its weights: merged ones are new tensors in a copy of its structure.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from corelora.errors import CoreLoraError, raise_all
from corelora.exportcheck import bare, check_outputs
from corelora.folders import adapted_layers, finished_folder, open_model, spare_base
from corelora.storage import readable
from corelora.tuner_layer import CoreLoraLayer

_TOKENIZER = "tokenizer_config.json"
_IMAGES = "preprocessor_config.json"


@torch.no_grad()
def export_merged(
    model_or_adapter_folder: Any,
    out_folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    base_model: Any = None,
    check: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the base model with an adapter merged into its weights, and its tokenizer or processor from the disk.

    Args:
        model_or_adapter_folder: a PeftModel, a model with an injected adapter, or the folder of a saved adapter.
        out_folder: the folder to make.
        adapter_name: which adapter of the model.
        base_model: with a folder, the base model or its name, in place of the one that the adapter names.
        check: load the merged model back and compare its outputs with the adapter's, where it runs on token ids.
        overwrite: replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        CoreLoraError: no such adapter, quantised weights, a model without `save_pretrained`, a folder in the way, or
            a merged model with other outputs.
    """
    with finished_folder(out_folder, overwrite, source=model_or_adapter_folder) as folder:
        model = open_model(model_or_adapter_folder, adapter_name, base_model)
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        layers = adapted_layers(inner, adapter_name)
        spare_base(out_folder, inner, model.peft_config[adapter_name])  # type: ignore[index]
        raise_all(_problems(inner, layers), "export of merged weights")
        plain = _merged(inner, layers, adapter_name)
        plain.save_pretrained(folder)
        _copy_processors(model_or_adapter_folder, inner, folder)
        if check and isinstance(plain, PreTrainedModel):
            again: Any = type(plain).from_pretrained(folder, dtype=next(plain.parameters()).dtype)
            check_outputs(inner, adapter_name, again.to(next(plain.parameters()).device))
    return Path(out_folder)


def _problems(inner: nn.Module, layers: dict[str, CoreLoraLayer]) -> list[str]:
    problems = []
    if any(layer.merged for layer in layers.values()):
        problems.append("the adapter is merged: call unmerge_adapter() first.")
    quantized = [name for name, layer in layers.items() if layer.weight_access.is_quantized]
    if quantized:
        problems.append(
            f"{quantized[0]} and {len(quantized) - 1} more layers are quantised, where a merge would be rounded away: "
            "export the saved adapter's folder with base_model set to the model in float."
        )
    if not callable(getattr(inner, "save_pretrained", None)):
        problems.append(
            f"a {type(inner).__name__} has no save_pretrained: use merge_and_unload() and save it yourself."
        )
    return problems


def _merged(inner: nn.Module, layers: dict[str, CoreLoraLayer], name: str) -> Any:
    """A copy of the model's structure without adapters, whose adapted weights are new tensors."""
    plain: Any = bare(inner)
    for key, module in list(plain.named_modules()):
        saved = dict(module.named_children()).get("modules_to_save")  # PEFT's wrapper of a module trained whole
        if isinstance(saved, nn.ModuleDict) and name in saved:
            plain.set_submodule(key, saved[name])
    for key, layer in layers.items():
        with readable(layer):
            weight: Tensor = layer.get_base_weight()
            delta = layer.get_delta_weight(name).to(weight.device)
            merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
        if not bool(merged.isfinite().all()):
            raise CoreLoraError(f"{key}: the merged weight is not finite; the adapter seems broken")
        plain.get_submodule(key).weight = nn.Parameter(merged, requires_grad=False)
        if layer.tied:
            plain.config.tie_word_embeddings = False
    return plain


def _copy_processors(source: Any, inner: Any, folder: Path) -> None:
    """Save tokenizer and image processor of the adapter's folder, or else of the base's."""
    given = [source] if isinstance(source, (str, os.PathLike)) else []
    places = [Path(place) for place in [*given, getattr(inner, "name_or_path", "")] if place]
    reads = [place for place in places if (place / _TOKENIZER).is_file()]
    if reads:
        AutoTokenizer.from_pretrained(reads[0]).save_pretrained(folder)
    sees = [place for place in places if (place / _IMAGES).is_file()]
    if sees:
        shutil.copyfile(sees[0] / _IMAGES, folder / _IMAGES)
