"""Exports of other kinds of models, of wrapped models, of named adapters in folders; and folders that must stay.

As in test_export.py, expected values are the adapter's own outputs; plain PEFT loads the export.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from corelora import CoreLoraConfig, export_lora, export_merged
from corelora.errors import CoreLoraError
from corelora.servers import SERVERS, clashes
from test_export import SIZES, TOLERANCE, VOCAB, adapted, base, gap, ids, logits, plain, settings, stir

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


def gemma() -> nn.Module:
    """Its embedding scales what it looks up."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8))


def made(build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (gpt2, ["c_attn", "mlp.c_proj"]),
        (gpt2, ["wte"]),
        (gpt2, ["c_attn", "lm_head"]),
        (gemma, ["embed_tokens", "q_proj"]),
        (lambda: base("tied"), ["embed_tokens", "lm_head"]),
    ],
    ids=["gpt2", "gpt2_table", "gpt2_mixed", "gemma_table", "tied"],
)
@pytest.mark.parametrize("method", ["nlora", "slora"])
def test_transposed_scaled_and_tied_layers(tmp_path, build, targets, method):
    """Conv1D beside Linear, embeddings, a head that shares the table: PEFT's own layouts."""
    model = adapted(made(build), target_modules=targets, method=method)
    report = export_lora(model, tmp_path / "out", for_="peft")
    fresh = made(build)
    assert gap(logits(model), logits(fresh)) > 10 * TOLERANCE
    assert gap(logits(plain(tmp_path / "out", fresh)), logits(model)) < TOLERANCE
    assert report.error is not None
    if build is gpt2 and targets != ["wte"]:
        assert settings(tmp_path / "out")["fan_in_fan_out"] is True


def test_encoder_and_decoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    first = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes)).eval()
    model = adapted(copy.deepcopy(first), target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")
    report = export_lora(model, tmp_path / "out")
    both = {"input_ids": ids(), "decoder_input_ids": ids()}
    with torch.no_grad():
        expected, untouched = model(**both).logits, first(**both).logits
        found = plain(tmp_path / "out", first)(**both).logits
    assert gap(expected, untouched) > 10 * TOLERANCE
    assert gap(found, expected) < TOLERANCE
    assert report.error is not None


def test_a_model_that_needs_more_than_ids(tmp_path):
    """CLIP wants images: without them layers are compared, with them outputs."""
    torch.manual_seed(0)
    text = {k: v for k, v in VISION.items() if "size" not in k} | {"hidden_size": 16, "intermediate_size": 24}
    first = CLIPModel(
        CLIPConfig(
            text_config=text | {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1},
            vision_config=VISION,
            projection_dim=8,
        )
    ).eval()
    model = adapted(copy.deepcopy(first), target_modules=["q_proj", "v_proj"], task_type=None)
    inputs = {"input_ids": ids(), "pixel_values": torch.randn(2, 3, 8, 8)}
    assert export_lora(model, tmp_path / "layers", for_="peft").error is None
    report = export_lora(model, tmp_path / "out", for_="peft", check=inputs)
    assert report.error is not None
    assert report.error < TOLERANCE
    with torch.no_grad():
        expected, found = model(**inputs), plain(tmp_path / "out", first)(**inputs)
    assert gap(expected.logits_per_image, found.logits_per_image) < TOLERANCE
    assert "SGLang can't tell" in str(export_lora(model, tmp_path / "served"))


def test_zeros_stay_within_the_adapted_type(tmp_path):
    """A vision tower's q_proj is no language model's: SGLang reads both as `layers.0` `q_proj`."""
    torch.manual_seed(0)
    language = LlamaConfig(**SIZES, num_key_value_heads=1)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=language, image_token_index=1)
    first = LlavaForConditionalGeneration(config).eval()
    model = adapted(copy.deepcopy(first), target_modules=r".*language_model\.layers\.1\..*\.q_proj")
    report = export_lora(model, tmp_path / "out")
    names = [f"model.language_model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert settings(tmp_path / "out")["target_modules"] == names
    keys = {f"base_model.model.{n}.lora_{side}.weight" for n in names for side in "AB"}
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == keys
    assert (report.layers, report.zero_layers) == (2, 1)
    assert "SGLang" not in str(report)
    assert gap(logits(plain(tmp_path / "out", first)), logits(model)) < TOLERANCE


def test_clashes():
    llama = [f"model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in ("q_proj", "o_proj")]
    assert clashes(llama) == []
    assert clashes([f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(3)]) == []
    assert clashes(["vision.layers.1.q_proj", *llama]) == ["model.layers.1.self_attn.q_proj", "vision.layers.1.q_proj"]


def test_targets_of_a_server_and_of_peft():
    """BERT's `dense` is three types: an ending tells them apart, zeros fill the type alone."""
    model = base("bert")
    adapted_names = ["bert.encoder.layer.1.attention.output.dense"]
    targets, zeros = SERVERS["all"].targets(model, adapted_names)
    assert targets == ["attention.output.dense"]
    assert zeros == ["bert.encoder.layer.0.attention.output.dense"]
    assert SERVERS["peft"].targets(model, adapted_names) == (adapted_names, [])


def test_zeros_for_a_layer_that_another_adapter_is_on(tmp_path):
    model = adapted(target_modules=["q_proj"], layers_to_transform=[1])
    expected = logits(model)
    other = CoreLoraConfig(method="lora", r=2, target_modules=["q_proj"], layers_to_transform=[0])
    model.add_adapter("other", other)
    assert export_lora(model, tmp_path / "out").zero_layers == 1
    assert gap(logits(plain(tmp_path / "out")), expected) < TOLERANCE


# -- wrapped and injected models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_not_in_the_keys(tmp_path, wrap):
    model = adapted()
    expected = logits(model)
    export_lora(wrap(model), tmp_path / "out")
    export_merged(wrap(model), tmp_path / "merged")
    assert gap(logits(plain(tmp_path / "out")), expected) < TOLERANCE
    assert gap(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected) < TOLERANCE


def test_an_adapter_injected_by_peft(tmp_path):
    model = inject_adapter_in_model(CoreLoraConfig(r=4, target_modules=["q_proj"]), base())
    stir(model)
    export_lora(model, tmp_path / "out")
    assert gap(logits(plain(tmp_path / "out")), logits(model)) < TOLERANCE


def small_tokenizer(folder: Path, words: list[str]) -> None:
    """Save a tokenizer that numbers these words."""
    inner = Tokenizer(WordLevel({w: n for n, w in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)


def test_the_tokenizer_goes_along(tmp_path):
    """The base's; or the adapter's own, which training may have changed; none where there is none."""
    base().save_pretrained(tmp_path / "base")
    small_tokenizer(tmp_path / "base", ["one", "two"])
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    text = "two one"
    for source, out in ((model, "model"), (tmp_path / "adapter", "folder")):
        export_merged(source, tmp_path / out)
        assert AutoTokenizer.from_pretrained(tmp_path / out)(text)["input_ids"] == [2, 1]
    small_tokenizer(tmp_path / "adapter", ["new", "one", "two"])
    export_merged(tmp_path / "adapter", tmp_path / "own")
    assert AutoTokenizer.from_pretrained(tmp_path / "own")(text)["input_ids"] == [3, 2]
    export_merged(adapted(), tmp_path / "bare")
    assert not list((tmp_path / "bare").glob("*token*"))


# -- folders -------------------------------------------------------------------------------------------------------


def two_adapters(folder: Path) -> nn.Module:
    """A saved model with the adapters default and other."""
    model = adapted()
    model.add_adapter("other", CoreLoraConfig(method="lora", r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    stir(model, 0.3)
    model.save_pretrained(folder)
    return model


def test_a_named_adapter_of_a_folder(tmp_path):
    """PEFT keeps it in a folder of its name; its own folder will do as well; an unknown name is an error."""
    model = two_adapters(tmp_path / "saved")
    for place, out in ((tmp_path / "saved", "a"), (tmp_path / "saved" / "other", "b")):
        export_lora(place, tmp_path / out, "other", base_model=base())
        assert settings(tmp_path / out)["target_modules"] == ["v_proj"]
        assert gap(logits(plain(tmp_path / out)), logits(model)) < TOLERANCE
    with pytest.raises(CoreLoraError, match=r"unknown adapter 'othr'. Did you mean 'other'\? Known: default, other"):
        export_lora(tmp_path / "saved", tmp_path / "out", "othr", base_model=base())
    (tmp_path / "saved" / "adapter_config.json").unlink()
    with pytest.raises(CoreLoraError, match=r"unknown adapter 'default'\. Known: other"):
        export_merged(tmp_path / "saved", tmp_path / "out", base_model=base())


def test_damaged_folders(tmp_path):
    with pytest.raises(CoreLoraError, match="an export takes a model or an adapter's folder, not a dict"):
        export_lora({}, tmp_path / "out")
    with pytest.raises(CoreLoraError, match="nowhere holds no adapter: there is no such folder"):
        export_lora(tmp_path / "nowhere", tmp_path / "out")
    base().save_pretrained(tmp_path / "model")
    with pytest.raises(CoreLoraError, match=r"there is no adapter_config.json in it, but config.json, .*safetensors"):
        export_lora(tmp_path / "model", tmp_path / "out")
    adapted().save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CoreLoraError, match=r"holds a config but no adapter_model.safetensors"):
        export_lora(tmp_path / "adapter", tmp_path / "out", base_model=base())
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(CoreLoraError, match=r"adapter_config.json is no JSON \(Expecting"):
        export_lora(tmp_path / "adapter", tmp_path / "out", base_model=base())
    with pytest.raises(CoreLoraError, match=r"rank must be a whole number of at least 1, got 2.5"):
        export_lora(adapted(), tmp_path / "out", rank=2.5)
    assert not (tmp_path / "out").exists()


def test_overwrite_spares_what_the_export_is_made_from(tmp_path):
    """Neither the adapter, nor the base, nor a folder that holds one of them is replaced."""
    base().save_pretrained(tmp_path / "top" / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "top" / "base"))
    model.save_pretrained(tmp_path / "run" / "adapter")
    before = sorted(p for p in tmp_path.rglob("*"))
    source = tmp_path / "run" / "adapter"
    for export in (export_lora, export_merged):
        with pytest.raises(CoreLoraError, match="run holds the adapter that is being exported"):
            export(source, tmp_path / "run", overwrite=True)
        with pytest.raises(CoreLoraError, match="top holds the base model of the adapter"):
            export(source, tmp_path / "top", overwrite=True)
        with pytest.raises(CoreLoraError, match="base is the base model of the adapter"):
            export(model, tmp_path / "top" / "base", overwrite=True)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_an_older_folder_comes_back_where_the_last_step_fails(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    rename = Path.rename

    def fails(self, target):
        if self.name == "new":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no space"):
        export_lora(adapted(), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "note").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
