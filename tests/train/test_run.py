"""The main path: a recipe becomes a run folder, for every kind of method, loop and storage of rows."""

import json

import pytest
import torch
import yaml
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from corelora.data.collate import ReplyCollator
from corelora.errors import CoreLoraError
from corelora.kernels.fast import set_fast
from corelora.recipe import Recipe, read_tree
from corelora.train.arguments import float32_products, precision_problems
from corelora.train.plots import loss_curve
from corelora.train.run import build_model, train
from corelora.train.tasks import TASKS, Rows, Task
from corelora.train.trainer import ReplyTrainer
from train.helpers import make_recipe, run_of, sums, trainer_of, write_rows


class Plain(Task):
    """A task registered from outside the package: replies, without a cache or a prompt."""

    task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM

    def problems(self, recipe):
        return []

    def encode(self, recipe, which, tokenizer):
        source = getattr(recipe.data, which)
        with open(source.path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return Rows(dataset=Dataset.from_list([self._encode(row, tokenizer) for row in rows]))

    def _encode(self, row, tokenizer):
        prompt = tokenizer(row["question"] + "\n")["input_ids"]
        reply = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}

    def collator(self, recipe, tokenizer):
        return ReplyCollator(tokenizer.pad_token_id)

    def measure(self, recipe):
        return lambda p: {"loss": float(p.predictions.sum() / p.label_ids.sum()), "tokens": int(p.label_ids.sum())}

    def trainer_class(self):
        return ReplyTrainer

    def sample(self, row, tokenizer):
        return [(tokenizer.decode(row["input_ids"]), True)]


@pytest.fixture
def outside():
    """The task `plain`, taken out again afterwards."""
    TASKS.add("plain", Plain())
    yield "plain"
    TASKS.remove("plain")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_folded_run_is_the_same_run(folder, tmp_path):
    """One loss curve with and without `loop.fold`, an ordinary adapter, and what can't be folded is said beforehand."""
    results = {}
    for fold in (False, True):
        recipe = make_recipe(folder, method={"name": "nlora", "r": 4}, loop={"fold": fold})
        results[fold] = train(recipe, tmp_path / str(fold))
    assert results[True]["train_loss"] == pytest.approx(results[False]["train_loss"], abs=1e-4)
    one, other = (load_file(tmp_path / str(fold) / "adapter" / "adapter_model.safetensors") for fold in (False, True))
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=2e-3, rtol=0)
    for method in ({"name": "peft:lora", "r": 4}, {"name": "full"}):
        with pytest.raises(CoreLoraError, match=r"loop\.fold: only corelora's own methods fold"):
            train(make_recipe(folder, method=method, loop={"fold": True}), tmp_path / "no")
    with pytest.raises(CoreLoraError, match="nothing to fold"):
        train(make_recipe(folder, method={"name": "lora", "r": 4}, loop={"fold": True}), tmp_path / "nothing")


def test_a_run_folder_has_everything(folder, tmp_path, monkeypatch):
    """Recipe, versions, metrics, curve, adapter and results; the recipe is the run's, defaults filled in."""
    monkeypatch.setattr("corelora.train.run.loss_curve", loss_curve)
    recipe = make_recipe(folder, loop={"save_every": 3})
    results = train(recipe, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    again, problems = read_tree(Recipe, yaml.safe_load((tmp_path / "recipe.yaml").read_text()))
    assert (again, problems) == (recipe, [])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "versions.json").read_text())["torch"] == torch.__version__
    assert not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.rglob(".*tmp"))
    assert results["steps"] == 6
    assert results["test_tokens"] == sum(len(row["answer"]) + 1 for row in sums(10, 100))
    assert results["rows"]["train"]["rows"] == 40
    for key in ("seconds", "tokens_per_second", "peak_memory", "recipe_fingerprint", "seed", "trained_parameters"):
        assert results[key] is not None, key
    rows = metrics(tmp_path)
    assert [r["step"] for r in rows] == [2, 4, 6, 6]
    assert all(set(r) >= {"step", "tokens", "seconds", "memory"} for r in rows)
    assert all(set(r) >= {"loss", "lr", "grad_norm"} for r in rows[:3])
    assert rows[3]["test_loss"] == results["test_loss"]


def test_a_task_from_outside_is_one_entry(outside, folder, tmp_path):
    """It needs nothing but its registration."""
    results = train(make_recipe(folder, task=outside), tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([[8, 9, 10]])
    assert not torch.equal(model(ids).logits, base(ids).logits)
    assert results["steps"] == 6


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_the_test_loss_is_a_mean_over_tokens(folder, tmp_path, batch):
    """Rows of different lengths, in batches of different sizes: the same figure as one sum over all tokens."""
    results = train(make_recipe(folder, loop={"test_batch_size": batch}), tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    total, count = 0.0, 0
    for row in run_of(make_recipe(folder), tmp_path / "again").rows["test"].dataset:
        labels = torch.tensor([row["labels"]])
        n = int((labels != -100).sum())
        total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss) * n
        count += n
    assert results["test_tokens"] == count
    assert results["test_loss"] == pytest.approx(total / count, abs=1e-5)


METHODS = [
    *({"name": n, "r": 4, "target_modules": "all-linear"} for n in ("lora", "slora", "nlora", "inttune", "nora")),
    *(
        {"name": n, "r": 4, "target_modules": "all-linear"}
        for n in ("peft:lora", "rslora", "dora", "peft:pissa", "vera")
    ),
    *({"name": n, "r": 4, "target_modules": ["q_proj", "v_proj"]} for n in ("lokr", "loha", "olora")),
    {"name": "adalora", "init_r": 4, "target_r": 2, "target_modules": ["q_proj"]},
    {"name": "boft", "boft_block_size": 4, "target_modules": ["q_proj"]},
    {"name": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    {"name": "prompt_tuning", "num_virtual_tokens": 4},
    {"name": "full"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["name"])
def test_every_method_learns(folder, tmp_path, method):
    """Twelve steps on one batch's worth of rows lower the training loss."""
    recipe = make_recipe(
        folder,
        method=method,
        data={"train": {"path": str(write_rows(tmp_path / "few.jsonl", sums(4)))}},
        loop={"steps": 12, "log_every": 1},
        optim={"lr": 0.05 if method["name"] != "full" else 0.01, "schedule": "constant", "warmup": 0},
    )
    results = train(recipe, tmp_path / "run")
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert min(losses[-3:]) < losses[0]
    assert 0 < results["trained_parameters"] <= results["parameters"]
    kind = AutoModelForCausalLM if method["name"] == "full" else AutoPeftModelForCausalLM
    weights = tmp_path / "run" / ("model" if method["name"] == "full" else "adapter")
    model = kind.from_pretrained(weights).eval()
    row = run_of(recipe, tmp_path / "again").rows["test"].dataset[0]
    assert torch.isfinite(model(input_ids=torch.tensor([row["input_ids"]])).logits).all()
    assert AutoTokenizer.from_pretrained(weights).eos_token == "</s>"


def test_the_same_recipe_gives_the_same_weights(folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(
            make_recipe(folder, method={"name": "slora", "r": 4, "target_modules": ["q_proj"]}, loop={"seed": seed}),
            tmp_path / name,
        )
    a, b, c = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_the_path_of_a_run_is_its_own(folder, tmp_path):
    """What `loop.fast` chose is put back when the run ends."""
    before = set_fast("auto")
    try:
        train(make_recipe(folder, loop={"steps": 1, "fast": "off"}), tmp_path)
        assert set_fast("auto") == "auto"
    finally:
        set_fast(before)


@pytest.mark.parametrize(("gpu", "inside"), [(True, "high"), (False, "highest")])
def test_products_of_a_run_are_its_own(gpu, inside, monkeypatch):
    """`loop.precision: tf32` is for a GPU's products, and for the time of the run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = torch.get_float32_matmul_precision()
    for precision, expected in (("tf32", inside), ("float32", before), ("auto", before)):
        with float32_products(precision):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == before


def test_tf32_is_refused_where_a_gpu_has_none(folder, monkeypatch):
    recipe = make_recipe(folder, loop={"precision": "tf32"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, found in (((7, 5), ["loop.precision: this GPU has no TF32; use float32."]), ((9, 0), [])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert precision_problems(recipe, None) == found


def test_accumulated_batches_are_one_large_batch(folder, tmp_path):
    """The loss is a mean over the tokens of the update, not of batch means."""
    for name, loop in (("one", {"batch_size": 8}), ("two", {"batch_size": 2, "accumulate": 4})):
        train(make_recipe(folder, loop={**loop, "steps": 3, "log_every": 1}, data={"shuffle": False}), tmp_path / name)
    one, two = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    assert [r["loss"] for r in metrics(tmp_path / "one")[:3]] == pytest.approx(
        [r["loss"] for r in metrics(tmp_path / "two")[:3]], abs=1e-5
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_train(folder, tmp_path, attention):
    """Fewer sequences, the same tokens, and a test loss that is not packed."""
    data = {"packing": True, "max_length": 128}
    recipe = make_recipe(folder, data=data, model={"attention": attention}, loop={"steps": 4, "batch_size": 2})
    results = train(recipe, tmp_path)
    counts = results["rows"]["train"]
    assert counts["sequences"] < counts["rows"] == 40
    assert results["rows"]["test"]["sequences"] == 10
    assert results["test_loss"] > 0


def test_packing_that_leaks_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("corelora.train.instruct.border_problem", lambda *args: "data.packing: rows see each other")
    with pytest.raises(CoreLoraError, match="rows see each other"):
        train(make_recipe(folder, data={"packing": True}), tmp_path)


def test_tests_along_the_way(folder, tmp_path):
    train(make_recipe(folder, loop={"test_every": 2, "log_every": 3}), tmp_path)
    rows = metrics(tmp_path)
    assert [r["step"] for r in rows if "test_loss" in r] == [2, 4, 6, 6]
    assert [r["step"] for r in rows if "loss" in r] == [3, 6]


@pytest.mark.parametrize(
    ("epochs", "accumulate", "steps"), [(1, 1, 10), (2, 1, 20), (0.5, 1, 5), (1, 3, 4), (1, 7, 2), (3, 4, 9)]
)
def test_the_number_of_steps_is_known_before(folder, tmp_path, epochs, accumulate, steps):
    """AdaLoRA and the plan need it before Trainer says it."""
    recipe = make_recipe(folder, loop={"steps": None, "epochs": epochs, "accumulate": accumulate})
    run = run_of(recipe, tmp_path)
    assert run.steps == steps
    trainer = trainer_of(recipe, tmp_path)
    trainer.train()
    assert trainer.state.max_steps == steps


def test_types(folder, tmp_path):
    """Weights in bfloat16 with factors in float32; float32 weights under autocast."""
    model = build_model(run_of(make_recipe(folder, model={"dtype": "bfloat16"}), tmp_path))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trainer = trainer_of(make_recipe(folder, loop={"precision": "bfloat16"}), tmp_path)
    assert trainer.args.bf16
    assert not trainer_of(make_recipe(folder, model={"dtype": "bfloat16"}), tmp_path).args.bf16
    both = make_recipe(folder, model={"dtype": "bfloat16"}, loop={"precision": "bfloat16"})
    assert not trainer_of(both, tmp_path).args.bf16
    assert train(both, tmp_path / "run")["test_loss"] > 0


def test_checkpointing_changes_nothing_but_memory(folder, tmp_path):
    for name, checkpointing in (("with", True), ("without", False)):
        train(make_recipe(folder, loop={"checkpointing": checkpointing}), tmp_path / name)
    a, b = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("with", "without"))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
