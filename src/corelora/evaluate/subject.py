"""What is evaluated: a run folder, an adapter folder, a model folder or a hub name, loaded with its adapter merged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import corelora  # noqa: F401  (registers the adapter type)
from corelora.errors import CoreLoraError
from corelora.recipe import Recipe, read_tree
from corelora.recipe.schema import ModelPart
from corelora.train.folder import RunFolder
from corelora.train.methods import is_whole
from corelora.train.models import load_model, load_model_config, load_tokenizer


@dataclass(frozen=True)
class Subject:
    """What was named on the command line.

    Attributes:
        name: as given.
        model: the base model, or the model itself.
        adapter: the adapter's folder, or None.
        folder: where results go.
        recipe: of a run folder, else None.
    """

    name: str
    model: ModelPart
    adapter: Path | None
    folder: Path
    recipe: Recipe | None = None

    @property
    def fingerprint(self) -> str | None:
        """Of the adapter's weights, None without an adapter."""
        if self.adapter is None:
            return None
        digest = hashlib.sha256()
        for path in sorted(self.adapter.glob("*.safetensors")):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def find_subject(name: str, output: str | None = None, dtype: str = "auto") -> Subject:
    """Tell a run folder from an adapter, a model folder and a hub name, by the files that are there.

    Args:
        name: what the user gave.
        output: folder for results; the run or adapter folder itself if None, or runs/eval-NAME for a bare model.
        dtype: of the weights; the file's own, or bfloat16 on a GPU, if "auto".

    Raises:
        CoreLoraError: a folder that is none of these; an unfinished run.
    """
    path = Path(name)
    run = RunFolder(path)
    if run.recipe.is_file():
        recipe = _recipe_of(run)
        full = is_whole(recipe.method)
        weights = run.weights(full)
        if not weights.is_dir():
            raise CoreLoraError(f"{path}: this run is not finished: {weights.name}/ is not there. Train it first.")
        model = replace(recipe.model, name=str(weights)) if full else recipe.model
        return Subject(name, _typed(model, dtype), None if full else weights, Path(output or path), recipe)
    if (path / "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
        if not base:
            raise CoreLoraError(f"{path}: adapter_config.json does not say which model the adapter is for")
        return Subject(name, _typed(ModelPart(name=base), dtype), path, Path(output or path))
    if path.is_dir() and not (path / "config.json").is_file():
        raise CoreLoraError(f"{path}: neither a run (recipe.yaml), nor an adapter (adapter_config.json), nor a model")
    where = Path(output or Path("runs") / f"eval-{path.name.replace(':', '-')}")
    return Subject(name, _typed(ModelPart(name=name), dtype), None, where)


def load_subject(subject: Subject, classes: int | None = None, merge: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer) on the device that there is, in evaluation mode.

    Args:
        subject: what to load.
        classes: number of labels for a classifier (1 for a regression); None for a language model.
        merge: put the adapter into the weights, which saves its time at every token; in bfloat16 it rounds the sum.

    Raises:
        CoreLoraError: weights that can't be read, an adapter of another model.
    """
    auto: Any = AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification
    config = load_model_config(subject.model, **({} if classes is None else {"num_labels": classes}))
    tokenizer = load_tokenizer(subject.model)
    model: Any = load_model(subject.model, config, auto, checkpointing=False)
    if config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if subject.model.quantize is None:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    if subject.adapter is not None:
        model = PeftModel.from_pretrained(model, str(subject.adapter))
        config_of_adapter = next(iter(model.peft_config.values()))
        if merge and subject.model.quantize is None and not config_of_adapter.is_prompt_learning:
            model = model.merge_and_unload()
    model.config.use_cache = True
    return model.eval(), tokenizer


def model_facts(subject: Subject, merged: bool, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What a result says about the model.

    Args:
        subject: what is evaluated.
        merged: an adapter is in the weights.
        dtype: of the weights.
        device: its kind, such as "cuda".
    """
    return {
        "model": subject.model.name,
        "adapter": None if subject.adapter is None else str(subject.adapter),
        "adapter_fingerprint": subject.fingerprint,
        "merged": merged and subject.adapter is not None,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def _typed(model: ModelPart, dtype: str) -> ModelPart:
    """The weights' type: what the user says; else bfloat16 on a GPU that has it."""
    if dtype == "auto" and model.dtype == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        dtype = "bfloat16"
    return model if dtype == "auto" else replace(model, dtype=dtype)


def _recipe_of(run: RunFolder) -> Recipe:
    try:
        data = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError) as error:
        raise CoreLoraError(f"{run.recipe}: can't be read ({error})") from None
    recipe, problems = read_tree(Recipe, data if isinstance(data, dict) else {})
    if recipe is None:
        raise CoreLoraError(f"{run.recipe}: {json.dumps(problems[:3])}")
    return recipe
