"""Tiny models, tokenizers and recipes for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from corelora.recipe import Recipe, read_tree
from corelora.train.folder import RunFolder
from corelora.train.resume import Standing
from corelora.train.run import Run, build_model, build_trainer, prepare
from corelora.train.tasks import TASKS

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "[CLS]", "[SEP]"]
CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A character tokenizer with a chat template."""
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *CHARACTERS])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, cls_token="[CLS]", sep_token="[SEP]", model_max_length=512, **names
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_llama(folder: Path, **sizes: Any) -> Path:
    """A tiny Llama with its tokenizer."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 2, **sizes}
    vocabulary = len(SPECIAL) + len(CHARACTERS)
    config = LlamaConfig(vocab_size=vocabulary, eos_token_id=1, pad_token_id=0, bos_token_id=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    """A tiny BERT with its tokenizer, without a head."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, start: int = 0) -> list[dict[str, str]]:
    """Rows of the form gsm8k that a tiny model can learn something from."""
    pairs = [((7 * n) % 23, (5 * n) % 19) for n in range(start, start + count)]
    return [{"question": f"{a} + {b} = ?", "answer": f"It is {a + b}."} for a, b in pairs]


def make_recipe(folder: Path, **parts: Any) -> Recipe:
    """A recipe over a tiny Llama and sums; each part's keys can be changed.

    Args:
        folder: holds the model as `model` and rows as train.jsonl and test.jsonl; made by `prepare_folder`.
        **parts: method, loop, optim, data, model, stats, task: keys laid over the defaults.
    """
    tree: dict[str, Any] = {
        "task": "instruct",
        "model": {"name": str(folder / "model")},
        "data": {
            "train": {"path": str(folder / "train.jsonl")},
            "test": {"path": str(folder / "test.jsonl")},
            "form": "gsm8k",
            "prompt": "plain",
            "max_length": 64,
        },
        "method": {"name": "nlora", "r": 4, "target_modules": "all-linear"},
        "optim": {"lr": 1e-3},
        "loop": {"steps": 6, "batch_size": 4, "log_every": 2, "save_every": 100, "fast": "off"},
    }
    for name, keys in parts.items():
        replace = name == "method" or not isinstance(keys, dict)
        tree[name] = keys if replace else {**tree.get(name, {}), **keys}
    recipe, problems = read_tree(Recipe, tree)
    assert not problems, problems
    assert recipe is not None
    return recipe


def run_of(recipe: Recipe, output: Path) -> Run:
    """What a run holds before its model."""
    task = TASKS[recipe.task]
    return prepare(recipe, task.load_config(recipe), RunFolder(output))


def trainer_of(recipe: Recipe, output: Path) -> Any:
    """The Trainer of a run that has not begun."""
    run = run_of(recipe, output)
    run.folder.begin(recipe)
    return build_trainer(run, build_model(run), Standing())


def surround_runs(monkeypatch: Any, folder: Path) -> None:
    """What runs keep goes to a cache in `folder`; they load quietly, and those of this process draw no loss.png.

    To draw it would take a fifth of a short run. test_run.py looks at one that a run has drawn, test_progress.py at
    what is drawn of rows; runs in processes of their own draw theirs. Nor is garbage collected before each run begins.
    """
    monkeypatch.setenv("CORELORA_CACHE", str(folder / "cache"))
    monkeypatch.setattr("corelora.train.run.loss_curve", lambda rows, path, title: None)
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)
    transformers.utils.logging.disable_progress_bar()


def prepare_folder(folder: Path) -> Path:
    """Model and rows for `make_recipe`."""
    save_llama(folder / "model")
    write_rows(folder / "train.jsonl", sums(40))
    write_rows(folder / "test.jsonl", sums(10, 100))
    return folder
