"""Liger's kernels for what stands around the adapters: norms, rotations, activations of the MLP, and the loss.

`loop.liger` hands over to transformers' own switch. The library is Liger-Kernel (Hsu 2024, arXiv 2410.10989).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from transformers import PretrainedConfig

from corelora.recipe import Recipe
from corelora.train.graphs import has_graphs


def liger_arguments(recipe: Recipe) -> dict[str, Any]:
    """Trainer's settings. Liger's losses count the trained tokens on the host, which no recorded step can do."""
    if not recipe.loop.liger:
        return {}
    losses = {"fused_linear_cross_entropy": False} if has_graphs(recipe) else None
    return {"use_liger_kernel": True, "liger_kernel_config": losses}


def liger_problems(recipe: Recipe, config: PretrainedConfig | None) -> list[str]:
    """What stands against Liger: no package, no GPU, a model that it has no kernels for."""
    if not recipe.loop.liger:
        return []
    if importlib.util.find_spec("liger_kernel") is None:
        return ["loop.liger: Liger is not installed. Install it with: pip install liger-kernel"]
    if not torch.cuda.is_available():
        return ["loop.liger: its kernels need a GPU; leave it out."]
    kind = getattr(config, "model_type", None)
    if kind is None:
        return []
    known = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    return [] if kind in known else [f"loop.liger: Liger has no kernels for models of the type {kind}; leave it out."]
