"""The quick start's stages on a tiny random model with a real tokenizer made on the spot."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corelora.quickstart import run as quickstart
from corelora.quickstart.run import Settings, run
from corelora.recipe import Recipe, load_recipe
from corelora.run.generate import replies
from corelora.tasks.word_problems import TEMPLATES, training_problems

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny Llama and a character tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    characters = [chr(c) for c in range(32, 127)]
    vocabulary = {token: n for n, token in enumerate(["<pad>", "</s>", "<s>", "<unk>", *characters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), num_hidden_layers=2, eos_token_id=1, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder, tokenizer


def test_batched_replies_equal_single_ones(tiny):
    folder, tokenizer = tiny
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    questions = [p.question for p in training_problems(5)]
    together = replies(model, tokenizer, questions, max_new_tokens=8, batch_size=3)
    assert len(together) == len(questions)
    alone = [replies(model, tokenizer, [q], max_new_tokens=8)[0] for q in questions]
    assert together == alone


def test_replies_tell_whether_they_were_cut(tiny):
    """A model whose every next token is the end stops at once; one that never says it is cut."""
    folder, tokenizer = tiny
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    head = torch.nn.Linear(32, model.config.vocab_size)
    torch.nn.init.zeros_(head.weight)
    model.lm_head = head
    for token, finished in ((tokenizer.eos_token_id, True), (40, False)):
        head.bias.data = torch.nn.functional.one_hot(torch.tensor(token), model.config.vocab_size).float()
        (reply,) = replies(model, tokenizer, ["How many?"], max_new_tokens=4)
        assert reply.finished == finished
        assert reply.text.replace(" ", "") == ("" if finished else tokenizer.decode([40]) * 4)


@pytest.fixture
def recipe(tiny):
    """The shipped recipe, cut down and on the tiny model."""
    small = ["loop.steps=3", "loop.batch_size=2", "method.r=4", "loop.save_every=2", "data.max_length=400"]
    return load_recipe(Recipe, RECIPE, [f"model.name={tiny[0]}", *small])


def test_all_stages(tiny, recipe, tmp_path, capsys):
    """Every stage on the tiny model; what was saved loads, and the plain LoRA gives the adapter's logits."""
    _, tokenizer = tiny
    out = tmp_path / "run"
    results = run(recipe, out, Settings(held_out=14, max_new_tokens=8))
    saved = json.loads((out / "quickstart.json").read_text())
    assert saved == json.loads(json.dumps(results))
    for side in ("before", "after"):
        assert saved[side]["all"]["count"] == 14
        assert set(saved[side]) == {"all"} | {t.name for t in TEMPLATES}
        right = sum(sample[side]["right"] for sample in saved["samples"])
        assert right == saved[side]["all"]["right"]
    assert len(saved["samples"]) == 14
    assert {"corelora", "peft", "torch", "transformers", "python"} <= set(saved["versions"])
    assert set(saved["seconds"]) == {"model", "before", "train", "after", "files", "all"}
    loaded = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    assert loaded.active_peft_config.method == "nlora"
    assert saved["trained_parameters"] == sum(p.numel() for n, p in loaded.named_parameters() if "corelora_" in n)
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    ids = torch.tensor([[5, 6, 7]])
    plain = AutoPeftModelForCausalLM.from_pretrained(out / "lora")
    torch.testing.assert_close(plain(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-4)
    printed = capsys.readouterr().out
    assert "exact match on 14 held-out problems" in printed
    assert "Load the adapter" in printed
    assert replies(loaded, tokenizer, ["How many?"], max_new_tokens=4)


def test_a_second_run_says_the_same(recipe, tmp_path):
    """The training is not repeated in a finished folder, and its figures stay."""
    settings = Settings(held_out=14, max_new_tokens=4)
    first, second = run(recipe, tmp_path, settings), run(recipe, tmp_path, settings)
    for key in ("before", "after", "losses", "samples"):
        assert first[key] == second[key]


def test_command_line(monkeypatch, capsys):
    """The shipped recipe by path, values put over it; a mistake is one message and exit code 2."""
    seen = []
    monkeypatch.setattr(quickstart, "run", lambda recipe, out, settings: seen.append((recipe, str(out), settings)))
    assert quickstart.main([str(RECIPE), "--set", "optim.lr=1e-4", "--held-out", "28", "--output", "x"]) == 0
    recipe, out, settings = seen[0]
    assert (recipe.optim.lr, recipe.method["name"], out, settings.held_out) == (1e-4, "nlora", "x", 28)
    assert quickstart.main([str(RECIPE), "--set", "optim.rl=1"]) == 2
    assert "optim.rl" in capsys.readouterr().err
