"""`corelora bench serve`: each form of an adapter is what it says, and computes what the adapter computes."""

from __future__ import annotations

import json

import pytest
import torch
from peft.tuners.lora import LoraLayer

from corelora.bench.peers import BASE
from corelora.bench.serve import FORMS, PHASES, ServeBench, ServeRequest
from corelora.cli import main
from corelora.errors import CoreLoraError
from corelora.registry import METHODS
from corelora.tuner_layer import CoreLoraLayer

SMALL = {"model": "tiny", "length": 6, "r": 4, "k": 2, "dtype": "float32", "rounds": 1, "steps": 1, "warmup": 1}


def bench(**changes) -> ServeBench:
    return ServeBench(ServeRequest(**{**SMALL, "device": "cpu", **changes}))


def nothing(line) -> None:
    """Where the lines go."""


@pytest.mark.parametrize("method", ["nora", "nlora"])
def test_all_forms_of_an_adapter_agree(method):
    """Fast, plain, merged and exported give one set of logits, which is not the base's."""
    names = tuple(f"{method}:{form}".rstrip(":") for form in FORMS)
    measured = bench(names=names)
    found = {}
    with torch.no_grad():
        for name, (peer, model) in measured.variants.items():
            with peer.running("cpu", torch.float32):
                found[name] = model(input_ids=measured.ids).logits
    assert not torch.allclose(found[method], found[BASE], atol=1e-2)
    for name in names[1:]:
        torch.testing.assert_close(found[name], found[method], rtol=1e-3, atol=1e-3)


def test_forms_are_what_they_say():
    """Merged layers hold their own weights and no more work; exported ones are PEFT's; the shared base is untouched."""
    measured = bench(names=("nora", "nora:merged", "nora:exported", "nora:reference"))
    weight = measured.base.model.layers[0].mlp.up_proj.weight
    kept = {name: model.model.layers[0].mlp.up_proj for name, (_, model) in measured.variants.items()}
    assert kept[BASE].weight is kept["nora"].base_layer.weight is kept["nora:exported"].base_layer.weight is weight
    assert kept["nora:merged"].merged
    assert not torch.equal(kept["nora:merged"].base_layer.weight, weight)
    assert isinstance(kept["nora:exported"], LoraLayer)
    assert isinstance(kept["nora"], CoreLoraLayer)
    assert {n: p.mode for n, (p, _) in measured.variants.items() if n != BASE} == {
        "nora": "on",
        "nora:merged": "on",
        "nora:exported": "on",
        "nora:reference": "off",
    }


def test_every_method_is_measured_in_both_phases():
    """All methods, PEFT's own, prefill and decode; the base's ratio is 1."""
    measured = bench(names=("peft_lora", "peft_dora", *METHODS), rounds=2, steps=3)
    rows = measured.run(nothing)
    assert {(r["phase"], r["name"]) for r in rows} == {
        (p, n) for p in PHASES for n in (BASE, "peft_lora", "peft_dora", *METHODS)
    }
    assert all(r["n"] == 6 for r in rows)
    assert all(r["ratio"] == 1 for r in rows if r["name"] == BASE)
    assert not measured.left_out


def test_decode_is_one_token_on_a_full_cache():
    """Each timed pass sees one new token after `length` cached ones."""
    measured = bench(names=(), steps=3)
    model = measured.variants[BASE][1]
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((kwargs["input_ids"].shape[1], cached(kwargs))), with_kwargs=True
    )
    assert len(measured._passes(model, "decode")) == 3
    assert seen == [(6, 0), *[(1, 6)] * 4]


def cached(kwargs) -> int:
    """Tokens in the cache that a pass was given."""
    return kwargs["past_key_values"].get_seq_length()


def test_mistakes():
    """A form that no adapter has, a peer that only trains, numbers: together, with the nearest."""
    with pytest.raises(CoreLoraError) as caught:
        ServeRequest(names=("nora:merge", "liger", "nlara"), length=0)
    for part in ("'merged'", "'liger'", "'nlora'", "length must be"):
        assert part in str(caught.value)


def test_what_can_not_be_made_is_left_out():
    """A rank that no slice has."""
    measured = bench(names=("nlora", "lora"), r=80)
    assert list(measured.variants) == [BASE, "lora"]
    assert "exceeds" in measured.left_out["nlora"]


def test_the_command(capsys, tmp_path):
    """Lines, a table, a file."""
    path = tmp_path / "serve.jsonl"
    words = "bench serve --model tiny --rank 4 --length 6 --dtype float32 --device cpu --rounds 1 --steps 1 --warmup 0"
    assert main([*words.split(), "--methods", "nora,nora:exported", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["run", *["visit"] * 6, *["result"] * 6, "left out"]
    assert "NoRA, exported to PEFT LoRA" in out
    assert "one token more" in out
