"""AdaLoRA's part of a run: its budget moves with the steps, and goes on where a run was cut.

PEFT leaves the call to the training loop, and saves only the ranks that are left. To go on, a checkpoint needs all of
them, beside the importance that each has had so far.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import AdaLoraModel, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

FILE = "adalora.safetensors"
IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator: a tensor for each parameter


def adalora_of(model: nn.Module) -> AdaLoraModel | None:
    """The AdaLoRA inside a model, None where it carries none."""
    inner = model.base_model if isinstance(model, PeftModel) else None
    return inner if isinstance(inner, AdaLoraModel) else None


class AdaLoraSteps(TrainerCallback):
    """Tells AdaLoRA each step.

    Args:
        checkpoint: where the run goes on.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Once the weights are those of the checkpoint: PEFT would cut them to the ranks that are left."""
        if self.checkpoint is not None:
            load_budget(model, self.checkpoint)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Between the update and the clearing of the gradients, which it reads."""
        inner = adalora_of(model)
        assert inner is not None
        inner.update_and_allocate(state.global_step + 1)


@contextmanager
def all_ranks(model: nn.Module) -> Iterator[None]:
    """Meanwhile PEFT saves the ranks that AdaLoRA has pruned, too; without AdaLoRA nothing happens."""
    inner = adalora_of(model)
    if inner is None:
        yield
        return
    config: Any = inner.peft_config[inner.trainable_adapter_name]
    left, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = left


def save_budget(model: nn.Module, folder: Path) -> None:
    """Write which ranks AdaLoRA has left and how important each has been, into a checkpoint."""
    inner = adalora_of(model)
    assert inner is not None
    config: Any = inner.peft_config[inner.trainable_adapter_name]
    tables = {kind: getattr(inner.rankallocator, kind) for kind in IMPORTANCE}
    tensors = {f"{kind}/{name}": t.contiguous() for kind, table in tables.items() for name, t in table.items()}
    save_file(tensors, folder / FILE, metadata={"rank_pattern": json.dumps(config.rank_pattern)})


def load_budget(model: nn.Module, folder: Path) -> None:
    """Read it back."""
    inner = adalora_of(model)
    assert inner is not None
    places = {name: p.device for name, p in inner.model.named_parameters()}
    config: Any = inner.peft_config[inner.trainable_adapter_name]
    with safe_open(folder / FILE, framework="pt") as file:
        config.rank_pattern = json.loads(file.metadata()["rank_pattern"])
        for key in file.keys():  # noqa: SIM118  (no mapping)
            kind, _, name = key.partition("/")
            getattr(inner.rankallocator, kind)[name] = file.get_tensor(key).to(places[name])
