"""`corelora evaluate --backend vllm` from the command to the file, with a stand-in for the package: it needs a GPU."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from types import ModuleType

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tokenizers import decoders
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from corelora import CoreLoraConfig
from corelora.cli import main
from corelora.errors import CoreLoraError
from corelora.evaluate import run as evaluate_run
from corelora.evaluate import vllm_adapter
from corelora.evaluate.job import Settings
from corelora.evaluate.run import evaluate
from corelora.evaluate.subject import Subject
from corelora.evaluate.suites import load_suite
from corelora.evaluate.vllm_backend import load_engine
from corelora.recipe.schema import ModelPart
from corelora.train import models
from evaluate import stand_in_vllm
from evaluate.stand_in_vllm import LLM
from train.helpers import save_llama

SUITE = """
name: small
version: 1
about: Short replies.
columns: {{question: text, answer: text}}
tasks:
  gsm8k:
    test: {{path: none}}
    file: math/gsm8k_test.jsonl
protocols:
  paper: {{kind: generate, prompt: paper, readers: [gsm8k_flexible], max_new_tokens: 24, stops: {stops}}}
  chat: {{kind: generate, prompt: chat, readers: [gsm8k_flexible], max_new_tokens: 24}}
  drawn: {{kind: generate, prompt: chat, readers: [gsm8k_flexible], max_new_tokens: 24, temperature: 0.9}}
"""
OURS = CoreLoraConfig(method="nlora", r=4, alpha=1, target_modules="all-linear", init_weights=False)
THEIRS = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in as vllm; what loads a torch model for the other back end is out of reach."""
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", stand_in_vllm)
    monkeypatch.setattr(LLM, "made", [])
    return stand_in_vllm


@pytest.fixture
def suite(tmp_path):
    return small_suite(tmp_path)


def small_suite(folder, stops=()):
    """A suite file with replies of 24 tokens."""
    path = folder / "small.yaml"
    path.write_text(SUITE.format(stops=json.dumps(list(stops))))
    return path


def adapter(folder, base, config):
    """A saved adapter whose weights are not those that leave the model as it is."""
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return folder


def command(*words):
    """`corelora evaluate` with these words."""
    return main(["evaluate", *(str(w) for w in words)])


def result(folder, name="small-paper"):
    """One result file."""
    return json.loads((folder / "eval" / f"{name}.json").read_text())


def both(tmp_path, subject, *words, name="small-paper"):
    """The results of the two back ends."""
    found = []
    for backend in ("transformers", "vllm"):
        out = tmp_path / f"out-{backend}"
        assert command(subject, *words, "--output", out, "--backend", backend) == 0
        found.append(result(out, name))
    return found


@pytest.mark.parametrize("kind", ["bare", "ours", "theirs"])
def test_the_same_replies_as_transformers(kind, vllm, llama, data, suite, tmp_path):
    """Outputs and scores of a bare model, a corelora adapter and PEFT's LoRA; what the file says of the engine."""
    config = {"ours": OURS, "theirs": LoraConfig(**THEIRS, lora_alpha=16, use_rslora=True)}.get(kind)
    subject = llama if config is None else adapter(tmp_path / kind, llama, config)
    ours, theirs = both(tmp_path, subject, "--suite", suite, "--data", data)
    assert theirs["samples"] == ours["samples"]
    assert theirs["scores"] == ours["scores"]
    assert len({s["output"] for s in theirs["samples"]}) > 1
    facts = {k: theirs[k] for k in ("backend", "vllm", "merged", "dtype", "device", "lora_rank")}
    rank = None if config is None else 8
    expected = {"backend": "vllm", "vllm": "0.0-stand-in", "merged": False, "dtype": "float32", "device": "cpu"}
    assert facts == expected | {"lora_rank": rank}
    assert (theirs["settings"]["backend"], theirs["settings"]["batch_size"]) == ("vllm", 1024)
    (engine,) = vllm.LLM.made
    assert engine.options["model"] == str(llama)
    assert engine.options["dtype"] == "float32"
    assert (engine.options["revision"], engine.options["trust_remote_code"]) == (None, False)
    assert (engine.options["enable_lora"], engine.options["max_lora_rank"]) == ((True, 8) if config else (False, 16))
    if config is not None:
        bare = tmp_path / "bare"
        assert command(llama, "--suite", suite, "--data", data, "--output", bare) == 0
        assert [s["output"] for s in result(bare)["samples"]] != [s["output"] for s in theirs["samples"]]


def test_vllm_is_asked_for_the_same(vllm, llama, data, suite, tmp_path):
    """What a request says, a request a sample."""
    assert command(llama, "--suite", suite, "--data", data, "--output", tmp_path, "--backend", "vllm") == 0
    ((prompts, wanted, lora),) = vllm.LLM.made[0].asked
    assert (len(prompts), lora) == (11, None)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = sorted((s["prompt"] for s in result(tmp_path)["samples"]), key=len, reverse=True)
    assert [p["prompt_token_ids"] for p in prompts] == [tokenizer(text)["input_ids"] for text in texts]
    assert all(w == vllm.SamplingParams(max_tokens=24, temperature=0.0, top_k=-1, stop_token_ids=[1]) for w in wanted)


def test_no_torch_model_is_held(vllm, llama, data, suite, tmp_path, monkeypatch):
    """Without an adapter none is loaded; the one that an export needs is gone before the engine is made."""
    loaded = []

    def load_model(*parts, **options):
        made = models.load_model(*parts, **options)
        loaded.append(weakref.ref(made))
        gc.disable()  # what is gone by then was let go, not found by chance
        return made

    def llm(*parts, **options):
        assert not [ref for ref in loaded if ref() is not None]
        gc.enable()
        return LLM(*parts, **options)

    monkeypatch.setattr(vllm_adapter, "load_model", load_model)
    monkeypatch.setattr(evaluate_run, "load_subject", None)
    monkeypatch.setattr(vllm, "LLM", llm)
    words = ["--suite", suite, "--data", data, "--backend", "vllm", "--limit", 1]
    assert command(llama, *words, "--output", tmp_path / "out") == 0
    assert loaded == []
    assert command(adapter(tmp_path / "adapter", llama, OURS), *words) == 0
    assert len(loaded) == 1


@pytest.mark.parametrize("protocol", ["paper", "chat"])
def test_stops_ends_and_begin_tokens(protocol, vllm, data, tmp_path):
    """The model's own end tokens and penalty, a protocol's stops, a tokenizer that puts a begin token before texts."""
    folder = save_llama(tmp_path)
    fast = AutoTokenizer.from_pretrained(folder)
    fast.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    fast.backend_tokenizer.decoder = decoders.Fuse()  # without one transformers can't look for stop texts
    fast.save_pretrained(folder)
    words = ["--data", data, "--limit", 6, "--protocol", protocol]
    assert command(folder, "--suite", small_suite(tmp_path), *words, "--output", tmp_path / "free") == 0
    texts = [s["output"] for s in result(tmp_path / "free", f"small-{protocol}")["samples"]]
    stop, end = texts[0][3:5], fast.convert_tokens_to_ids(texts[1][6])
    settings = GenerationConfig(eos_token_id=[1, end], pad_token_id=0, repetition_penalty=1.05)
    settings.save_pretrained(folder)
    ours, theirs = both(tmp_path, folder, "--suite", small_suite(tmp_path, [stop]), *words, name=f"small-{protocol}")
    assert theirs["samples"] == ours["samples"]
    assert any(s["finished"] for s in theirs["samples"])
    (prompts, wanted, _), *_ = vllm.LLM.made[0].asked
    assert all(p["prompt_token_ids"][0] == 2 != p["prompt_token_ids"][1] for p in prompts)
    assert wanted[0].stop_token_ids == sorted({1, end})
    assert wanted[0].stop == ([stop] if protocol == "paper" else None)
    assert wanted[0].repetition_penalty == 1.05


def test_drawn_replies_have_seeds_of_their_own(vllm, llama, data, suite, tmp_path):
    """A seed a sample: the same in every run and batch, another one for another --seed."""
    words = [llama, "--suite", suite, "--protocol", "drawn", "--data", data, "--backend", "vllm"]
    seeds, texts = [], []
    for name, more in (("a", []), ("b", ["--batch-size", 2]), ("c", ["--seed", 1])):
        assert command(*words, "--output", tmp_path / name, *more) == 0
        made = [w for _, wanted, _ in vllm.LLM.made[-1].asked for w in wanted]
        assert all(w.temperature == 0.9 for w in made)
        seeds.append([w.seed for w in made])
        texts.append([s["output"] for s in result(tmp_path / name, "small-drawn")["samples"]])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 11
    assert not set(seeds[0]) & set(seeds[2])
    assert texts[0] == texts[1] != texts[2]


def test_a_stopped_evaluation_goes_on(vllm, llama, data, suite, tmp_path, monkeypatch):
    """What was written is not asked for again, and the export is made once."""
    subject = adapter(tmp_path / "adapter", llama, OURS)
    words = [subject, "--suite", suite, "--data", data, "--backend", "vllm", "--batch-size", 4]
    generate = LLM.generate

    def stopped(self, *parts, **options):
        if self.asked:
            raise KeyboardInterrupt
        return generate(self, *parts, **options)

    monkeypatch.setattr(LLM, "generate", stopped)
    assert command(*words) == 130
    (export,) = (subject / "eval").glob("vllm-lora-*")
    before = export.stat().st_mtime_ns
    monkeypatch.setattr(LLM, "generate", generate)
    monkeypatch.setattr(vllm_adapter, "export_lora", None)
    assert command(*words) == 0
    assert [len(prompts) for prompts, _, _ in vllm.LLM.made[-1].asked] == [4, 3]
    assert export.stat().st_mtime_ns == before
    assert command(*words[1:], llama, "--output", tmp_path / "bare") == 0
    monkeypatch.undo()
    assert command(*words[:-4], "--output", tmp_path / "whole") == 0
    assert result(subject)["samples"] == result(tmp_path / "whole")["samples"]


def test_another_adapter_in_the_folder_is_exported_anew(vllm, llama, data, suite, tmp_path):
    """Trained again, or with another scale in its config: never an export of what was there before."""
    subject = adapter(tmp_path / "adapter", llama, OURS)
    words = [subject, "--suite", suite, "--data", data, "--backend", "vllm", "--limit", 2]
    assert command(*words) == 0
    config = json.loads((subject / "adapter_config.json").read_text())
    (subject / "adapter_config.json").write_text(json.dumps(config | {"alpha": 12.0}))
    assert command(*words) == 0
    assert len(list((subject / "eval").glob("vllm-lora-*"))) == 2
    first, second = (engine.served.lora_path for engine in vllm.LLM.made)
    assert first != second


def test_names_that_vllm_does_not_know(vllm, llama, data, suite, tmp_path, monkeypatch):
    """A package's model is its folder to vLLM; revision, type and own code are what the subject says."""
    monkeypatch.setitem(models.PACKAGES, "tiny", lambda: llama)
    part = ModelPart(name="package:tiny", revision="v1", dtype="bfloat16", trust_remote_code=True)
    engine, _, facts = load_engine(Subject("x", part, None, tmp_path), 3, print)
    options = {k: engine.llm.options[k] for k in ("model", "revision", "tokenizer_revision", "dtype", "seed")}
    expected = {"model": str(llama), "revision": "v1", "tokenizer_revision": "v1", "dtype": "bfloat16", "seed": 3}
    assert options == expected
    assert engine.llm.options["trust_remote_code"] is True
    assert (facts["model"], facts["dtype"]) == ("package:tiny", "bfloat16")


def test_mt_bench_writes_its_answers_with_it(vllm, llama, tmp_path):
    """Two turns, the second with the first reply in it; categories that are drawn have a seed a question."""
    rows = [
        {"question_id": 80 + n, "category": c, "turns": [f"First {n}?", f"Second {n}?"]}
        for n, c in enumerate(("math", "coding", "writing"))
    ]
    (tmp_path / "mt_bench").mkdir()
    (tmp_path / "mt_bench" / "question.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    suite = tmp_path / "turns.yaml"
    suite.write_text(
        "name: turns\nversion: 1\nabout: Short.\ncolumns: {question_id: whole, category: text, turns: texts}\n"
        "tasks: {mt_bench: {test: {path: none}, file: mt_bench/question.jsonl}}\n"
        "protocols: {single: {kind: judge, prompt: chat, max_new_tokens: 8}}\n"
    )
    ours, theirs = both(tmp_path, llama, "--suite", suite, "--data", tmp_path, name="turns-single")
    assert [s["output"] for s in theirs["samples"]][:2] == [s["output"] for s in ours["samples"]][:2]
    wanted = [w for _, wanted, _ in vllm.LLM.made[0].asked for w in wanted]
    assert len(wanted) == 6
    assert len({w.seed for w in wanted if w.temperature}) == 2


def test_kinds_that_write_nothing_are_refused(vllm, llama, data, tmp_path, capsys):
    """By suite and protocol, before anything is loaded."""
    for suite, protocol in (("commonsense", "likelihood"), ("glue", "paper"), ("gsm8k", "harness")):
        words = [llama, "--suite", suite, "--protocol", protocol, "--data", data, "--output", tmp_path]
        assert command(*words, "--backend", "vllm") == 2
        assert f"{suite}: protocol {protocol} (" in (said := capsys.readouterr().err)
        assert "--backend transformers" in said
    assert vllm.LLM.made == []


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(**THEIRS, use_dora=True), "use_dora"),
        (LoraConfig(**THEIRS, rank_pattern={"q_proj": 2}), "rank_pattern"),
        (LoraConfig(**THEIRS, alpha_pattern={"q_proj": 2}), "alpha_pattern"),
        (LoraConfig(**THEIRS, modules_to_save=["lm_head"]), "modules_to_save"),
        (LoraConfig(**(THEIRS | {"init_lora_weights": "pissa"})), "init_lora_weights=pissa"),
        (LoraConfig(**(THEIRS | {"r": 600})), "rank 600"),
        (IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]), "type IA3"),
    ],
    ids=["dora", "ranks", "alphas", "head", "pissa", "rank", "ia3"],
)
def test_adapters_that_vllm_does_not_serve(config, named, vllm, llama, data, suite, tmp_path, capsys):
    """Refused by name before anything is loaded, with the way out."""
    subject = adapter(tmp_path / "adapter", llama, config)
    assert command(subject, "--suite", suite, "--data", data, "--backend", "vllm") == 2
    said = capsys.readouterr().err
    assert named in said
    assert "take --backend transformers" in said
    assert vllm.LLM.made == []
    assert not (subject / "eval").exists()


def test_an_adapter_that_no_plain_lora_holds(vllm, llama, data, suite, tmp_path, capsys):
    """The export's own words, and nothing left of it."""
    config = CoreLoraConfig(method="lora", r=4, target_modules=["embed_tokens", "q_proj"], init_weights=False)
    subject = adapter(tmp_path / "adapter", llama, config)
    assert command(subject, "--suite", suite, "--data", data, "--backend", "vllm") == 2
    said = capsys.readouterr().err
    assert "no linear layers" in said
    assert "take --backend transformers" in said
    assert list((subject / "eval").iterdir()) == []
    assert vllm.LLM.made == []


def test_quantised_and_missing(llama, data, suite, tmp_path, monkeypatch):
    """Both are said at once, before rows are read."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    subject = Subject("x", ModelPart(name=str(llama), quantize="4bit"), None, tmp_path)
    with pytest.raises(CoreLoraError, match="2 problems") as caught:
        evaluate(subject, [load_suite(str(suite))], None, Settings(backend="vllm"))
    assert "pip install vllm" in str(caught.value)
    assert "model.quantize: 4bit" in str(caught.value)


def test_float32_beside_a_lora_on_a_gpu(vllm, llama, tmp_path, monkeypatch):
    """vLLM's kernels assert 16 bits in the middle of a run; here it is a sentence at the start."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    subject = Subject("x", ModelPart(name=str(llama), dtype="float32"), tmp_path, tmp_path)
    with pytest.raises(CoreLoraError, match="16 bits only"):
        load_engine(subject, 0, print)


@pytest.mark.parametrize("where", ["__init__", "generate"])
def test_what_vllm_raises_is_one_line(where, vllm, llama, data, suite, tmp_path, capsys, monkeypatch):
    """A model that it can't load, a prompt that is too long."""

    def fails(*parts, **options):
        raise ValueError("the maximum length\nis too small")

    monkeypatch.setattr(LLM, where, fails)
    assert command(llama, "--suite", suite, "--data", data, "--output", tmp_path, "--backend", "vllm") == 2
    said = capsys.readouterr().err
    assert "vLLM can't" in said
    assert "the maximum length is too small" in said


def test_a_model_without_settings_for_generation(vllm, llama, data, suite, tmp_path):
    """The config's end tokens count, as they do with transformers."""
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 40}))
    ours, theirs = both(tmp_path, folder, "--suite", suite, "--data", data, "--limit", 4)
    assert theirs["samples"] == ours["samples"]
    assert vllm.LLM.made[0].asked[0][1][0].stop_token_ids == [1, 40]
