"""The quick start's stages on a tiny random model with a real tokenizer made on the spot."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corelora.run.generate import chat_prompt, replies
from corelora.run.quickstart import Collator, Settings, encode, run
from corelora.tasks.word_problems import training_problems

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


def test_loss_is_on_the_reply_only(tiny):
    _, tokenizer = tiny
    problem = training_problems(1)[0]
    row = encode(tokenizer, problem)
    trained = [t for t in row["labels"] if t != -100]
    assert len(row["labels"]) == len(row["input_ids"])
    assert trained[-1] == tokenizer.eos_token_id, "the stop token must be trained"
    assert "".join(tokenizer.decode([t]) for t in trained[:-1]) == problem.solution
    prompt_length = len(row["labels"]) - len(trained)
    assert all(t == -100 for t in row["labels"][:prompt_length])
    ids = tokenizer(chat_prompt(tokenizer, problem.question), add_special_tokens=False)["input_ids"]
    assert row["input_ids"][:prompt_length] == ids


def test_padding_has_no_label_and_no_attention():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_batched_replies_equal_single_ones(tiny):
    folder, tokenizer = tiny
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    questions = [p.question for p in training_problems(5)]
    together = replies(model, tokenizer, questions, max_new_tokens=8, batch_size=3)
    alone = [replies(model, tokenizer, [q], max_new_tokens=8)[0] for q in questions]
    assert together == alone


@pytest.mark.slow
def test_all_stages(tiny, tmp_path, capsys):
    folder, tokenizer = tiny
    out = tmp_path / "run"
    settings = Settings(steps=3, batch_size=2, r=4, held_out=14, out=str(out))
    results = run(settings, folder)
    saved = json.loads((out / "results.json").read_text())
    assert saved["before"]["all"]["count"] == saved["after"]["all"]["count"] == 14
    assert len(saved["samples"]) == 14
    assert saved["losses"] == results["losses"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    assert loaded.active_peft_config.method == "nlora"
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    printed = capsys.readouterr().out
    assert "exact match" in printed
    assert "Load the adapter" in printed
    assert replies(loaded, tokenizer, ["How many?"], max_new_tokens=4)
