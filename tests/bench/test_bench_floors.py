"""The counted floors, against operations that PyTorch counts while the layers run, and the plots of the documents."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from corelora.bench.floors import all_shapes, floor
from corelora.bench.peers import Ranks, core_config
from corelora.kernels.fast import set_fast
from corelora.registry import METHODS

DOCS = Path(__file__).resolve().parents[2] / "docs"
RANKS = Ranks(r=8, k=3, target_modules=["0"])
OUT, IN, TOKENS = 48, 32, 20


def counted(layer: nn.Module) -> float:
    """Multiplications of a forward and backward pass over some tokens, for each token."""
    x = torch.randn(TOKENS, IN, requires_grad=True)
    before = set_fast("off")  # the fused path multiplies into its output, which PyTorch does not count
    try:
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
            y.backward(torch.randn_like(y))
    finally:
        set_fast(before)
    return counter.get_total_flops() / 2 / TOKENS


def adapted(method: str) -> nn.Module:
    """One adapted layer."""
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    return get_peft_model(model, core_config(method, RANKS), autocast_adapter_dtype=False)


HELD = [m for m in METHODS if METHODS[m].default.outer != "nystrom" and METHODS[m].default.start != "subtract"]


@pytest.mark.parametrize("method", HELD)
def test_floors_are_what_plain_modules_compute(method):
    """Where nothing is read from W, plain modules do no more and no less than the count."""
    base = counted(nn.Sequential(nn.Linear(IN, OUT, bias=False)).requires_grad_(False))
    assert base == 2 * OUT * IN
    assert counted(adapted(method)) / base == pytest.approx(floor(method, [(OUT, IN)], RANKS).times_base, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_plain_modules_never_compute_less(method):
    """A floor is a floor, also where plain modules read slices of W that come free."""
    lowest = floor(method, [(OUT, IN)], RANKS).times_base
    assert counted(adapted(method)) / (2 * OUT * IN) >= lowest - 1e-9


def test_floors_on_llama():
    """LLaMA-2-7B, r = 128, by hand: 6, 6, 4, 2 and 8 thin products of 128 (o + i) over 4 o i of the base."""
    shapes = all_shapes("llama-2-7b")
    assert len(shapes) == 7
    thin = sum(128 * (o + i) for o, i in shapes) / sum(4 * o * i for o, i in shapes)
    counts = {"lora": 6, "slora": 6, "nora": 4, "inttune": 2, "nlora": 8}
    for method, products in counts.items():
        assert floor(method, shapes, Ranks(r=128, k=32)).times_base == pytest.approx(1 + products * thin, abs=2e-3)


def test_what_is_saved():
    """x only where A trains; an offset beside its start makes the features twice as wide."""
    saved = {m: floor(m, [(OUT, IN)], RANKS) for m in METHODS}
    blind = {"inttune", "nora", "lora_xs", "lora_fa", "lora_mini", "lora_sb"}  # to their input, in the backward pass
    assert {m for m, s in saved.items() if not s.saves_input} == blind
    assert {m for m, s in saved.items() if s.saved == 16} == {"nlora", "pissa", "lora_ga"}


def test_plots(tmp_path):
    """Both figures are drawn from result files."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("make_plots", DOCS / "make_plots.py")
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    source = DOCS / "results" / "step-h100.jsonl"
    plots.draw_step(source, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 5000
    plots.draw_batches(DOCS / "results" / "step-h200.jsonl", tmp_path / "batches.png", ("base", "nora"))
    assert (tmp_path / "batches.png").stat().st_size > 5000
