"""Evaluations from the command to the file, on tiny models: every kind, adapters, stops at any moment, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from corelora import CoreLoraConfig
from corelora.cli import main
from corelora.errors import CoreLoraError
from corelora.evaluate import classify, harness, scores
from corelora.evaluate.harness import manager_for
from corelora.evaluate.likelihood import choice_texts
from corelora.evaluate.run import KIND_MODULES
from corelora.evaluate.scores import average, bootstrap_score, mean_score
from corelora.evaluate.session import Partial, batches
from corelora.evaluate.subject import find_subject, load_subject
from corelora.evaluate.suites import FOLDER, load_suite, suite_names
from corelora.tasks.answers import READERS
from processes import CORELORA, wait_for


def command(*words: object) -> int:
    """`corelora evaluate` with these words."""
    return main(["evaluate", *(str(w) for w in words)])


def result(folder: Path, name: str) -> dict:
    """One result file."""
    return json.loads((folder / "eval" / f"{name}.json").read_text())


def without_times(data: dict) -> dict:
    return {k: v for k, v in data.items() if k not in ("seconds", "versions")}


@pytest.fixture
def gsm8k(tmp_path):
    """The suite gsm8k with short replies: a model that has learned nothing writes as many tokens as it may."""
    text = (FOLDER / "gsm8k.yaml").read_text()
    path = tmp_path / "gsm8k.yaml"
    path.write_text(re.sub(r"max_new_tokens: \d+", "max_new_tokens: 64", text))
    return path


def test_every_suite_loads():
    """Names, protocols, readers and kinds exist."""
    assert {"gsm8k", "math", "humaneval", "mbpp", "glue", "commonsense", "word_problems"} <= set(suite_names())
    for name in suite_names():
        suite = load_suite(name)
        assert suite.name == name
        for protocol in suite.protocols.values():
            assert protocol.kind in KIND_MODULES
            assert all(r in READERS for r in protocol.readers)
            assert protocol.readers or protocol.kind != "generate"


def test_gsm8k_by_generation(llama, data, tmp_path, capsys):
    """Samples with prompt, output and verdict; scores that follow from them; what the run was."""
    assert (
        command(llama, "--suite", "gsm8k", "--protocol", "chat", "--data", data, "--output", tmp_path, "--limit", 5)
        == 0
    )
    made = result(tmp_path, "gsm8k-chat")
    assert [s["id"] for s in made["samples"]] == [f"gsm8k/{n}" for n in range(1, 6)]
    assert all(s["prompt"].startswith("<s>user What is") for s in made["samples"])
    right = sum(s["right"] for s in made["samples"])
    assert made["scores"]["gsm8k (gsm8k_flexible)"]["value"] == right / 5
    assert made["scores"]["gsm8k (gsm8k_flexible)"]["n"] == 5
    assert (made["protocol"], made["version"], made["adapter"], made["dtype"]) == ("chat", 1, None, "float32")
    assert made["settings"]["batch_size"] == 16
    assert {"torch", "transformers", "peft"} <= set(made["versions"])
    assert not list((tmp_path / "eval").glob("*.partial*"))
    assert "corelora report" in capsys.readouterr().out


def test_batched_and_single_replies_agree(llama, data, gsm8k, tmp_path):
    """Float32: the batch size changes no reply."""
    texts = []
    for size in (1, 4, 16):
        out = tmp_path / str(size)
        command(llama, "--suite", gsm8k, "--data", data, "--output", out, "--batch-size", size, "--json")
        texts.append([s["output"] for s in result(out, "gsm8k-paper")["samples"]])
    assert texts[0] == texts[1] == texts[2]


def test_adapter_merged_or_not(llama, data, gsm8k, tmp_path):
    """A corelora adapter and a PEFT one: merged by default, the same replies with the adapter beside the weights."""
    for name, config in {
        "ours": CoreLoraConfig(method="nlora", r=4, target_modules="all-linear", init_weights=False),
        "theirs": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    }.items():
        base = AutoModelForCausalLM.from_pretrained(llama)
        get_peft_model(base, config).save_pretrained(tmp_path / name)
        words = [tmp_path / name, "--suite", gsm8k, "--data", data, "--limit", 4]
        assert command(*words) == 0
        merged = result(tmp_path / name, "gsm8k-paper")
        assert command(*words, "--no-merge", "--output", tmp_path / f"{name}-beside") == 0
        beside = result(tmp_path / f"{name}-beside", "gsm8k-paper")
        assert (merged["merged"], beside["merged"]) == (True, False)
        assert merged["adapter_fingerprint"] == beside["adapter_fingerprint"]
        assert [s["output"] for s in merged["samples"]] == [s["output"] for s in beside["samples"]]
        plain = tmp_path / f"{name}-plain"
        command(llama, "--suite", gsm8k, "--data", data, "--limit", 4, "--output", plain)
        assert [s["output"] for s in result(plain, "gsm8k-paper")["samples"]] != [
            s["output"] for s in merged["samples"]
        ]


def test_commonsense_by_generation_and_likelihood(llama, data, tmp_path, capsys):
    """Tasks without rows are skipped by name; the rest has its own scores and an average."""
    for protocol, name in (("paper", "piqa (choice)"), ("likelihood", "piqa acc_norm")):
        words = [llama, "--suite", "commonsense", "--protocol", protocol, "--data", data, "--output", tmp_path]
        assert command(*words) == 0
        made = result(tmp_path, f"commonsense-{protocol}")
        assert name in made["scores"]
        assert made["scores"]["commonsense average"]["n"] == 10
        assert {"boolq", "siqa", "winogrande"} <= set(made["skipped"])
        assert "skipped boolq" in capsys.readouterr().out


def test_likelihood_is_the_models_own(llama, data, tmp_path):
    """The sums of log-probabilities against the model's logits, worked out plainly."""
    words = [
        llama,
        "--suite",
        "commonsense",
        "--protocol",
        "likelihood",
        "--data",
        data,
        "--output",
        tmp_path,
        "--limit",
        1,
    ]
    command(*words)
    sample = result(tmp_path, "commonsense-likelihood")["samples"][0]
    subject = find_subject(str(llama))
    model, tokenizer = load_subject(subject)
    for text, value in sample["output"].items():
        ids = tokenizer(sample["prompt"] + " " + text, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(logs[n - 1, ids[n]]) for n in range(start, len(ids)))
        assert value == pytest.approx(expected, abs=1e-3)


def test_glue_with_a_trained_head(bert, data, tmp_path):
    """A classifier's adapter with its head, found through its base; logits as the model gives them."""
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    config = CoreLoraConfig(method="lora", r=4, target_modules=["query"], task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert command(tmp_path / "adapter", "--suite", "glue", "--data", data, "--batch-size", 5) == 0
    made = result(tmp_path / "adapter", "glue-paper")
    assert list(made["scores"]) == ["rte accuracy"]
    assert len(made["samples"]) == 12
    _, tokenizer = load_subject(find_subject(str(bert)), classes=2)
    with torch.no_grad():
        logits = model(**tokenizer("A 0", "B 0", return_tensors="pt")).logits[0]
    assert made["samples"][0]["output"] == pytest.approx(logits.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("form", "labels"),
    [("cola", [0, 1, 1, 0, 1]), ("mnli", [0, 1, 2, 2, 1]), ("mrpc", [1, 1, 0, 0, 1]), ("qqp", [0, 1, 1, 0, 0])],
)
def test_glue_gold_is_100_percent(monkeypatch, form, labels):
    """Predictions that are the labels score 1 in every metric; their opposites score low."""
    monkeypatch.setattr(scores, "RESAMPLES", 20)  # of the spread, which `test_scores` looks at
    labels = np.array(labels)
    outputs = np.eye(3 if form == "mnli" else 2)[labels]
    for score in classify.scores(form, form, outputs, labels).values():
        assert score["value"] == 1.0
    for score in classify.scores(form, form, -outputs, labels).values():
        assert score["value"] <= 0.0 or form == "mnli"


def test_stsb_gold():
    labels = np.array([0.0, 2.5, 5.0, 1.0])
    for score in classify.scores("stsb", "stsb", labels[:, None], labels).values():
        assert score["value"] == pytest.approx(1.0)


def test_harness_on_local_rows(llama, data, tmp_path):
    """lm-evaluation-harness's own gsm8k, 5-shot, with rows from files; its filters are its own."""
    words = [llama, "--suite", "gsm8k", "--protocol", "harness", "--output", tmp_path, "--limit", 2]
    words += ["--data", f"gsm8k={data}/math/gsm8k_test.jsonl", "--data", f"gsm8k.train={data}/math/gsm8k_train.jsonl"]
    assert command(*words) == 0
    made = result(tmp_path, "gsm8k-harness")
    assert {"gsm8k exact_match (strict-match)", "gsm8k exact_match (flexible-extract)"} <= set(made["scores"])
    assert "version 3" in made["notes"][0]
    assert made["samples"][0]["prompt"].count("Question:") == 6


GROUP = "minerva_math"
HARNESS_TASKS = {t.harness for s in suite_names() for t in load_suite(s).tasks.values() if t.harness}


@pytest.mark.parametrize("name", sorted(HARNESS_TASKS - {GROUP}))
def test_one_folder_of_the_harness_is_read(name):
    """Where its own file defines a task, settings and all; not its ten thousand others."""
    manager = manager_for(name)
    assert manager.task_index[name].cfg["task"] == name
    assert len(manager.all_tasks) < 100


@pytest.mark.parametrize("name", [GROUP, "no_such_task"])
def test_all_of_the_harness_is_read_for_what_no_one_file_defines(name, monkeypatch):
    """A group, whose tasks lie elsewhere; and a name that is nowhere, for which the harness has its own words."""
    asked = []
    monkeypatch.setattr(harness, "TaskManager", lambda **options: asked.append(options))
    manager_for(name)
    assert asked == [{}]


def has_come_to(folder: Path, lines: int) -> bool:
    """Whether an evaluation has written more than so many lines, or is over."""
    begun = folder / "gsm8k-chat.gsm8k.partial.jsonl"
    return (folder / "gsm8k-chat.json").exists() or (begun.exists() and begun.read_text().count("\n") > lines)


@pytest.mark.slow
def test_killed_at_three_moments(llama, data, gsm8k, tmp_path, driver):
    """SIGKILL after the first, third and last batch: the same command goes on, the file is an unbroken run's."""
    words = [llama, "--suite", gsm8k, "--protocol", "chat", "--data", data, "--batch-size", 2]
    assert command(*words, "--output", tmp_path / "whole") == 0
    for lines in (2, 6, 10):
        out = tmp_path / f"killed-{lines}"
        begun = out / "eval" / "gsm8k-chat.gsm8k.partial.jsonl"
        pid = driver.start(*CORELORA, "evaluate", *words, "--output", out, log=tmp_path / "log.txt")
        wait_for(partial(has_come_to, out / "eval", lines), seconds=120)
        os.kill(pid, signal.SIGKILL)
        code = driver.wait(pid)
        ended = (out / "eval" / "gsm8k-chat.json").exists()  # it was quicker than this test
        assert begun.exists() != ended
        assert ended or code == -signal.SIGKILL
        if not ended:  # as a line that was being written when the power went
            with begun.open("a") as f:
                f.write('{"id": "gsm8k/1", "outp')
        assert command(*words, "--output", out) == 0
        assert without_times(result(out, "gsm8k-chat")) == without_times(result(tmp_path / "whole", "gsm8k-chat"))


def test_what_is_there_is_not_made_again(tmp_path):
    """Batches are cut over all samples; whole ones are left out, others are made whole; another key begins anew."""
    ids, lengths = ["a", "b", "c", "d", "e"], [1, 5, 3, 2, 4]
    path = tmp_path / "x.partial.jsonl"
    partial = Partial(path, {"model": 1})
    assert list(batches(ids, lengths, 2, partial)) == [[1, 4], [2, 3], [0]]
    partial.add({"b": 1, "e": 2, "c": 3})
    again = Partial(path, {"model": 1})
    assert again.outputs == {"b": 1, "e": 2, "c": 3}
    assert list(batches(ids, lengths, 2, again)) == [[2, 3], [0]]
    assert Partial(path, {"model": 2}).outputs == {}


def test_mistakes_are_named_before_a_model_is_read(llama, data, tmp_path, capsys):
    """The nearest right word, exit code 2."""
    for words, message in (
        (["--suite", "gsm8"], "gsm8k"),
        (["--suite", "gsm8k", "--protocol", "papr"], "paper"),
        (["--suite", "gsm8k", "--data", "gsm8=x"], "gsm8k"),
        (["--suite", "gsm8k", "--data", str(tmp_path / "none")], "no such folder"),
        (["--suite", "gsm8k", "--data", str(data), "--limit", "0"], "limit must be at least 1"),
        (["--suite", "gsm8k", "--data", "gsm8k=missing.jsonl"], "missing.jsonl"),
    ):
        assert command(tmp_path / "no-model", *words) == 2
        assert message in capsys.readouterr().err


def test_folders_that_are_nothing(tmp_path):
    (tmp_path / "recipe.txt").touch()
    with pytest.raises(CoreLoraError, match="neither a run"):
        find_subject(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CoreLoraError, match="which model"):
        find_subject(str(tmp_path))


def test_scores():
    """Means, errors and averages, worked out by hand."""
    assert mean_score([1, 0, 1, 0]) == {"value": 0.5, "stderr": pytest.approx((1 / 3 / 4) ** 0.5), "n": 4}
    assert average([{"value": 1.0, "stderr": 0.3, "n": 2}, {"value": 0.0, "stderr": 0.4, "n": 3}]) == {
        "value": 0.5,
        "stderr": pytest.approx(0.25),
        "n": 5,
    }
    values = np.arange(100.0)
    score = bootstrap_score(lambda at: float(values[at].mean()), 100)
    assert score["value"] == 49.5
    assert score["stderr"] == pytest.approx(values.std() / 10, rel=0.15)


def test_choices_in_llm_adapters_rows():
    row = {
        "instruction": "Q?\n\nSolution1: do a.\n\nSolution2: do b.\n\nAnswer format: solution1/solution2",
        "answer": "solution2",
    }
    assert choice_texts(row) == ("Q?", ["do a.", "do b."], 1)
    row = {"instruction": "Is it so?\n\nAnswer format: true/false", "answer": "false"}
    assert choice_texts(row) == ("Is it so?", ["true", "false"], 1)
