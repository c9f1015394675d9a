"""The main path: a recipe becomes a run folder."""

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from corelora.run.quickstart import Collator
from corelora.train.run import train
from corelora.train.tasks import TASKS, Rows, Task
from corelora.train.trainer import ReplyTrainer
from train.helpers import make_recipe, prepare_folder, sums


class Plain(Task):
    """A task registered from outside the package: replies, without a cache or a prompt."""

    task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM
    has_head = False

    def config_settings(self, recipe):
        return {}

    def problems(self, recipe):
        return []

    def encode(self, recipe, which, tokenizer):
        source = getattr(recipe.data, which)
        with open(source.path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return Rows(
            dataset=Dataset.from_list([self._encode(row, tokenizer) for row in rows]), counts={"rows": len(rows)}
        )

    def _encode(self, row, tokenizer):
        prompt = tokenizer(row["question"] + "\n")["input_ids"]
        reply = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}

    def collator(self, recipe, tokenizer):
        return Collator(tokenizer.pad_token_id)

    def measure(self, recipe):
        return lambda p: {"loss": float(p.predictions.sum() / p.label_ids.sum()), "tokens": int(p.label_ids.sum())}

    def trainer_class(self):
        return ReplyTrainer

    def row_problems(self, rows, tokenizer, stop_ids):
        return []

    def model_problems(self, recipe, model, collator):
        return []

    def sample(self, row, tokenizer):
        return [(tokenizer.decode(row["input_ids"]), True)]


@pytest.fixture
def outside():
    """The task `plain`, taken out again afterwards."""
    TASKS.add("plain", Plain())
    yield "plain"
    TASKS.remove("plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_folder(tmp_path_factory.mktemp("train"))


def test_a_task_from_outside_gives_a_run_folder(outside, folder, tmp_path):
    """Recipe, versions, metrics, adapter and results are there, and the adapter loads."""
    results = train(make_recipe(folder, task=outside), tmp_path / "run")
    run = tmp_path / "run"
    assert {"recipe.yaml", "versions.json", "metrics.jsonl", "adapter", "results.json"} <= {
        p.name for p in run.iterdir()
    }
    assert json.loads((run / "results.json").read_text()) == results
    assert results["steps"] == 6
    assert results["test_tokens"] == sum(len(row["answer"]) + 1 for row in sums(10, 100))
    model = AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    ids = torch.tensor([[8, 9, 10]])
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert not torch.equal(model(ids).logits, base(ids).logits)


def test_the_test_loss_is_a_mean_over_tokens(outside, folder, tmp_path):
    """Rows of different lengths, in batches of different sizes: the same figure as one sum over all tokens."""
    results = train(make_recipe(folder, task=outside, loop={"test_batch_size": 3}), tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    task, recipe = Plain(), make_recipe(folder, task=outside)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    total, count = 0.0, 0
    for row in task.encode(recipe, "test", tokenizer).dataset:
        labels = torch.tensor([row["labels"]])
        n = int((labels != -100).sum())
        total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss) * n
        count += n
    assert results["test_loss"] == pytest.approx(total / count, abs=1e-5)
