"""`corelora bench step`: what is measured is what its name says, one variant never touches another."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from peft import get_peft_model

from corelora.bench import peers, step
from corelora.bench.measure import Device, Spread
from corelora.bench.peers import BASE, PEERS, Ranks, find_peer, fuse_projections, lora_config
from corelora.bench.published import START_SECONDS, TRAINING_SECONDS, published_ratio
from corelora.bench.shapes import random_model, shape_config
from corelora.bench.step import StepBench, StepRequest, Variant
from corelora.cli import main
from corelora.commands.bench import names_of
from corelora.errors import CoreLoraError
from corelora.exportcheck import shared_copy
from corelora.kernels import fast
from corelora.registry import METHODS

SMALL = {"model": "tiny", "batches": (2,), "length": 8, "r": 4, "k": 2, "dtype": "float32", "device": "cpu"}
BRIEF = {**SMALL, "rounds": 1, "steps": 1, "warmup": 1}
TRAINED_LORA_R4 = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 96))  # two layers, q k v o and the three of the MLP


def bench(**changes) -> StepBench:
    return StepBench(StepRequest(**{**BRIEF, **changes}))


def nothing(line) -> None:
    """Where the lines go."""


# -- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("smollm2", 134_515_008),
    ],
)
def test_shapes_are_the_models(model, parameters):
    """Parameter counts of the public models, tied weights counted once."""
    with torch.device("meta"):
        built = random_model(shape_config(model), "meta", torch.bfloat16)
    assert sum(p.numel() for p in built.parameters()) == parameters
    assert not any(p.requires_grad for p in built.parameters())
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("layers", "passed"), [(None, {"base"}), (1, {"base", "slora"})])
def test_some_layers_pass_a_gradient_to_their_input(layers, passed):
    """As in the middle of a model: the first layer of a whole one spares an adapter that, and never the base."""
    measured = bench(names=("slora",), layers=layers)
    seen = {}
    for variant in measured.variants:
        first = variant.model.model.layers[0].self_attn.q_proj
        first.register_forward_pre_hook(lambda _, args, name=variant.name: seen.update({name: args[0].requires_grad}))
        variant.step(measured.ids[:1])
    assert {name for name, needs in seen.items() if needs} == passed


def test_fewer_layers():
    """--layers cuts the model and what its config lists for each layer."""
    assert len(random_model(shape_config("tiny", 1), "cpu", torch.float32).model.layers) == 1
    assert shape_config("qwen2", 2).num_hidden_layers == len(shape_config("qwen2", 2).layer_types) == 2


def test_a_folder_will_do(tmp_path):
    """A saved config has its own shapes."""
    shape_config("tiny").save_pretrained(tmp_path)
    assert shape_config(str(tmp_path)).hidden_size == 64


@pytest.mark.parametrize(("model", "message"), [("llama-2-7", "mean 'llama-2-7b'"), ("vit", "no causal language")])
def test_wrong_models(model, message):
    """The nearest right name, or what is wrong with it."""
    with pytest.raises(CoreLoraError, match=message):
        shape_config(model)


def test_a_twin_shares_weights_and_nothing_else():
    """Adapting a twin leaves the model plain; both see one weight."""
    model = random_model(shape_config("tiny"), "cpu", torch.float32)
    ids = torch.arange(6)[None]
    before = model(ids).logits
    other = shared_copy(model)
    adapted = get_peft_model(other, lora_config(Ranks(r=2, k=1), init_lora_weights=False))
    assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(adapted(ids).logits, before)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert adapted.get_base_model().lm_head.weight is model.lm_head.weight


# -- variants ------------------------------------------------------------------------------------------------------


def test_every_method_and_peer_is_measured():
    """Each name on both paths has a result, the base a ratio of 1; the base weights end as they began."""
    names = (*[n for n, p in PEERS.items() if not p.needs], *names_of("all-methods"))
    measured = bench(names=names)
    before = {n: p.clone() for n, p in measured.base.named_parameters()}
    results = {r["name"]: r for r in measured.run(nothing)}
    assert list(results) == list(dict.fromkeys((BASE, *names)))
    assert not measured.left_out
    assert results[BASE]["ratio"] == 1
    assert results["peft_lora"]["trained"] == results["lora"]["trained"] == TRAINED_LORA_R4
    assert all(torch.equal(p, before[n]) for n, p in measured.base.named_parameters())
    assert all(p.grad is None for p in measured.base.parameters())
    for method in METHODS:
        assert results[method]["trained"] == results[f"{method}:reference"]["trained"] > 0


def test_a_step_trains():
    """The timed step is a whole one: what learns has moved, and only that."""
    measured = bench(names=("slora",))
    variant = next(v for v in measured.variants if v.name == "slora")
    learning = {n for n, p in variant.model.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in variant.model.named_parameters()}
    measured.run(nothing)
    moved = {n for n, p in variant.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == learning


def test_nothing_is_measured_at_zero():
    """Products with zeros draw less power: what starts at zero is filled, by the same numbers in every process."""
    made, again = bench(names=("peft_lora", "slora")), bench(names=("peft_lora", "slora"))
    for one, two in zip(made.variants, again.variants, strict=True):
        learning = [p for p in one.model.parameters() if p.requires_grad]
        assert all(p.any() for p in learning)
        assert all(torch.equal(a, b) for a, b in zip(one.own, two.own, strict=True))


def test_every_round_has_an_order_of_its_own():
    """All are visited once a round; none always follows the same one."""
    made = bench(names=("peft_lora", "slora", "nora", "inttune"), rounds=6)
    orders: dict[int, list[str]] = {}
    for turn, variant in made._visits():
        orders.setdefault(turn, []).append(variant.name)
    assert len(orders) == 6
    assert all(sorted(order) == sorted(v.name for v in made.variants) for order in orders.values())
    before = {name: {o[o.index(name) - 1] for o in orders.values() if o[0] != name} for name in orders[0]}
    assert all(len(names) > 1 for names in before.values())


def test_paths_are_what_they_say(monkeypatch):
    """NAME takes the fused path in every adapted layer, NAME:reference in none, and the mode is put back."""
    calls, mode = [], fast._mode
    fused = fast.fused_forward
    monkeypatch.setattr(fast, "fused_forward", lambda *a: calls.append(1) or fused(*a))
    for name, expected in (("nora", 14), ("nora:reference", 0), ("peft_lora", 0)):
        measured = bench(names=(name,))
        calls.clear()
        variant = measured.variants[1]
        with variant.peer.running("cpu", torch.float32):
            variant.step(measured.ids)
        assert len(calls) == expected, name
    assert fast._mode == mode


def test_gradient_checkpointing_reaches_every_variant():
    """Each twin checkpoints; the result says so in its title only, so the layers are asked."""
    measured = bench(names=("peft_lora", "nlora"), checkpointing=True)
    for variant in measured.variants:
        assert all(layer.gradient_checkpointing for layer in variant.model.model.layers)
    assert len(measured.run(nothing)) == 3


def test_autocast_peer_has_float32_adapters():
    """PEFT's default over bfloat16: float32 factors, products in bfloat16."""
    measured = bench(names=("peft_lora", "peft_lora_fp32"), dtype="bfloat16")
    types = {v.name: {p.dtype for p in v.model.parameters() if p.requires_grad} for v in measured.variants}
    assert types == {BASE: set(), "peft_lora": {torch.bfloat16}, "peft_lora_fp32": {torch.float32}}
    assert PEERS["peft_lora_fp32"].autocast
    measured.run(nothing)


def test_what_does_not_fit_is_left_out_and_the_rest_goes_on(monkeypatch):
    """Out of memory ends one variant at one batch size, in later rounds too."""
    step = Variant.step

    def greedy(self, ids):
        if self.name == "lora" and len(ids) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, ids)

    monkeypatch.setattr(Variant, "step", greedy)
    measured = bench(names=("lora", "slora"), batches=(2, 3), rounds=2)
    found = {(r["name"], r["batch"]): r["n"] for r in measured.run(nothing)}
    assert measured.left_out == {"lora, batch 3": "out of memory"}
    assert found == {(n, b): 2 for n in (BASE, "lora", "slora") for b in (2, 3) if (n, b) != ("lora", 3)}


def test_what_can_not_be_made_is_left_out_with_the_reason():
    """A rank above a weight's side; a library that isn't there."""
    measured = bench(names=("nlora", "lora", "unsloth"), r=80)
    assert "exceeds the smaller side" in measured.left_out["nlora"]
    assert "unsloth" in measured.left_out["unsloth"]
    assert [v.name for v in measured.variants] == [BASE, "lora"]


def test_no_variant_has_elementwise_kernels_by_luck():
    """Where something is compiled, inductor doesn't pick forms by a timing; afterwards its settings are as before."""
    with step._compiling("off"):
        assert inductor.triton.autotune_pointwise
    with step._compiling("both"):
        assert not inductor.triton.autotune_pointwise
    assert inductor.triton.autotune_pointwise


@pytest.mark.slow
def test_compiled_variants_keep_one_graph():
    """torch.compile: no graph break in the base or in the fused path."""
    measured = bench(names=("slora",), compile="on", layers=1)
    results = measured.run(nothing)
    assert {r["name"]: r["graph_breaks"] for r in results} == {BASE: 0, "slora": 0}
    assert all(r["compiled"] for r in results)


def test_unsloths_functions_are_wired_to_the_right_projections():
    """With functions that compute what they replace, a layer that is wired to them gives PEFT's own logits."""
    model = random_model(shape_config("tiny"), "cpu", torch.float32)
    config = lora_config(Ranks(r=2, k=1), init_lora_weights=False)
    adapted = get_peft_model(shared_copy(model), config)
    ids = torch.arange(12).view(2, 6)
    expected = adapted(ids).logits
    calls = []
    kernels = SimpleNamespace(
        apply_lora_qkv=lambda m, x: calls.append("qkv") or (m.q_proj(x), m.k_proj(x), m.v_proj(x)),
        apply_lora_o=lambda m, x: calls.append("o") or m.o_proj(x),
        apply_lora_mlp_swiglu=lambda m, x: calls.append("mlp") or m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)),
    )
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    for layer in adapted.get_base_model().model.layers:
        fuse_projections(layer, kernels)
    torch.testing.assert_close(adapted(ids).logits, expected)
    assert calls == ["qkv", "o", "mlp"] * 2
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == count


# -- figures -------------------------------------------------------------------------------------------------------


def test_spread():
    """The median and the tenth percentiles from either end."""
    assert Spread.of([5.0, 1.0, 3.0]) == Spread(3.0, 1.0, 5.0, 3)
    assert Spread.of([float(n) for n in range(20)]) == Spread(9.5, 2.0, 17.0, 20)


def test_ratios_are_of_medians_in_the_same_mode_and_batch():
    """Ratios to the base and to PEFT LoRA at the same batch; memory over the base's."""
    measured = bench(names=("peft_lora", "slora"), batches=(2, 3))
    for batch, base in ((2, 10.0), (3, 40.0)):
        for name, factor in ((BASE, 1.0), ("peft_lora", 1.25), ("slora", 1.5)):
            measured.times[name, False, batch] = [factor * base] * 3
            measured.peaks[name, False, batch] = 1 + factor
    found = {(r["name"], r["batch"]): r for r in measured.results()}
    for batch in (2, 3):
        assert found["slora", batch]["ratio"] == 1.5
        assert found["slora", batch]["over_peft_lora"] == 1.2
        assert found["slora", batch]["gib_over_base"] == 0.5


def test_published_times():
    """The NLoRA paper's own percentages follow from its seconds."""
    assert published_ratio(TRAINING_SECONDS, "slora:reference") == pytest.approx(1.1013, abs=1e-4)
    assert published_ratio(TRAINING_SECONDS, "nlora") == pytest.approx(1.0072, abs=1e-4)
    assert published_ratio(TRAINING_SECONDS, "inttune") == pytest.approx(0.8527, abs=1e-4)
    assert published_ratio(START_SECONDS, "nlora") == pytest.approx(2.0, abs=0.01)
    assert published_ratio(TRAINING_SECONDS, "nora") is None


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_lines_and_a_table(capsys, tmp_path):
    """Visits as they come, results, a table; the file has the same lines."""
    path = tmp_path / "out" / "step.jsonl"
    words = "bench step --model tiny --batch 2 3 --length 8 --rank 4 --dtype float32 --device cpu --rounds 2 --steps 1"
    assert main([*words.split(), "--warmup", "1", "--methods", "peft_lora,nora,unsloth", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [json.loads(line) for line in out.splitlines() if line.startswith("{")] == lines
    kinds = [line["kind"] for line in lines]
    assert kinds == ["run", *["visit"] * 12, *["result"] * 6, "left out"]
    assert lines[0]["request"]["k"] == 1
    assert "batch 3, eager" in out
    assert "not measured: unsloth:" in out
    assert "Next:" in out


def test_all_mistakes_at_once(capsys):
    """Unknown names with the nearest, numbers that can't be: one message, before a model is made."""
    words = "bench step --methods nlara,peft_lore,nora:fsat --rank 0 --batch 0 --rounds 0"
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    for part in (
        "Did you mean 'nlora'",
        "Did you mean 'peft_lora'",
        "Did you mean 'fast'",
        "r must",
        "batch 0",
        "rounds",
    ):
        assert part in error


def test_names():
    """Commas, spaces, and all methods on both paths."""
    assert names_of(" base, nora ,") == ("base", "nora")
    assert names_of("base,all-methods")[1:3] == (sorted(METHODS)[0], f"{sorted(METHODS)[0]}:reference")
    assert find_peer("nora:fast").mode == "on"
    assert find_peer("nora:reference").mode == "off"
    assert find_peer("inttune:none").title == "IntTune, raw slices"
    model = find_peer("inttune:unit").adapt(random_model(shape_config("tiny"), "cpu", torch.float32), Ranks(r=4, k=2))
    assert model.peft_config["default"].slice_scale == "unit"
    assert peers.PEERS["unsloth"].missing()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_of_one_variant_alone():
    """What a variant trains is on the GPU only while it is visited, so peaks do not depend on who else is measured."""
    settings = {"device": "cuda", "dtype": "bfloat16", "batches": (4,), "length": 128, "r": 32}
    alone = {r["name"]: r["gib"] for r in bench(names=("lora",), **settings).run(nothing)}
    measured = bench(names=("slora", "peft_dora", "lora"), **settings)
    together = {r["name"]: r["gib"] for r in measured.run(nothing)}
    assert together["lora"] == pytest.approx(alone["lora"], rel=0.02)
    assert not any(t.is_cuda for v in measured.variants for t in v.own)
    assert Device("cuda").peak_gib() is not None


def test_a_folded_variant_leaves_the_shared_weights_alone():
    """Its start is in them while it is measured; the next variant sees them as they were."""
    made = bench(names=("nlora", "nlora:folded"))
    before = {n: p.clone() for n, p in made.base.named_parameters()}
    folded = next(v for v in made.variants if v.name == "nlora:folded")
    with folded.folded():
        assert all(not torch.equal(before[n], p) for n, p in made.base.named_parameters() if "proj" in n)
    rows = {r["name"]: r for r in made.run(nothing)}
    assert rows["nlora"]["trained"] == rows["nlora:folded"]["trained"] > 0
    assert all(torch.equal(before[n], p) for n, p in made.base.named_parameters())
