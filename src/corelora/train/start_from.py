"""Beginning from an earlier run: its adapter's factors, or its whole model.

A head of another size stays behind: after MNLI's three labels, MRPC's two begin anew. Everything else must fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from corelora.errors import CoreLoraError
from corelora.recipe.schema import ModelPart

ADAPTER_FILE = "adapter_model.safetensors"


def start_problems(part: ModelPart, full: bool) -> list[str]:
    """What is wrong with `model.start_from`, by its files alone."""
    if part.start_from is None:
        return []
    try:
        weights_folder(part.start_from, full)
    except CoreLoraError as error:
        return [str(error)]
    return []


def weights_folder(given: str, full: bool) -> Path:
    """The folder with weights under a run, an adapter, a checkpoint or a model.

    Args:
        given: `model.start_from`.
        full: a whole model is wanted, not an adapter.

    Raises:
        CoreLoraError: there is none of the wanted kind.
    """
    root, name = Path(given), "model" if full else "adapter"
    for folder in (root / name, root):
        if full and (folder / "config.json").is_file():
            return folder
        if not full and (folder / ADAPTER_FILE).is_file():
            return folder
    if not root.is_dir():
        raise CoreLoraError(f"model.start_from: there is no folder {given}")
    what = "model (config.json)" if full else f"adapter ({ADAPTER_FILE})"
    raise CoreLoraError(f"model.start_from: {given} holds no {what}, nor does {root / name}")


def load_start(model: Any, given: str) -> list[str]:
    """Put an earlier adapter's weights into a model's own, fresh adapter.

    Args:
        model: a PeftModel.
        given: `model.start_from`.

    Returns:
        Names of the tensors that stayed behind: heads of another size.

    Raises:
        CoreLoraError: the adapter is of another method, rank or model.
    """
    folder = weights_folder(given, full=False)
    saved = load_file(folder / ADAPTER_FILE)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    heads = set(model.active_peft_config.modules_to_save or [])
    left = [n for n, t in saved.items() if n in own and own[n].shape != t.shape and _is_head(n, heads)]
    rest = {n: t for n, t in saved.items() if n not in left}
    unknown = sorted(n for n in rest if n not in own)
    missing = sorted(n for n in own if n not in saved and not _is_head(n, heads))
    sizes = sorted(n for n, t in rest.items() if n in own and own[n].shape != t.shape)
    for names, what in ((unknown, "are not in this adapter"), (missing, "are missing"), (sizes, "have another size")):
        if names:
            raise CoreLoraError(
                f"model.start_from: {folder} is an adapter of another kind: {len(names)} tensors {what}, such as "
                f"{names[0]}. Method, ranks and targets must be those of the run that made it."
            )
    set_peft_model_state_dict(model, {**own, **rest})
    return left


def _is_head(name: str, heads: set[str]) -> bool:
    return bool(heads & set(name.split(".")))
