"""The quick start's stages on a tiny random model with a real tokenizer made on the spot."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corelora.run import quickstart
from corelora.run.generate import chat_prompt, replies
from corelora.run.quickstart import Collator, Settings, encode, run
from corelora.tasks.word_problems import TEMPLATES, training_problems

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


def test_all_stages(tiny, tmp_path, capsys):
    """Every stage on the tiny model; what was saved loads and the adapter is left unmerged and as trained."""
    folder, tokenizer = tiny
    out = tmp_path / "run"
    settings = Settings(steps=3, batch_size=2, r=4, held_out=14, max_new_tokens=8, out=str(out))
    results = run(settings, folder)
    saved = json.loads((out / "results.json").read_text())
    assert saved == json.loads(json.dumps(results))
    for side in ("before", "after"):
        assert saved[side]["all"]["count"] == 14
        assert set(saved[side]) == {"all"} | {t.name for t in TEMPLATES}
        right = sum(sample[side]["right"] for sample in saved["samples"])
        assert right == saved[side]["all"]["right"]
    assert len(saved["samples"]) == 14
    assert saved["settings"]["seed"] == 0
    assert set(saved["versions"]) == {"corelora", "peft", "torch", "transformers", "python"}
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


def test_a_second_run_takes_the_place_of_the_first(tiny, tmp_path):
    """Same settings, same figures; nothing stands in the way."""
    settings = Settings(steps=2, batch_size=2, r=4, held_out=14, max_new_tokens=4, out=str(tmp_path))
    first, second = run(settings, tiny[0]), run(settings, tiny[0])
    for key in ("before", "after", "losses", "samples"):
        assert first[key] == second[key]


def test_command_line_sets_what_the_settings_name(monkeypatch):
    """Every field of Settings is an option, of the field's own type."""
    seen = []
    monkeypatch.setattr(quickstart, "run", seen.append)
    quickstart.main([])
    quickstart.main(["--steps", "7", "--lr", "1e-4", "--held-out", "28", "--method", "lora"])
    assert seen == [Settings(), Settings(steps=7, lr=1e-4, held_out=28, method="lora")]
