"""Everything is checked before a weight is read: all mistakes at once, nothing loaded, nothing written."""

import shutil

import pytest

from corelora.errors import CoreLoraError
from corelora.train import dry_run
from corelora.train.dry_run import check, plan
from corelora.train.run import train
from train.helpers import make_recipe, run_of, save_bert, write_rows


@pytest.fixture
def weightless(folder, tmp_path):
    """The same folder with a model whose weights are gone."""
    copied = tmp_path / "weightless"
    shutil.copytree(folder, copied)
    (copied / "model" / "model.safetensors").unlink()
    return copied


@pytest.mark.parametrize("name", ["nlora", "nora", "inttune", "peft:lora", "peft:pissa", "dora", "vera", "full"])
def test_a_good_recipe_needs_no_weights(weightless, tmp_path, name):
    method = {"name": name} | ({} if name == "full" else {"r": 4, "target_modules": ["q_proj"]})
    text = plan(make_recipe(weightless, method=method), tmp_path / "out")
    assert f"method    {name}" in text
    assert "memory    about 0.0" in text
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_simulated_is_said_so(weightless, tmp_path):
    """LoHa's code looks at values; the rest of the plan stands."""
    text = plan(make_recipe(weightless, method={"name": "loha", "r": 4, "target_modules": ["q_proj"]}), tmp_path)
    assert "memory    memory can't be estimated" in text


def test_trained_parameters_are_those_of_the_run(folder, tmp_path):
    for name in ("nlora", "nora", "dora", "full"):
        method = {"name": name} | ({} if name == "full" else {"r": 4, "target_modules": "all-linear"})
        recipe = make_recipe(folder, method=method, loop={"steps": 1})
        facts = check(recipe, tmp_path / name)
        results = train(recipe, tmp_path / name)
        assert facts.trained == results["trained_parameters"]
        assert facts.parameters == results["parameters"]


def test_all_mistakes_at_once(folder, tmp_path):
    recipe = make_recipe(
        folder,
        method={"name": "nlra", "r": 4},
        data={"form": "gsm9k", "train": {"path": str(folder / "trian.jsonl")}},
        optim={"name": "adamv", "schedule": "cosin"},
        model={"name": str(folder / "modle")},
        loop={"precision": "float16"},
    )
    with pytest.raises(CoreLoraError) as caught:
        check(recipe, tmp_path / "out")
    message = str(caught.value)
    for words in ("'nlora'", "'gsm8k'", "train.jsonl", "'adamw'", "'cosine'", "model.name: no model", "float16 needs"):
        assert words in message, words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"method": {"name": "nlora", "target_modules": ["q_prj"]}}, "q_prj"),
        ({"method": {"name": "peft:lora", "target_modules": ["q_prj"]}}, "q_prj"),
        ({"method": {"name": "dora", "target_modules": ["q_proj", "v_prj"]}}, "Did you mean 'v_proj'"),
        ({"method": {"name": "nlora", "target_modules": ["q_proj", "v_prj"]}}, "v_prj"),
        ({"method": {"name": "nlora", "r": 40, "target_modules": "all-linear"}}, "r = 40 exceeds"),
        ({"method": {"name": "inttune", "target_modules": "all-linear"}, "optim": {"rates": {"A": 2}}}, "Trained here"),
        ({"optim": {"rates": {"head": 2}}}, "optim.rates.head: no parameter"),
        ({"task": "instrct"}, "Did you mean 'instruct'"),
        ({"task": "classify"}, "data.form"),
        ({"model": {"name": "package:smolm2"}}, "Did you mean 'smollm2'"),
        ({"model": {"start_from": "nowhere"}}, "no folder nowhere"),
        ({"model": {"dtype": "bfloat16"}, "loop": {"precision": "float32"}}, "set model.dtype"),
        ({"model": {"dtype": "bfloat16"}, "loop": {"precision": "tf32"}}, "tf32 with weights in bfloat16"),
        ({"method": {"name": "full"}, "model": {"quantize": "4bit"}}, "quantised weights can't be trained"),
        ({"optim": {"name": "galore_adamw"}}, "optim.name: galore_adamw can't be had here"),
        ({"optim": {"schedule": "cosine_with_min_lr"}}, "optim.schedule: cosine_with_min_lr wants settings"),
        ({"optim": {"schedule": "warmup_stable_decay"}}, "optim.schedule: warmup_stable_decay wants settings"),
        ({"optim": {"schedule": "reduce_lr_on_plateau"}}, "give data.test and loop.test_every"),
        ({"loop": {"test_every": 2}, "data": {"test": None}}, "loop.test_every: there are no test rows"),
        ({"model": {"attention": "flash"}}, 'model.attention: Specified `attn_implementation="flash"`'),
        ({"data": {"columns": {"question": "qestion"}, "test": None}}, "qestion"),
        ({"method": {"name": "frod", "target_modules": "all-linear"}}, "PEFT's frod decomposes the weights"),
        ({"method": {"name": "adamss", "target_modules": "all-linear"}}, "PEFT's adamss decomposes the weights"),
        ({"method": {"name": "prompt_tuning"}}, "method.num_virtual_tokens is missing"),
        ({"method": {"name": "prefix_tuning"}}, "method.num_virtual_tokens is missing"),
        ({"optim": {"warmup": 50}}, "optim.warmup: 50 steps of warm-up in a run of 6"),
    ],
)
def test_single_mistakes(folder, tmp_path, parts, words):
    with pytest.raises(CoreLoraError) as caught:
        check(make_recipe(folder, **parts), tmp_path / "out")
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)


def test_a_warm_up_longer_than_the_rows_last(folder, tmp_path):
    """Known once the rows are counted: 40 rows in batches of 4 are ten steps."""
    with pytest.raises(CoreLoraError, match="11 steps of warm-up in a run of 10; give fewer"):
        run_of(make_recipe(folder, optim={"warmup": 11}, loop={"steps": None, "epochs": 1}), tmp_path / "out")
    run_of(make_recipe(folder, optim={"warmup": 10}, loop={"steps": None, "epochs": 1}), tmp_path / "out")


def test_pictures_have_no_lengths(folder, tmp_path):
    with pytest.raises(CoreLoraError, match="rows of the task image_classification are pictures"):
        check(make_recipe(folder, task="image_classification", data={"group_by_length": True}), tmp_path / "out")


def test_a_folder_with_a_run(folder, tmp_path):
    recipe = make_recipe(folder, loop={"steps": 2})
    assert "folder    " not in plan(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run")
    assert "holds a finished run: nothing would be done" in plan(recipe, tmp_path / "run")
    with pytest.raises(CoreLoraError, match="holds a run of another recipe"):
        plan(make_recipe(folder, loop={"steps": 3}), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert "holds a run that would go on after" in plan(recipe, tmp_path / "run")


def test_a_prompt_that_the_tokenizer_cannot_write(weightless, tmp_path):
    for template in (weightless / "model").glob("chat_template*"):
        template.unlink()
    with pytest.raises(CoreLoraError, match="this model has no chat template"):
        check(make_recipe(weightless, data={"prompt": "chat"}), tmp_path / "out")


def test_a_folder_that_cannot_be(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CoreLoraError, match="is a file, so"):
        check(make_recipe(folder), tmp_path / "file" / "run")


def test_a_disk_without_room(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CoreLoraError, match=r"are free at .*lower loop.keep"):
        check(make_recipe(folder), tmp_path / "run")


def test_what_does_not_fit_is_said_with_what_would(folder, tmp_path, monkeypatch):
    recipe = make_recipe(folder, loop={"batch_size": 64})
    monkeypatch.setattr(dry_run, "room", lambda device: 12_000_000)
    text = plan(recipe, tmp_path / "run")
    assert "it won't fit" in text
    assert "--set loop.batch_size=" in text


def test_classify_knows_its_head(tmp_path):
    """The head counts as trained, and has a rate of its own."""
    save_bert(tmp_path / "model")
    rows = [{"sentence": f"good {n}", "label": n % 2} for n in range(8)]
    path = str(write_rows(tmp_path / "train.jsonl", rows))
    data = {"train": {"path": path}, "test": None, "form": "sst2"}
    method = {"name": "nlora", "r": 4, "target_modules": ["query", "value"]}
    recipe = make_recipe(tmp_path, task="classify", data=data, method=method, optim={"rates": {"head": 10, "core": 2}})
    facts = check(recipe, tmp_path / "run")
    assert facts.config.num_labels == 2
    factors = 2 * 2 * (2 * 32 * 4 + 4 * 4)
    assert facts.trained == factors + 32 * 2 + 2
