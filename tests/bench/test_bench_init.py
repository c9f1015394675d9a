"""`corelora bench init`, and what it holds the starts to: near the exact SVD, the same again, the base untouched."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model

from corelora.bench.shapes import random_model, shape_config
from corelora.bench.starts import STARTERS, StartBench, StartRequest, factor_digest
from corelora.cli import main
from corelora.errors import CoreLoraError
from corelora.outer import truncated_svd
from corelora.registry import METHODS

SMALL = {"model": "tiny", "r": 8, "k": 2, "dtype": "float32", "rounds": 2, "device": "cpu"}


def bench(**changes) -> StartBench:
    return StartBench(StartRequest(**{**SMALL, **changes}))


def nothing(line) -> None:
    """Where the lines go."""


# -- the randomised solver -----------------------------------------------------------------------------------------


def spectrum(kind: str, n: int = 320) -> torch.Tensor:
    """Singular values, some as weights have them, some harder."""
    falling = torch.arange(n) / n
    return {
        "weight": 0.1 + 0.3 * (1 - falling) + 0.6 * torch.exp(-50 * falling),  # much like SmolLM2's
        "flat": 1 - 0.5 * falling,  # slower than any weight's that was seen
        "steep": 10 ** (-8 * falling),
        "cliff": torch.cat([torch.ones(20), torch.full((n - 20,), 1e-7)]),
        "outlier": torch.cat([torch.tensor([1e3]), 1 - 0.7 * falling[1:]]),
        "ties": torch.ones(n),
    }[kind]


@pytest.mark.parametrize("shape", [(320, 320), (320, 500), (500, 320)])
@pytest.mark.parametrize("kind", ["weight", "flat", "steep", "cliff", "outlier", "ties"])
def test_randomized_keeps_the_energy(kind, shape):
    """At least 99.9 % of the exact truncated SVD's energy (99.8 % where the spectrum is nearly a line), orthonormal
    factors, and values that multiply out.
    """
    o, i = shape
    left, right = torch.linalg.qr(torch.randn(o, 320)).Q, torch.linalg.qr(torch.randn(i, 320)).Q
    W, r = left * spectrum(kind) @ right.T, 48
    U, S, Vh = truncated_svd(W, r, "randomized", torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(W.double())[:r].square().sum()
    kept = (torch.linalg.qr(U.double()).Q.T @ W.double()).square().sum()
    assert (0.998 if kind == "flat" else 0.999) <= kept / exact <= 1 + 1e-6
    for factor in (U.T, Vh):
        torch.testing.assert_close(factor @ factor.T, torch.eye(r), atol=2e-5, rtol=0)
    error = (U * S @ Vh - W).square().sum()
    torch.testing.assert_close(error, (W.double().square().sum() - kept).float(), rtol=1e-3, atol=1e-6 * float(exact))
    assert bool((S.diff() <= 1e-6 * S[0]).all())


def test_randomized_is_the_same_again():
    """One seed, one result, bit for bit; the sign convention of the exact one."""
    W = torch.randn(64, 96)
    first, again = (truncated_svd(W, 8, "randomized", torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    largest = first[2].gather(1, first[2].abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())


def test_randomized_of_a_whole_small_matrix():
    """r as large as the matrix: the exact decomposition, values and all."""
    W = torch.randn(12, 30)
    U, S, Vh = truncated_svd(W, 12, "randomized", torch.Generator().manual_seed(0))
    torch.testing.assert_close(U * S @ Vh, W)
    torch.testing.assert_close(S, torch.linalg.svdvals(W))


# -- the bench -----------------------------------------------------------------------------------------------------


def test_every_start_is_measured_and_the_base_stays():
    """All methods and all of PEFT's starts, PiSSA's too, which puts other weights in the model's place."""
    measured = bench(names=(*STARTERS, *METHODS))
    before = {n: (p.data_ptr(), p.clone()) for n, p in measured.base.named_parameters()}
    rows = measured.run(nothing)
    results = {r["name"]: r for r in rows if r["kind"] == "result"}
    assert set(results) == {*STARTERS, *METHODS}
    assert not measured.left_out
    assert results["peft_lora"]["over_peft_lora"] == 1
    assert all(r["n"] == 2 and r["seconds"] > 0 for r in results.values())
    assert results["slora"]["published_over_lora"] == pytest.approx(1.1198, abs=1e-4)
    for name, parameter in measured.base.named_parameters():
        pointer, value = before[name]
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)


def test_decompositions_are_compared_with_exact_ones():
    """Both solvers, for each method that decomposes; with `energy`, shares between 99.9 % and all of it."""
    rows = [r for r in bench(names=("nora", "pissa"), energy=True).run(nothing) if r["kind"] == "decomposition"]
    assert [(r["name"], r["solver"]) for r in rows] == [
        (n, s) for n in ("nora", "pissa") for s in ("auto", "randomized")
    ]
    for row in rows:
        assert row["same_again"]
        assert 0.999 <= row["worst_layer"] <= row["energy"] <= 1 + 1e-6


def test_starts_from_gradients_are_measured():
    """With triplets of random numbers in place of gradients; they decompose nothing themselves."""
    rows = list(bench(names=("lora_sb", "lora_ga")).run(nothing))
    assert {r["name"] for r in rows} >= {"lora_sb", "lora_ga"}
    assert not [r for r in rows if r["kind"] == "decomposition"]


def test_modules_alone_have_no_values():
    """What is subtracted as "modules" is the same structure without a start."""
    measured = bench(names=("nora",))
    _, with_values = measured.started("nora")
    _, without = measured.started("nora", values=False)
    whole, empty = (dict(m.named_parameters()) for m in (with_values, without))
    assert {n: p.shape for n, p in whole.items()} == {n: p.shape for n, p in empty.items()}
    trained = [n for n in whole if "corelora_" in n]
    assert trained
    assert all(bool(empty[n].isnan().all()) for n in trained)
    assert not any(bool(whole[n].isnan().any()) for n in trained)


def test_the_digest_sees_every_factor():
    """One changed number in one frozen or trained factor changes it."""
    measured = bench(names=("nora",))
    model = measured.started("nora")[1]
    digest = factor_digest(model)
    assert digest == factor_digest(measured.started("nora")[1])
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.corelora_B["default"].start[3, 1] += 1
    assert factor_digest(model) != digest


def test_a_start_that_can_not_be_made_is_left_out():
    """A rank above a weight's side: the rest is measured."""
    measured = bench(names=("nlora", "lora"), r=80)
    assert [r["name"] for r in measured.run(nothing)] == ["peft_lora", "lora"]
    assert "exceeds the smaller side" in measured.left_out["nlora"]


def test_offsets_begin_at_zero_in_the_bases_type():
    """Trained offsets are made where and as they stay: zeros on the weight's device, in its type."""
    model = random_model(shape_config("tiny"), "cpu", torch.bfloat16)
    measured = bench(names=("nlora",), dtype="bfloat16")
    adapted = get_peft_model(model, measured.config("nlora"), autocast_adapter_dtype=False)
    learning = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in learning} == {torch.bfloat16}
    assert not any(bool(p.any()) for p in learning)


def test_mistakes(tmp_path):
    """Names with the nearest, numbers, layers of a folder with weights: together."""
    random_model(shape_config("tiny"), "cpu", torch.float32).save_pretrained(tmp_path)
    with pytest.raises(CoreLoraError) as caught:
        StartRequest(names=("nola", "peft_pisa"), r=0, layers=1, model=str(tmp_path))
    for part in ("'nora'", "'peft_pissa'", "r must be", "layers changes random weights only"):
        assert part in str(caught.value)


def test_a_folder_is_measured_with_its_own_weights(tmp_path):
    """Statistics come from a pass through the real model."""
    random_model(shape_config("tiny"), "cpu", torch.float32).save_pretrained(tmp_path)
    measured = bench(names=("nora",), model=str(tmp_path))
    assert measured.is_real
    assert measured.describe()["weights"] == "real"
    assert measured.describe()["request"]["model"] == tmp_path.name  # results name no place of this machine
    assert set(measured.stats.tokens.values()) == {512}
    assert measured.run(nothing)


def test_the_command(capsys, tmp_path):
    """Lines as they come, two tables, a file."""
    path = tmp_path / "init.jsonl"
    words = "bench init --model tiny --rank 8 --dtype float32 --device cpu --rounds 1 --energy --methods nora,slora"
    assert main([*words.split(), "--json", str(path)]) == 0
    out = capsys.readouterr().out
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["run", *["visit"] * 3, *["result"] * 3, *["decomposition"] * 2, "left out"]
    assert "energy of exact" in out
    assert "PEFT LoRA" in out
    assert "Next:" in out
