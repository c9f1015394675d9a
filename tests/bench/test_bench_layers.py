"""`corelora bench layers`: both paths of every method on every shape of a model, and what the figures mean."""

from __future__ import annotations

import json

import pytest
import torch

from corelora.bench import layers
from corelora.bench.layers import PASSES, LayersBench, LayersRequest, layer_shapes, overall
from corelora.cli import main
from corelora.errors import CoreLoraError
from corelora.kernels import fast
from corelora.registry import METHODS
from corelora.tuner_layer import CoreLoraLayer

SMALL = {"model": "tiny", "r": 4, "k": 2, "rounds": 1, "steps": 2, "warmup": 1, "device": "cpu"}


def bench(**changes) -> LayersBench:
    return LayersBench(LayersRequest(**{**SMALL, "dtypes": ("float32",), "tokens": (3,), **changes}))


def nothing(line) -> None:
    """Where the lines go."""


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        ("smollm2", [(576, 576), (192, 576), (1536, 576), (576, 1536)]),
        ("llama-2-7b", [(4096, 4096), (11008, 4096), (4096, 11008)]),
    ],
)
def test_shapes(model, shapes):
    """Each once; the output embeddings are no adapted layer."""
    assert layer_shapes(model) == shapes


def test_every_method_on_every_shape(monkeypatch):
    """A ratio for each shape, a mean for each type and number of tokens, in both passes."""
    monkeypatch.setattr(layers, "SHORT", 1)  # each pass timed by itself; the next test counts what is timed together
    measured = bench(names=tuple(METHODS), dtypes=("float32", "bfloat16"), tokens=(1, 5))
    rows = measured.run(nothing)
    assert len(rows) == len(METHODS) * 2 * 2 * len(PASSES)
    assert all(set(r["ratios"]) == {"64 x 64", "96 x 64", "64 x 96"} for r in rows)
    assert not measured.left_out


def test_both_paths_are_taken(monkeypatch):
    """As often the fused one as the other, on three shapes, in both passes."""
    calls = {"fused": 0, "plain": 0}
    layer = CoreLoraLayer
    fused, plain = fast.fused_forward, layer.adapter_output

    def counted(path, work):
        def call(*args):
            calls[path] += 1
            return work(*args)

        return call

    monkeypatch.setattr(fast, "fused_forward", counted("fused", fused))
    monkeypatch.setattr(layer, "adapter_output", counted("plain", plain))
    bench(names=("slora",)).run(nothing)
    # 3 shapes, 2 passes, 3 turns, an untimed pass and 32 // 3 timed; auto takes the fused one where nothing learns
    assert calls == {"fused": 11 * (18 + 9), "plain": 11 * (18 + 9)}


def test_the_backward_pass_is_whole(monkeypatch):
    """Input and factors get gradients in the first pass, nothing does in the second."""
    measured = bench(names=("slora",))
    model = measured._adapted("slora", torch.float32)
    layer = model.get_submodule("base_model.model.layer0")
    seen = []
    for parameter in (p for p in layer.parameters() if p.requires_grad):
        parameter.register_hook(lambda g: seen.append(g.shape))
    measured._measure(model, ("slora", "float32", 3, PASSES[1]))
    assert not seen
    measured._measure(model, ("slora", "float32", 3, PASSES[0]))
    assert len(seen) == 3 * 3 * 3 * 11  # factors, paths, turns, passes of a turn


def test_means_are_geometric():
    """Twice as fast on one shape and half as fast on another is no difference."""
    measured = bench(names=("lora",))
    times = {(4, 4): {"fast": [1.0], "reference": [2.0]}, (8, 4): {"fast": [6.0], "reference": [3.0]}}
    times[4, 4]["auto"], times[8, 4]["auto"] = [1.0], [3.0]
    measured.times["lora", "float32", 3, PASSES[0]] = times
    measured.times["lora", "float32", 5, PASSES[0]] = {(4, 4): {"fast": [1.0], "reference": [4.0], "auto": [4.0]}}
    rows = measured.results()
    assert [r["mean"] for r in rows] == [1.0, 0.25]
    assert rows[0]["ratios"] == {"4 x 4": 0.5, "8 x 4": 2.0}
    assert rows[0]["auto_ratios"] == {"4 x 4": 0.5, "8 x 4": 1.0}
    assert overall(rows, PASSES[0]) == pytest.approx(0.5)
    assert overall(rows, PASSES[0], "auto") == pytest.approx(0.5**0.25, abs=1e-4)
    assert overall(rows, PASSES[1]) is None


def test_mistakes():
    """Unknown names with the nearest, numbers, empty lists: together."""
    with pytest.raises(CoreLoraError) as caught:
        LayersRequest(names=("nura",), dtypes=("float31",), tokens=(0,), steps=0)
    for part in ("'nora'", "'float32'", "tokens 0", "steps must"):
        assert part in str(caught.value)
    with pytest.raises(CoreLoraError, match="at least one method"):
        LayersRequest(names=())


def test_the_command(capsys, tmp_path):
    """Lines, two tables, the mean of all."""
    path = tmp_path / "layers.jsonl"
    words = "bench layers --model tiny --rank 4 --dtype float32 --device cpu --rounds 1 --steps 1 --tokens 1 3"
    assert main([*words.split(), "--methods", "nora,slora", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["run", *["visit"] * 2, *["result"] * 8, "left out"]
    assert "64 x 64, 96 x 64, 64 x 96" in out
    assert "all together, forward and backward:" in out
