"""loop.liger: what is handed to transformers, and what is refused. With a GPU it runs in test_graphs_gpu.py."""

import sys
import types

import pytest
import torch
from transformers import LlamaConfig

from corelora.errors import CoreLoraError
from corelora.train import liger
from corelora.train.arguments import training_arguments
from corelora.train.dry_run import check
from train.helpers import make_recipe


@pytest.fixture
def installed(monkeypatch):
    """A stand-in for the package, and for a GPU where one is asked for."""
    package, patches = types.ModuleType("liger_kernel.transformers"), types.ModuleType("monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": print, "qwen2": print}
    for name, module in (("", types.ModuleType("liger_kernel")), (".transformers", package)):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", module)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: name)


def test_without_the_package(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CoreLoraError, match="pip install liger-kernel"):
        check(make_recipe(folder, loop={"liger": True}), tmp_path / "out")


@pytest.mark.usefixtures("installed")
def test_what_is_refused(folder, monkeypatch):
    recipe = make_recipe(folder, loop={"liger": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert liger.liger_problems(recipe, LlamaConfig()) == ["loop.liger: its kernels need a GPU; leave it out."]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert liger.liger_problems(recipe, LlamaConfig()) == []
    assert liger.liger_problems(recipe, None) == []
    other = LlamaConfig()
    other.model_type = "bert"
    assert "models of the type bert" in liger.liger_problems(recipe, other)[0]


def test_off_is_off(folder, tmp_path):
    recipe = make_recipe(folder)
    assert liger.liger_problems(recipe, LlamaConfig()) == []
    assert not training_arguments(recipe, LlamaConfig(), tmp_path).use_liger_kernel


@pytest.mark.parametrize("graphs", [False, True])
def test_recorded_steps_leave_its_losses_out(folder, monkeypatch, graphs):
    """They count the trained tokens on the host."""
    monkeypatch.setattr(liger, "has_graphs", lambda recipe: graphs)
    given = liger.liger_arguments(make_recipe(folder, loop={"liger": True}))
    assert given["use_liger_kernel"]
    assert given["liger_kernel_config"] == ({"fused_linear_cross_entropy": False} if graphs else None)
