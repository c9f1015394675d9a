"""The task classify: heads, metrics, regression, and an MNLI run before MRPC."""

import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    EvalPrediction,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from corelora.errors import CoreLoraError
from corelora.folders import open_model
from corelora.train.dry_run import plan
from corelora.train.models import head_names
from corelora.train.run import build_model, train
from corelora.train.tasks import TASKS
from train.helpers import make_recipe, run_of, save_bert, trainer_of, write_rows

TARGETS = ["query", "value"]
WORDS = {1: "good fine nice", 0: "bad poor sad"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT and rows of three tasks."""
    folder = tmp_path_factory.mktemp("bert")
    save_bert(folder / "model")
    for part, count in (("train", 24), ("test", 9)):
        words = [(n % 2, WORDS[n % 2].split()[n % 3]) for n in range(count)]
        write_rows(
            folder / f"sst2_{part}.jsonl", [{"sentence": f"{w} film {n}", "label": y} for n, (y, w) in enumerate(words)]
        )
        pairs = [{"sentence1": f"{w} {n}", "sentence2": f"{w} {n + 1}"} for n, (_, w) in enumerate(words)]
        write_rows(folder / f"stsb_{part}.jsonl", [{**p, "label": (n % 11) / 2} for n, p in enumerate(pairs)])
        write_rows(folder / f"mrpc_{part}.jsonl", [{**p, "label": n % 2} for n, p in enumerate(pairs)])
        mnli = [{"premise": p["sentence1"], "hypothesis": p["sentence2"], "label": n % 3} for n, p in enumerate(pairs)]
        write_rows(folder / f"mnli_{part}.jsonl", mnli)
    return folder


def classify(folder, form, **parts):
    """A recipe for one GLUE task."""
    files = {which: {"path": str(folder / f"{form}_{which}.jsonl")} for which in ("train", "test")}
    given = {"method": {"name": "nlora", "r": 4, "target_modules": TARGETS}, **parts}
    return make_recipe(folder, task="classify", data={**files, "form": form}, **given)


@pytest.mark.parametrize("name", ["nlora", "nora", "lora_sb", "inttune", "lora", "peft:lora", "full"])
@pytest.mark.parametrize(("form", "metric"), [("sst2", "test_accuracy"), ("stsb", "test_pearson")])
def test_every_method_trains_with_its_head(bert, tmp_path, name, form, metric):
    method = {"name": name} | ({} if name == "full" else {"r": 4, "target_modules": TARGETS})
    results = train(classify(bert, form, method=method), tmp_path)
    assert -1 <= results[metric] <= 1
    assert results["test_loss"] > 0
    kind = AutoModelForSequenceClassification if name == "full" else AutoPeftModelForSequenceClassification
    options = {} if name == "full" else {"num_labels": 1 if form == "stsb" else 2}
    model = kind.from_pretrained(tmp_path / ("model" if name == "full" else "adapter"), **options)
    head = model.get_submodule("classifier" if name == "full" else "base_model.model.classifier")
    trained = head if name == "full" else head.modules_to_save["default"]
    assert trained.weight.shape == (1 if form == "stsb" else 2, 32)


def test_the_test_figures_are_those_of_the_saved_adapter(bert, tmp_path):
    """Loss and metrics recomputed from the files that the run left, in one batch."""
    results = train(classify(bert, "sst2", loop={"test_batch_size": 2}), tmp_path)
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=2).eval()
    run = run_of(classify(bert, "sst2"), tmp_path / "again")
    batch = run.collator([dict(row) for row in run.rows["test"].dataset])
    with torch.no_grad():
        output = model(**batch)
    assert results["test_loss"] == pytest.approx(float(output.loss), abs=1e-5)
    right = (output.logits.argmax(-1) == batch["labels"]).float().mean()
    assert results["test_accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize("form", ["sst2", "stsb"])
def test_accumulated_steps_equal_one_large_batch(bert, tmp_path, form):
    """Two batches of 4 give the update of one of 8: the mean of a classifier's loss is scaled."""
    norms = []
    for n, loop in enumerate(({"batch_size": 8}, {"batch_size": 4, "accumulate": 2})):
        recipe = classify(bert, form, loop={**loop, "steps": 1, "log_every": 1})
        recipe.data.shuffle = False
        trainer_of(recipe, tmp_path / str(n)).train()
        rows = [json.loads(line) for line in (tmp_path / str(n) / "metrics.jsonl").read_text().splitlines()]
        norms.append((rows[0]["grad_norm"], rows[0]["loss"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "config", "heads"),
    [
        (BertForSequenceClassification, BertConfig, ["classifier"]),
        (RobertaForSequenceClassification, RobertaConfig, ["classifier"]),
        (DebertaV2ForSequenceClassification, DebertaV2Config, ["pooler", "classifier"]),
    ],
)
def test_what_is_new_on_top_is_a_head(kind, config, heads):
    """DeBERTa's pooler comes with the task, not with the pretrained model, so it must train."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    assert head_names(kind(config(vocab_size=40, **sizes))) == heads


def test_a_run_begins_from_another_task(bert, tmp_path):
    """MNLI's factors go on in MRPC; its head of three labels stays behind."""
    train(classify(bert, "mnli"), tmp_path / "mnli")
    recipe = classify(bert, "mrpc", model={"start_from": str(tmp_path / "mnli")})
    model = build_model(run_of(recipe, tmp_path / "mrpc"))
    saved = load_file(tmp_path / "mnli" / "adapter" / "adapter_model.safetensors")
    own = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    factors = [n for n in saved if "corelora" in n and n in own]
    assert len(factors) == 12
    assert all(torch.equal(own[n], saved[n]) for n in factors)
    assert own["base_model.model.classifier.modules_to_save.weight"].shape == (2, 32)
    results = train(recipe, tmp_path / "mrpc")
    assert set(results) >= {"test_accuracy", "test_f1"}


def test_a_whole_model_begins_from_another_task(bert, tmp_path):
    train(classify(bert, "mnli", method={"name": "full"}), tmp_path / "mnli")
    recipe = classify(bert, "mrpc", method={"name": "full"}, model={"start_from": str(tmp_path / "mnli")})
    model = build_model(run_of(recipe, tmp_path / "mrpc"))
    saved = load_file(tmp_path / "mnli" / "model" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(model.state_dict()[name], saved[name])
    assert model.classifier.weight.shape == (2, 32)


def test_a_new_adapter_on_a_model_of_another_task(bert, tmp_path):
    """MNLI's whole model as `model.name`: three labels there, two here."""
    train(classify(bert, "mnli", method={"name": "full"}), tmp_path / "mnli")
    recipe = classify(bert, "mrpc", model={"name": str(tmp_path / "mnli" / "model")})
    results = train(recipe, tmp_path / "mrpc")
    assert set(results) >= {"test_accuracy", "test_f1"}
    loaded = open_model(str(tmp_path / "mrpc" / "adapter"), "default")
    assert loaded.base_model.model.classifier.modules_to_save["default"].weight.shape == (2, 32)


@pytest.mark.parametrize("changes", [{"r": 2}, {"name": "inttune"}, {"target_modules": ["query"]}])
def test_an_adapter_of_another_kind_is_refused(bert, tmp_path, changes):
    train(classify(bert, "mnli", loop={"steps": 1}), tmp_path / "mnli")
    method = {"name": "nlora", "r": 4, "target_modules": TARGETS, **changes}
    recipe = classify(bert, "mrpc", method=method, model={"start_from": str(tmp_path / "mnli")})
    with pytest.raises(CoreLoraError, match="is an adapter of another kind"):
        build_model(run_of(recipe, tmp_path / "mrpc"))


def test_the_loss_of_predictions(bert):
    """Against PyTorch's own losses."""
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(7, 2)), generator.integers(0, 2, 7)
    found = TASKS["classify"].measure(classify(bert, "sst2"))(EvalPrediction(logits, labels))
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert found["loss"] == pytest.approx(float(expected))
    scores, wanted = generator.normal(size=(7, 1)), generator.normal(size=7)
    found = TASKS["classify"].measure(classify(bert, "stsb"))(EvalPrediction(scores, wanted))
    assert found["loss"] == pytest.approx(float(np.mean((scores[:, 0] - wanted) ** 2)))


def test_rows_longer_than_the_models_positions(bert, tmp_path):
    """BERT has a table of 128 here; a model without one would read on."""
    rows = write_rows(tmp_path / "long.jsonl", [{"sentence": "word " * 40, "label": n % 2} for n in range(8)])
    data = {"train": {"path": str(rows)}, "test": None, "form": "sst2", "max_length": 300}
    recipe = make_recipe(bert, task="classify", data=data, method={"name": "lora", "r": 2})
    assert "made for rows of 128 tokens, and data.max_length is 300" in plan(recipe, tmp_path / "run")
    with pytest.raises(CoreLoraError, match=r"rows have up to 200 tokens.* lower data.max_length to 128"):
        train(recipe, tmp_path / "run")
