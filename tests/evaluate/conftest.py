"""Tiny models and rows for the tests of evaluation, and a cache of its own."""

import json

import pytest
import transformers

from train.helpers import save_bert, save_llama


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Rows read in these tests go nowhere else; quiet loading."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny language model."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A tiny encoder."""
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of local rows with the names that the suites look for."""
    root = tmp_path_factory.mktemp("data")
    problems = [{"question": f"What is {n} + {n}?" + " Think." * (n % 4), "answer": f"#### {2 * n}"} for n in range(11)]
    choices = [
        {
            "instruction": f"Choose: what is {n}?\n\nAnswer1: one Answer2: {n}\n\nAnswer format: answer1/answer2",
            "input": "",
            "output": "the correct answer is answer2",
            "answer": "answer2",
        }
        for n in range(5)
    ]
    pairs = [{"sentence1": f"A {n}", "sentence2": f"B {n % 3}", "label": n % 2} for n in range(12)]
    for name, rows in {
        "math/gsm8k_test.jsonl": problems,
        "math/gsm8k_train.jsonl": problems,
        "commonsense/piqa_test.jsonl": choices,
        "commonsense/obqa_test.jsonl": choices,
        "glue/rte_dev.jsonl": pairs,
    }.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
