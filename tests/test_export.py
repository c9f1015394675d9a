"""Exports: plain LoRA folders and merged models, judged by plain PEFT and plain transformers.

Expected values never come from the export itself: they are the adapter's own logits, or `W + delta` written out from
the tensors in the file.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

import corelora
from corelora import CoreLoraConfig, export_lora, export_merged
from corelora.errors import CoreLoraError
from corelora.exportcheck import bare
from corelora.registry import METHODS, OUTERS
from corelora.tuner_layer import CoreLoraLayer
from laws.cases import variants

TOLERANCE = 1e-4  # of logits of size 1 to 10, in float32: the figure
VOCAB = 48


def ids() -> Tensor:
    """Token ids [2, 7]."""
    return torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))


SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "initializer_range": 0.2}


@cache
def _models(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=16)).eval()
    tied = kind == "tied"
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)).eval()


def base(kind: str = "llama") -> nn.Module:
    """A tiny model, always the same."""
    return copy.deepcopy(_models(kind))


def stir(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Move every trained number at random, as training would."""
    torch.manual_seed(4)
    for p in model.parameters():
        if p.requires_grad:
            p.data += size * torch.randn_like(p)
    return model.eval()


def adapted(model: nn.Module | None = None, **settings) -> PeftModel:
    """A PEFT model whose adapter has moved."""
    given = {"method": "nlora", "r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return stir(get_peft_model(base() if model is None else model, CoreLoraConfig(**(given | settings))))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def plain(folder: Path, model: nn.Module | None = None) -> PeftModel:
    """A fresh base with the export on it, as plain PEFT loads it."""
    return PeftModel.from_pretrained(base() if model is None else model, folder).eval()


def settings(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


# -- every method, in a process without corelora -------------------------------------------------------------------

TARGETS = {"llama": "all-linear", "bert": ["query", "value", "dense"]}


def trained(kind: str, method: str, variant: str) -> PeftModel:
    model = base(kind)
    batches = [{"input_ids": ids(), "attention_mask": torch.ones_like(ids()), "labels": ids()}]
    wanted, stats = OUTERS[METHODS[method].default.outer].stats, None
    if wanted == "input":
        stats = corelora.collect_stats(model, batches)
    elif wanted == "gradient":
        stats = corelora.collect_gradients(model, batches, 8)
    config = CoreLoraConfig(method=method, variant=variant, r=4, alpha=6, target_modules=TARGETS[kind], stats=stats)
    model = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
def test_every_method_in_a_process_without_corelora(tmp_path, driver):
    """Trained three steps, exported, loaded by plain PEFT elsewhere: the same logits within 1e-4."""
    expected = {}
    save_file({"ids": ids()}, tmp_path / "ids.safetensors")
    for kind in TARGETS:
        base(kind).save_pretrained(tmp_path / kind)
        untouched = logits(base(kind))
        for method, variant in variants():
            model = trained(kind, method, variant)
            name = f"{kind}.{method}_{variant}"
            expected[name] = logits(model)
            assert gap(expected[name], untouched) > 10 * TOLERANCE, f"{name} did not learn anything to compare"
            export_lora(model, tmp_path / name)
    child = Path(__file__).with_name("export_child.py")
    done = driver.call(child, tmp_path, plain=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "outputs.safetensors")
    assert set(found) == set(expected)
    wrong = {name: gap(found[name], expected[name]) for name in found if gap(found[name], expected[name]) > TOLERANCE}
    assert not wrong


# -- what is in the folder -----------------------------------------------------------------------------------------


def test_file_holds_the_delta(tmp_path):
    """lora_B lora_A of each layer is the merged weight less the base weight; scaling is 1."""
    model = adapted(alpha=10.0, use_rslora=True)
    report = export_lora(model, tmp_path / "out")
    tensors, config = load_file(tmp_path / "out" / "adapter_model.safetensors"), settings(tmp_path / "out")
    before = base().state_dict()
    merged = model.merge_and_unload().state_dict()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(B @ A, merged[f"{name}.weight"] - before[f"{name}.weight"], atol=1e-5, rtol=1e-4)
    assert config["lora_alpha"] == config["r"] == report.rank == 8
    assert type(config["lora_alpha"]) is int
    assert config["peft_type"] == "LORA"
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    assert (config["bias"], config["modules_to_save"], config["lora_dropout"]) == ("none", None, 0.0)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("method", "exact"), [("inttune", 4), ("nora", 2), ("lora_xs", 4), ("slora", 4), ("pissa", 8), ("nlora", 8)]
)
def test_rank_is_the_least_without_an_svd(tmp_path, method, exact):
    """r = 4, k = 2: k for a nested core, r where nothing or only one side moves, else 2r."""
    model = adapted(method=method, stats="weight" if method == "nora" else None)
    report = export_lora(model, tmp_path / "out", for_="peft")
    assert report.rank == exact
    assert gap(logits(plain(tmp_path / "out")), logits(model)) < TOLERANCE
    assert ("exact LoRA has rank 8, not 4" in str(report)) == (exact == 8)


@pytest.mark.parametrize(("r", "padded"), [(1, 1), (3, 8), (8, 8), (9, 16)])
def test_rank_is_filled_up_for_vllm(tmp_path, r, padded):
    """vLLM's ranks; the rest is zeros, the outputs stay, and the report says how to start the server."""
    model = adapted(method="lora", r=r)
    report = export_lora(model, tmp_path / "out", for_="vllm")
    assert report.rank == report.max_lora_rank == padded
    assert f"--max-lora-rank {padded} " in str(report)
    A = load_file(tmp_path / "out" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    ]
    assert A.shape[0] == padded
    assert int((A.abs().sum(1) > 0).sum()) == r
    assert gap(logits(plain(tmp_path / "out")), logits(model)) < TOLERANCE


def test_different_ranks_become_one(tmp_path):
    """rank_pattern and alpha_pattern end in one rank and no patterns."""
    model = adapted(method="lora", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9.0})
    assert export_lora(model, tmp_path / "out", for_="peft").rank == 4
    assert gap(logits(plain(tmp_path / "out")), logits(model)) < TOLERANCE


def test_rank_beyond_vllm(tmp_path):
    big = get_peft_model(nn.Sequential(nn.Linear(600, 600)), CoreLoraConfig(method="lora", r=520, target_modules=["0"]))
    with pytest.raises(CoreLoraError, match=r"rank 520, but vllm takes at most 512: cut it with rank=512"):
        export_lora(big, tmp_path / "out", for_="vllm")
    assert export_lora(stir(big), tmp_path / "out", for_="vllm", rank=512).rank == 512


# -- targets -------------------------------------------------------------------------------------------------------


def test_layers_that_lack_a_targeted_type_are_zeros(tmp_path):
    """For servers the target is a type; the layer that was not adapted is in the file as zeros."""
    model = adapted(target_modules=["q_proj"], layers_to_transform=[1])
    report = export_lora(model, tmp_path / "out")
    assert settings(tmp_path / "out")["target_modules"] == ["q_proj"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert report.zero_layers == 1
    for side, shape in (("A", (8, 16)), ("B", (16, 8))):
        zero = tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"]
        assert zero.shape == shape
        assert not zero.any()
    assert gap(logits(plain(tmp_path / "out")), logits(model)) < TOLERANCE


def test_full_names_where_an_ending_catches_more(tmp_path):
    """For peft nothing is added: names in full, or the ending that tells the layers apart."""
    model = adapted(target_modules=["q_proj"], layers_to_transform=[1])
    assert export_lora(model, tmp_path / "one", for_="peft").layers == 1
    assert settings(tmp_path / "one")["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    model = adapted(base("bert"), target_modules=["attention.output.dense"], task_type=None)
    assert export_lora(model, tmp_path / "bert", for_="peft").layers == 2
    assert settings(tmp_path / "bert")["target_modules"] == ["attention.output.dense"]
    assert gap(logits(plain(tmp_path / "bert", base("bert"))), logits(model)) < TOLERANCE


# -- cutting the rank ----------------------------------------------------------------------------------------------


def test_rank_reports_its_error(tmp_path):
    """The reported error is that of all weights' changes together."""
    model = adapted()
    report = export_lora(model, tmp_path / "out", for_="peft", rank=4)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    lost = total = 0.0
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, CoreLoraLayer):
            A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            delta = layer.get_delta_weight("default")
            lost, total = lost + float((B @ A - delta).square().sum()), total + float(delta.square().sum())
    assert report.rank == 4
    assert 0.01 < report.truncation < 1
    assert report.truncation == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert "relative error" in str(report)
    assert export_lora(model, tmp_path / "exact", for_="peft", rank=8).truncation == 0


# -- what a plain LoRA can't hold, or can --------------------------------------------------------------------------


def test_modules_and_biases_trained_along(tmp_path):
    """Written along for peft, refused by name for servers: never dropped silently."""
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(CoreLoraError, match=r"lm_head.weight were trained along .*for_='peft'"):
        export_lora(model, tmp_path / "out")
    export_lora(model, tmp_path / "out", for_="peft")
    assert gap(logits(plain(tmp_path / "out")), logits(model)) < TOLERANCE
    for bias in ("all", "corelora_only"):
        model = adapted(base("bert"), target_modules=["query"], bias=bias, task_type=None)
        with pytest.raises(CoreLoraError, match=r"bias.* were trained along"):
            export_lora(model, tmp_path / bias, for_="vllm")
        export_lora(model, tmp_path / bias, for_="peft")
        assert gap(logits(plain(tmp_path / bias, base("bert"))), logits(model)) < TOLERANCE


class Images(nn.Module):
    """A convolution of each sort, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3, padding=1)
        self.dilated = nn.Conv2d(6, 6, 3, dilation=2, padding=2)
        self.table = nn.Embedding(10, 6)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = torch.tanh(self.point(torch.tanh(self.plain(x))))
        return torch.tanh(self.dilated(torch.tanh(self.grouped(x)))).mean((2, 3)) + self.table(label)


def images() -> Images:
    torch.manual_seed(0)
    return Images().eval()


def test_convolutions_and_embeddings_for_peft(tmp_path):
    """PEFT's own layouts; servers read none of them."""
    inputs = {"x": torch.randn(2, 3, 7, 6), "label": torch.tensor([1, 7])}
    targets = ["plain", "point", "table"]
    model = adapted(images(), target_modules=targets, task_type=None, method="slora")
    report = export_lora(model, tmp_path / "out", for_="peft", check=inputs)
    with torch.no_grad():
        expected, found = model(**inputs), plain(tmp_path / "out", images())(**inputs)
        assert gap(expected, images()(**inputs)) > 100 * 1e-6
    assert gap(expected, found) < 1e-6
    assert report.error is not None
    assert report.error < 1e-6
    report = export_lora(model, tmp_path / "layers", for_="peft")  # no ids: layers alone are compared
    assert report.error is None
    assert "loaded back with plain PEFT: each layer agrees" in str(report)
    assert "not loaded back" in str(export_lora(model, tmp_path / "unchecked", for_="peft", check=False))
    with pytest.raises(CoreLoraError, match="plain, point, table are no linear layers"):
        export_lora(model, tmp_path / "server")


def test_a_diffusion_model(tmp_path):
    """diffusers' injected adapters, and merged weights that diffusers loads."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    inputs = {"sample": torch.randn(1, 2, 8, 8), "timestep": torch.tensor(3)}
    inputs["encoder_hidden_states"] = torch.randn(1, 3, 8)
    model = copy.deepcopy(unet)
    model.add_adapter(CoreLoraConfig(r=4, target_modules=["to_q", "conv1"]))
    stir(model)
    export_lora(model, tmp_path / "out", for_="peft", check=inputs)
    export_merged(model, tmp_path / "merged")
    with torch.no_grad():
        expected, first = model(**inputs)[0], unet(**inputs)[0]
        merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged")(**inputs)[0]
        found = plain(tmp_path / "out", unet)(**inputs)[0]
    assert gap(expected, first) > 100 * TOLERANCE
    assert gap(found, expected) < TOLERANCE
    assert gap(merged, expected) < TOLERANCE


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_base(tmp_path, bits):
    """The plain LoRA sits on the quantised base as the adapter does; merged weights are refused."""
    settings = BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    config = LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 64}, num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)

    untouched = logits(load())
    model = adapted(load(), target_modules=["q_proj", "down_proj"])
    export_lora(model, tmp_path / "out")
    assert gap(logits(model), untouched) > 0.1
    assert gap(logits(plain(tmp_path / "out", load())), logits(model)) < TOLERANCE
    with pytest.raises(CoreLoraError, match=r"q_proj and 3 more layers are quantised.*base_model set"):
        export_merged(model, tmp_path / "merged")
    model.save_pretrained(tmp_path / "adapter")
    in_float = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base_model=in_float)


def test_convolutions_that_no_lora_fits(tmp_path):
    for target, message in (("grouped", "grouped convolution .grouped.: export merged"), ("dilated", "dilation or")):
        model = adapted(images(), target_modules=[target], task_type=None, method="lora")
        with pytest.raises(CoreLoraError, match=message):
            export_lora(model, tmp_path / "out", for_="peft")


def test_bfloat16(tmp_path):
    """The adapter's own type is written (float32 under PEFT's default), the logits agree up to the base's rounding."""
    model = adapted(base().bfloat16(), target_modules="all-linear", on_small_layer="clip")
    report = export_lora(model, tmp_path / "out")
    assert report.dtype == "float32"
    fresh = logits(plain(tmp_path / "out", base().bfloat16()))
    assert gap(fresh.float(), logits(model).float()) < 0.05 * float(fresh.abs().max())
    half = get_peft_model(
        base().bfloat16(), CoreLoraConfig(r=4, target_modules=["q_proj"]), autocast_adapter_dtype=False
    )
    assert export_lora(stir(half), tmp_path / "half").dtype == "bfloat16"


# -- the model that is exported ------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(tmp_path):
    """Weights, flags, mode and outputs, after a good export and after a refused one."""
    model = adapted(bias="none").train()
    flags = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    export_lora(model, tmp_path / "out")
    export_merged(model, tmp_path / "merged")
    with pytest.raises(CoreLoraError):
        export_lora(model, tmp_path / "out")
    assert model.training
    assert flags == [p.requires_grad for p in model.parameters()]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_bare_copy_shares_its_tensors():
    model = adapted()
    inner = model.get_base_model()
    copied = bare(inner)
    assert not any(isinstance(m, CoreLoraLayer) for m in copied.modules())
    known = {p.data_ptr() for p in inner.parameters()}
    assert all(p.data_ptr() in known for p in copied.parameters())


def test_one_of_two_adapters(tmp_path):
    """The named adapter is exported, whichever is active; another scale (diffusers, transformers) counts."""
    model = adapted()
    model.add_adapter("other", CoreLoraConfig(method="lora", r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    stir(model, 0.3)
    expected = logits(model)
    model.set_adapter("default")
    report = export_lora(model, tmp_path / "out", "other")
    assert report.layers == 2
    assert gap(logits(plain(tmp_path / "out")), expected) < TOLERANCE
    for layer in model.modules():
        if isinstance(layer, CoreLoraLayer):
            layer.set_scale("default", 0.5)
    export_lora(model, tmp_path / "half")
    assert gap(logits(plain(tmp_path / "half")), logits(model)) < TOLERANCE


def test_an_adapter_that_transformers_injected(tmp_path):
    model = base()
    model.add_adapter(CoreLoraConfig(r=4, target_modules=["q_proj"]))
    stir(model)
    export_lora(model, tmp_path / "out")
    assert gap(logits(plain(tmp_path / "out")), logits(model)) < TOLERANCE


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_from_a_folder(tmp_path, task):
    """The base is the one that the adapter names, or the one given."""
    base().save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), task_type=task)
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "named")
    export_lora(str(tmp_path / "adapter"), tmp_path / "given", base_model=base())
    for out in ("named", "given"):
        assert gap(logits(plain(tmp_path / out)), logits(model)) < TOLERANCE
    assert settings(tmp_path / "named")["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_classifier_from_its_folder(tmp_path):
    """The head that was trained along says how many labels the base is to be loaded with."""
    encoder = tmp_path / "base"
    BertModel(base("bert").config).save_pretrained(encoder)
    classifier = BertForSequenceClassification.from_pretrained(encoder, num_labels=5)
    model = adapted(classifier, target_modules=["query"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "out", for_="peft")
    fresh = plain(tmp_path / "out", BertForSequenceClassification.from_pretrained(encoder, num_labels=5))
    assert logits(model).shape == (2, 5)
    assert gap(logits(fresh), logits(model)) < TOLERANCE


# -- folders -------------------------------------------------------------------------------------------------------


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    """Whatever fails, there is no folder, and an older one stays."""
    model = adapted()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "note").write_text("mine")

    def broken(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("corelora.export.save_file", broken)
        for out in ("new", "old"):
            with pytest.raises(OSError, match="disk full"):
                export_lora(model, tmp_path / out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "note").read_text() == "mine"
    export_lora(model, tmp_path / "old", overwrite=True)
    assert not (tmp_path / "old" / "note").exists()


@pytest.mark.parametrize("wrong", ["factor", "key", "alpha"])
def test_a_wrong_export_is_found(tmp_path, monkeypatch, wrong):
    """The check sees a factor that is off by 1 %, a key that PEFT does not read, another alpha."""
    real = save_file

    def write(tensors, path, **kwargs):
        first = next(k for k in tensors if "lora_B" in k)
        if wrong == "factor":
            tensors[first] = tensors[first] * 1.01
        elif wrong == "key":
            tensors[first.replace("layers.0", "layers.7")] = tensors.pop(first)
        else:
            config = Path(path).with_name("adapter_config.json")
            config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 16}))
        real(tensors, path, **kwargs)

    monkeypatch.setattr("corelora.export.save_file", write)
    message = "other keys than were written" if wrong == "key" else "as loaded differs"
    with pytest.raises(CoreLoraError, match=message):
        export_lora(adapted(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path):
    model = adapted()
    with pytest.raises(CoreLoraError, match=r"unknown target of an export \(for_\) 'vlm'. Did you mean 'vllm'\? Known"):
        export_lora(model, tmp_path / "out", for_="vlm")
    with pytest.raises(CoreLoraError, match=r"unknown adapter 'defualt'. Did you mean 'default'\?"):
        export_lora(model, tmp_path / "out", "defualt")
    with pytest.raises(CoreLoraError, match="no corelora adapter"):
        export_lora(get_peft_model(base(), LoraConfig(target_modules=["q_proj"])), tmp_path / "out")
    with pytest.raises(CoreLoraError, match="rank must be a whole number of at least 1, got 0"):
        export_lora(model, tmp_path / "out", rank=0)
    model.merge_adapter()
    with pytest.raises(CoreLoraError, match=r"merged: call unmerge_adapter\(\) first"):
        export_lora(model, tmp_path / "out")
    model.unmerge_adapter()
    (tmp_path / "file").write_text("")
    with pytest.raises(CoreLoraError, match="file is a file: name a folder"):
        export_lora(model, tmp_path / "file")
    with pytest.raises(CoreLoraError, match=r"is not empty: .*overwrite=True"):
        export_lora(model, tmp_path)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    with pytest.raises(CoreLoraError, match=r"q_proj: a factor is not finite"):
        export_lora(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folders_that_hold_no_adapter(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CoreLoraError, match=r"empty holds no adapter: there is no adapter_config.json in it"):
        export_lora(tmp_path / "empty", tmp_path / "out")
    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(CoreLoraError, match="holds an adapter of type LORA, not one of corelora's"):
        export_lora(tmp_path / "lora", tmp_path / "out")
    adapted().save_pretrained(tmp_path / "adapter")
    with pytest.raises(CoreLoraError, match="does not say which base model it is for: give base_model"):
        export_lora(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(CoreLoraError, match="is the adapter that is being exported"):
        export_lora(tmp_path / "adapter", tmp_path / "adapter", base_model=base(), overwrite=True)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CoreLoraError, match=r"adapter_model.safetensors is truncated or damaged"):
        export_lora(tmp_path / "adapter", tmp_path / "out", base_model=base())
    assert not (tmp_path / "out").exists()


def test_a_bare_model_is_pointed_out(tmp_path):
    """Keys follow the class that was trained; the report says so where a server will load another."""
    torch.manual_seed(0)
    inner = LlamaModel(base().config)
    model = stir(get_peft_model(inner, CoreLoraConfig(r=4, target_modules=["q_proj"])))
    assert "keys are those of a bare LlamaModel" in str(export_lora(model, tmp_path / "out"))
    assert "bare Llama" not in str(export_lora(adapted(), tmp_path / "full"))


# -- merged weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", "all-linear"), ("tied", ["embed_tokens", "q_proj"]), ("bert", ["query", "dense"])]
)
def test_merged_model(tmp_path, kind, targets):
    """Plain transformers loads it and gives the adapter's logits; a tied weight no longer is."""
    model = adapted(base(kind), target_modules=targets, task_type=None, on_small_layer="clip")
    export_merged(model, tmp_path / "out")
    merged = type(base(kind)).from_pretrained(tmp_path / "out").eval()
    assert gap(logits(merged), logits(model)) < TOLERANCE
    assert gap(logits(merged), logits(base(kind))) > 100 * TOLERANCE


def test_merged_model_of_a_folder(tmp_path):
    """With the modules that were trained along."""
    base().save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert gap(logits(merged), logits(model)) < TOLERANCE


def test_merged_refusals(tmp_path):
    with pytest.raises(CoreLoraError, match=r"Images has no save_pretrained"):
        export_merged(adapted(images(), target_modules=["plain"], task_type=None), tmp_path / "out")
    with pytest.raises(CoreLoraError, match="unknown adapter 'x'"):
        export_merged(adapted(), tmp_path / "out", "x")
    assert not list(tmp_path.iterdir())
