"""CoreLoraConfig: every wrong input answered in the user's own words, and settings that mean what LoraConfig's mean."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import corelora.spec
from corelora import CoreLoraConfig, InputStats
from corelora.errors import CoreLoraError, UnknownSettingError
from corelora.registry import METHODS, OUTERS


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


IDS = torch.arange(8)[None]

# what is given -> what the message must say
WRONG = {
    "unknown method": ({"method": "nlorra"}, r"unknown method 'nlorra'\. Did you mean 'nlora'\? Known: .*slora"),
    "unknown variant": ({"variant": "publised"}, r"unknown variant 'publised'\. Did you mean 'published'"),
    "unknown outer": ({"outer": "nystroem"}, r"unknown outer start 'nystroem'\. Did you mean 'nystrom'"),
    "unknown core": ({"core": "nestd"}, r"unknown core structure 'nestd'\. Did you mean 'nested'"),
    "unknown start": ({"start": "substract"}, r"unknown start 'substract'\. Did you mean 'subtract'"),
    "unknown core start": ({"core_start": "kaming"}, r"unknown core start 'kaming'\. Did you mean 'kaiming'"),
    "unknown sampling": ({"sampling": "leverge"}, r"unknown sampling 'leverge'\. Did you mean 'leverage'"),
    "unknown factor": ({"train": "A Core"}, r"unknown factor in `train` 'Core'\. Did you mean 'core'"),
    "nothing trains": ({"train": []}, r"`train` is empty: name at least one of A, core, B"),
    "only a core that is not there": ({"core": "none", "train": "core"}, r"`core` is 'none': nothing would learn"),
    "zero start that is not": (
        {"start": "zero"},
        r"start 'zero' needs a starting product of zero.*'subtract' or 'as_is'",
    ),
    "frozen zero B": (
        {"method": "lora", "train": "A"},
        r"B starts at zero .* is not trained: the adapter could do not",
    ),
    "two zeros": ({"method": "slora", "core_start": "zeros"}, r"both start at zero: neither would ever get a gradient"),
    "nystrom core without slices": (
        {"outer": "svd", "core_start": "nystrom"},
        r"core_start 'nystrom' needs `outer: nystrom`, not 'svd'",
    ),
    "core start that does not fit": ({"core": "nested"}, r"core 'nested' can't start as 'identity': zero_b, "),
    "position": ({"position": "both"}, r"position 'both' is for nested and parallel cores, not for 'dense'"),
    "core std": ({"core_std": -1.0}, r"core_std must be a number of at least 0, or '1/r', got -1"),
    "pinv rtol": ({"pinv_rtol": 2.0}, r"pinv_rtol must be in \[0, 1\), got 2"),
    "r": ({"r": 0}, r"r must be a whole number of at least 1, got 0"),
    "r of a pattern": ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern\['q_proj'\] must be a whole number.*got 2\.5"),
    "k above r": (
        {"method": "nora", "stats": "weight", "r": 8, "inner_r": 9},
        r"inner_r \(k\) must be .* r = 8, got 9",
    ),
    "negative alpha": ({"alpha": -4}, r"alpha must be positive, got -4"),
    "alpha of a pattern": ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\] must be positive, got 0"),
    "alpha as text": ({"alpha": "16"}, r"alpha must be a number, got '16'"),
    "r as text": ({"r": "16"}, r"r must be a whole number of at least 1, got '16'"),
    "dropout": ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
    "dropout as text": ({"dropout": "0.1"}, r"dropout must be a number, got '0\.1'"),
    "bias": ({"bias": "lora_only"}, r"unknown bias 'lora_only'\. Did you mean 'corelora_only'"),
    "on_small_layer": ({"on_small_layer": "clp"}, r"unknown on_small_layer 'clp'\. Did you mean 'clip'"),
    "svd_solver": ({"svd_solver": "exat"}, r"unknown svd_solver 'exat'\. Did you mean 'exact'"),
    "stats": ({"method": "nora", "stats": 3}, r"stats must be statistics, a path or 'weight', got 3"),
    "target_parameters": ({"target_parameters": ["w"]}, r"target_parameters is not supported: name modules"),
    "layers_pattern": ({"layers_pattern": "layers"}, r"layers_pattern needs layers_to_transform"),
    "newer format": ({"adapter_format": 99}, r"file format 99, but this corelora reads up to 1: upgrade corelora"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name):
    """Each mistake is one sentence that names the setting, the value and the way out."""
    given, message = WRONG[name]
    with pytest.raises(CoreLoraError, match=message):
        CoreLoraConfig(**given)


def test_several_mistakes_are_reported_together():
    """Three mistakes, one error, three lines."""
    with pytest.raises(CoreLoraError, match="3 problems") as caught:
        CoreLoraConfig(method="nlorra", r=0, alpha=-1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "nlora" in lines[1]
    assert "r must be" in lines[2]
    assert "alpha must be" in lines[3]


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("lora_alpha", "alpha"),
        ("lora_dropout", "dropout"),
        ("init_lora_weights", "init_weights"),
        ("lora_bias", "bias"),
        ("rank", "r"),
        ("use_rslra", "use_rslora"),
        ("target_module", "target_modules"),
    ],
)
def test_other_names(given, right):
    """A LoraConfig name, or a typing mistake, is answered with the name that is meant."""
    with pytest.raises(UnknownSettingError, match=rf"no setting '{given}': use '{right}'\."):
        CoreLoraConfig(**{given: 1})


def test_unknown_keywords_come_together():
    with pytest.raises(UnknownSettingError, match=r"'lora_alpha': use 'alpha'\. .*'zzz'"):
        CoreLoraConfig(lora_alpha=1, zzz=2)


def saved_adapter(tmp_path, **settings):
    conf = CoreLoraConfig(**({"method": "nlora", "r": 4, "target_modules": ["q_proj"]} | settings))
    model = get_peft_model(llama(), conf)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path)
    return model


def edit_config(tmp_path, **changes):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_key_in_a_file_is_an_error(tmp_path):
    """PEFT's loader only warns of keys that it does not know; ours stops."""
    saved_adapter(tmp_path)
    edit_config(tmp_path, slice_scal="unit")
    with pytest.raises(UnknownSettingError, match="no setting 'slice_scal': use 'slice_scale'"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(UnknownSettingError, match="'slice_scal'"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_file_of_a_newer_format(tmp_path):
    """Said before anything else, even where the newer file has keys that this version does not know."""
    saved_adapter(tmp_path)
    edit_config(tmp_path, adapter_format=2)
    with pytest.raises(CoreLoraError, match=r"file format 2.*upgrade corelora"):
        PeftModel.from_pretrained(llama(), tmp_path)
    edit_config(tmp_path, adapter_format=2, brand_new_setting=True)
    with pytest.raises(CoreLoraError, match=r"file format 2.*upgrade corelora"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_truncated_file(tmp_path):
    saved_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CoreLoraError, match=r"adapter_model\.safetensors is truncated or damaged .*again"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_an_adapter_of_another_base(tmp_path):
    """Recognised by sampled entries of the weights; the layer and the size of the difference are named."""
    saved_adapter(tmp_path)
    with pytest.raises(CoreLoraError, match=r"layers\.0\.self_attn\.q_proj: .*another base model .*differ by \d+ %"):
        PeftModel.from_pretrained(llama(seed=5), tmp_path)
    PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path)  # the same model in another dtype passes


@pytest.mark.parametrize("bad", [-3, 16])
def test_indices_out_of_range_in_a_file(tmp_path, bad):
    saved_adapter(tmp_path, sampling="random")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "corelora_A" in k and k.endswith("index"))
    tensors[key][1] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CoreLoraError, match=rf"sampling indices for A run from .*{bad}.* the weight has 16 rows"):
        PeftModel.from_pretrained(llama(), tmp_path)


def state_of(model: nn.Module):
    return {n: t.clone() for n, t in model.state_dict().items()}, [type(m) for m in model.modules()]


BROKEN = {
    "no match": (
        {"target_modules": ["q_prj"]},
        {},
        r"target_modules: 'q_prj' matches no module\. Did you mean 'q_proj'\?",
    ),
    "one of several does not match": (
        {"target_modules": ["q_proj", "layers.0.mlp.upproj"]},
        {},
        r"target_modules: 'layers\.0\.mlp\.upproj' matches no module\. Did you mean 'up_proj'\?",
    ),
    "an expression that matches nothing": (
        {"target_modules": r"layers\.0\.q_proj"},
        {},
        r"the expression 'layers.*q_proj' matches no module's full name",
    ),
    "r too large": (
        {"r": 9, "target_modules": ["q_proj", "k_proj"]},
        {},
        r"r = 9 exceeds the smaller side of 3 targeted weight.*layers\.0\.self_attn\.k_proj \[8, 16\].*"
        r"largest r that fits all is 8; `on_small_layer: clip`",
    ),
    "svd too": (
        {"method": "pissa", "r": 17, "target_modules": ["q_proj"]},
        {},
        r"r = 17 exceeds .*largest r that fits all is 16",
    ),
    "nan in a weight": (
        {"target_modules": ["q_proj", "k_proj"]},
        {"model.layers.2.self_attn.k_proj.weight": float("nan")},
        r"layers\.2\.self_attn\.k_proj: the base weight holds NaN",
    ),
    "nan in a weight, svd": (
        {"method": "pissa", "target_modules": ["q_proj"]},
        {"model.layers.1.self_attn.q_proj.weight": float("nan")},
        r"layers\.1\.self_attn\.q_proj: the base weight holds NaN",
    ),
    "no statistics": ({"method": "nora"}, {}, r"needs input statistics: collect them with"),
    "not a layer that can be adapted": (
        {"target_modules": ["input_layernorm"]},
        {},
        r"input_layernorm is a LlamaRMSNorm, which corelora can't adapt",
    ),
    "k above a layer's r": (
        {"method": "nora", "stats": "weight", "inner_r": 4, "rank_pattern": {"k_proj": 3}},
        {},
        r"k_proj: .*inner_r \(k\) must be between 1 and r = 3, got 4",
    ),
    "several": (
        {"method": "nora", "r": 9, "target_modules": ["k_proj", "input_layernorm"]},
        {},
        r"(?s)problems.*which corelora can't adapt.*r = 9 exceeds.*needs input statistics",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_only_the_model_shows_and_that_it_is_left_alone(name):
    """The message, and the model afterwards: bit for bit as it was, no wrapper, no peft_config."""
    given, spoilt, message = BROKEN[name]
    base = llama()
    with torch.no_grad():
        for key, bad in spoilt.items():
            base.get_parameter(key)[3, 4] = bad
    tensors, kinds = state_of(base)
    conf = CoreLoraConfig(**({"method": "nlora", "r": 4, "target_modules": ["q_proj", "k_proj"]} | given))
    with pytest.raises((CoreLoraError, ValueError), match=message):
        get_peft_model(base, conf)
    after, kinds_after = state_of(base)
    assert kinds_after == kinds
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[k].nan_to_num(7), tensors[k].nan_to_num(7)) for k in tensors)
    assert all(p.requires_grad for p in base.parameters())
    assert not hasattr(base, "peft_config")


def test_a_failed_second_adapter_leaves_the_first_alone():
    """No trace of it in the config, the layers or the output."""
    model = get_peft_model(llama(), CoreLoraConfig(method="lora", r=2, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
        model.get_parameter("base_model.model.model.layers.2.self_attn.v_proj.weight")[0, 0] = float("inf")
    expected, (tensors, kinds) = model(IDS).logits, state_of(model)
    with pytest.raises(CoreLoraError, match=r"layers\.2\.self_attn\.v_proj: the base weight holds NaN or infinite"):
        model.add_adapter("bad", CoreLoraConfig(method="nlora", r=4, target_modules=["q_proj", "v_proj"]))
    assert set(model.peft_config) == {"default"}
    after, kinds_after = state_of(model)
    assert kinds_after == kinds
    assert after.keys() == tensors.keys()
    assert torch.equal(model(IDS).logits.nan_to_num(7), expected.nan_to_num(7))


def test_on_small_layer_clip():
    """Each small layer takes its own largest rank; its scale stays 1 by default; k follows."""
    conf = CoreLoraConfig(r=12, target_modules=["q_proj", "k_proj"], on_small_layer="clip")
    model = get_peft_model(llama(), conf)
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.factors("default")["A"].plan.shape == (12, 16)
    assert attention.k_proj.factors("default")["A"].plan.shape == (8, 16)
    assert attention.k_proj.scaling["default"] == 1
    get_peft_model(llama(), CoreLoraConfig(method="lora", r=40, target_modules=["k_proj"]))  # PEFT's LoRA allows it


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": r".*layers\.[02].*\.(q|v)_proj"},
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"r": 4, "target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"},
        {"r": 4, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 3, "layers.1.self_attn.o_proj": 2}},
        {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {r"^model\.layers\.1.*": 7}},
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
        {"r": 4, "target_modules": None},
    ],
    ids=lambda s: "-".join(k for k in s if k != "r"),
)
def test_selection_is_loraconfigs(settings):
    """The same modules, ranks and trained counts as PEFT's LoRA with the same settings."""
    ours = get_peft_model(llama(), CoreLoraConfig(method="lora", **settings))
    theirs = get_peft_model(llama(), LoraConfig(**settings))

    def shapes(model, prefix):
        return {
            n.replace(prefix, "").replace("embedding_", "").split(".default")[0]: sorted(p.shape)
            for n, p in model.named_parameters()
            if p.requires_grad
        }

    assert shapes(ours, "corelora_") == shapes(theirs, "lora_")
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("settings", [{"alpha": 8}, {"alpha": 8, "use_rslora": True}])
def test_alpha_is_loraconfigs(settings):
    """alpha / r or alpha / sqrt(r), by the layer's own r and alpha."""
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "o_proj": 1}}
    common = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]} | patterns
    ours = get_peft_model(llama(), CoreLoraConfig(method="lora", **common, **settings))
    theirs = get_peft_model(llama(), LoraConfig(**common, lora_alpha=8, use_rslora=settings.get("use_rslora", False)))

    def scales(model):
        return {
            n: m.scaling["default"]
            for n, m in model.named_modules()
            if isinstance(getattr(m, "scaling", None), dict) and m.scaling
        }

    found = scales(ours)
    assert len(found) == 9
    assert found == pytest.approx(scales(theirs))


def test_inner_r_pattern_and_its_default():
    """k by pattern, and max(1, r // 2) of the layer's own r where nothing is said."""
    conf = CoreLoraConfig(
        method="nora",
        stats="weight",
        r=6,
        target_modules=["q_proj", "v_proj", "o_proj"],
        rank_pattern={"o_proj": 1},
        inner_r_pattern={"v_proj": 5},
    )
    layer = get_peft_model(llama(), conf).base_model.model.model.layers[0].self_attn
    inner = {n: getattr(layer, n).factors("default")["core_a"].plan.shape[0] for n in ("q_proj", "v_proj", "o_proj")}
    assert inner == {"q_proj": 3, "v_proj": 5, "o_proj": 1}


def test_dropout_is_on_the_adapters_input_in_training_only():
    """Dropped inputs are scaled up by 1 / (1 - p), as LoRA's; in eval mode nothing is dropped."""
    net = nn.Sequential(nn.Linear(4000, 3))
    model = get_peft_model(net, CoreLoraConfig(method="lora", r=1, dropout=0.25, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.factors("default")["A"].weight.fill_(1 / 4000)
        layer.factors("default")["B"].weight.fill_(1.0)
        x = torch.ones(1, 4000)
        base = layer.base_layer(x)
        model.train()
        dropped = (model(x) - base)[0, 0]
        assert float(dropped) == pytest.approx(1, abs=0.05)
        assert float(dropped) != pytest.approx(1, abs=1e-6)
        model.eval()
        assert float((model(x) - base)[0, 0]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("bias", "theirs"), [("none", "none"), ("all", "all"), ("corelora_only", "lora_only")])
def test_bias_is_loraconfigs(bias, theirs):
    """'none', 'all' biases of the model, or those of adapted layers; saved and loaded with the adapter."""

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2))

    ours = get_peft_model(net(), CoreLoraConfig(method="lora", r=2, target_modules=["0"], bias=bias))
    lora = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], bias=theirs))

    def biases(model):
        return {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}

    assert biases(ours) == biases(lora)
    assert len(biases(ours)) == {"none": 0, "all": 3, "corelora_only": 1}[bias]


@pytest.mark.parametrize("bias", ["all", "corelora_only"])
def test_trained_biases_are_saved(bias, tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2)).eval()

    model = get_peft_model(net(), CoreLoraConfig(method="lora", r=2, target_modules=["0"], bias=bias)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 5)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_init_weights_false_gives_random_trained_factors(method):
    """PEFT's own tests ask for it: an adapter that changes the output at once, whatever its method's start."""
    base = llama()
    before = base(IDS).logits
    stats = "weight" if OUTERS[METHODS[method].default.outer].needs_stats else None
    conf = CoreLoraConfig(method=method, r=4, target_modules=["q_proj"], init_weights=False, stats=stats)
    model = get_peft_model(base, conf).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(bool((p != 0).any()) for p in trained)
    assert float((model(IDS).logits - before).abs().max()) > 1e-5
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, before)


def test_rslora_without_alpha_warns():
    with pytest.warns(UserWarning, match=r"use_rslora without alpha makes the scale sqrt\(r\)"):
        CoreLoraConfig(use_rslora=True)


def test_choices_are_written_out_so_that_a_changed_default_changes_no_old_adapter(tmp_path, monkeypatch):
    """An adapter saved today is the same function after the method's default has changed."""
    model = saved_adapter(tmp_path, method="inttune").eval()
    expected = model(IDS).logits
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in corelora.spec.CHOICE_NAMES:
        assert saved[name] is not None, name
    old = METHODS["inttune"]
    other = corelora.spec.Method(
        **(old.__dict__ | {"default": old.default.changed(slice_scale="orthonormal", sampling="random")})
    )
    monkeypatch.setitem(METHODS._entries, "inttune", other)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path).eval()(IDS).logits, expected)
    fresh = get_peft_model(llama(), CoreLoraConfig(method="inttune", r=4, target_modules=["q_proj"]))
    layer = fresh.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.cores["default"].spec.choices.sampling == "random"


STORED = [
    {"method": "pissa"},
    {"method": "lora_xs"},
    {"method": "lora_xs", "svd_solver": "randomized"},
    {"method": "nora", "stats": "weight"},
    {"method": "nora", "stats": "collected"},
    {"method": "lora_mini"},
    {"method": "lora_fa"},
    {"method": "lora_mini", "outer": "tucker"},
    {"method": "nlora", "sampling": "random"},
    {"method": "inttune", "sampling": "kmeans", "slice_scale": "orthonormal"},
    {"method": "nora", "stats": "collected", "train": "A core", "start": "subtract"},
]


def stored_config(given, store_outer):
    given = dict(given)
    if given.get("stats") == "collected":
        names = [f"model.layers.{k}.self_attn.{p}_proj" for k in range(3) for p in "qv"]
        given["stats"] = InputStats({n: torch.rand(16, generator=torch.Generator().manual_seed(1)) for n in names})
    return CoreLoraConfig(r=4, target_modules=["q_proj", "v_proj"], store_outer=store_outer, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", STORED, ids=lambda g: "-".join(map(str, g.values())))
def test_store_outer_false_leaves_frozen_factors_out_and_makes_them_again(given, dtype, tmp_path):
    """The file holds no [r,i] or [o,r] start, is smaller or equal, and gives the same output under another seed."""
    model = get_peft_model(llama().to(dtype), stored_config(given, False)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not [k for k in tensors if ("corelora_A" in k or "corelora_B" in k) and k.endswith("start")]
    base = llama().to(dtype)
    torch.manual_seed(4321)
    before = torch.get_rng_state()
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert torch.equal(loaded(IDS).logits, expected)
    if given["method"] in ("lora_mini", "lora_fa"):
        assert torch.equal(torch.get_rng_state(), before)  # frozen factors don't draw from the user's stream


def test_a_recomputed_factor_that_differs_is_refused(tmp_path):
    """Singular vectors that come out with another sign, as on another device: the probe says so."""
    model = get_peft_model(llama(), stored_config({"method": "lora_xs"}, False))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "q_proj" in k and "corelora_A" in k and k.endswith("probe"))
    tensors[key][2] *= -1  # as after a flipped sign
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        CoreLoraError, match=r"q_proj: A was left out of the file \(store_outer: false\) and came out dif"
    ):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_file_without_its_probe_is_refused(tmp_path):
    model = get_peft_model(llama(), stored_config({"method": "lora_xs"}, False))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: t for k, t in load_file(path).items() if not k.endswith("probe")}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CoreLoraError, match="probe"):
        PeftModel.from_pretrained(llama(), tmp_path)
