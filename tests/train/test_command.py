"""`corelora train` as a user types it."""

import json

import pytest
import yaml

from corelora.cli import main
from corelora.recipe.tree import as_data
from corelora.train import run as run_module
from corelora.train.progress import MetricsFile
from train.helpers import make_recipe


@pytest.fixture
def recipe_file(folder, tmp_path):
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump(as_data(make_recipe(folder))))
    return path


def test_a_recipe_is_trained(recipe_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", str(recipe_file), "--output", str(out), "--set", "loop.steps=2", "--set", "method.r=2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 steps, training loss")
    assert f"corelora evaluate {out}" in said
    assert yaml.safe_load((out / "recipe.yaml").read_text())["method"]["r"] == 2


def test_json(recipe_file, tmp_path, capsys):
    assert main(["train", str(recipe_file), "--output", str(tmp_path / "run"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())


def test_standard_output_has_results_only(recipe_file, tmp_path, capsys, monkeypatch):
    """What a library prints while it trains goes where the bars are."""
    made = run_module.train

    def chatty(*args):
        print("a library speaks")
        return made(*args)

    monkeypatch.setattr(run_module, "train", chatty)
    assert main(["train", str(recipe_file), "--output", str(tmp_path / "run"), "--set", "loop.steps=1", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["steps"] == 1
    assert "a library speaks" in said.err


def test_a_dry_run_writes_nothing(recipe_file, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--set", "data.train.split=train[:50%]", "--output", str(out)]
    assert main(["train", str(recipe_file), *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    words = f"corelora train {recipe_file} '--set=data.train.split=train[:50%]' --output {out}"
    assert f"Nothing is wrong. Next: {words}\n" in said
    assert "method    nlora" in said
    assert yaml.safe_load(said.split("\nmodel     ")[0])["loop"]["steps"] == 6
    assert not out.exists()


def test_the_folder_has_the_recipes_name(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe_file), "--set", "loop.steps=1"]) == 0
    assert (tmp_path / "runs" / "sums" / "results.json").is_file()


def test_a_user_who_stops_a_run_is_told_what_is_kept(recipe_file, tmp_path, capsys, monkeypatch):
    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsFile, "on_step_end", stop)
    words = ["train", str(recipe_file), "--output", str(tmp_path / "run")]
    assert main(words) == 130
    assert "no checkpoint was written yet" in capsys.readouterr().err
    assert main([*words, "--set", "loop.save_every=2"]) == 130
    assert (
        f"the same command goes on after {tmp_path / 'run' / 'checkpoints' / 'checkpoint-2'}" in capsys.readouterr().err
    )


def test_mistakes_in_the_file_and_behind_it_are_told_at_once(recipe_file, tmp_path, capsys):
    words = ["optim.lrr=1", "loop.steps=x", "method.name=nlra", "data.train.path=nowhere.jsonl", "model.dtype=fp16"]
    assert main(["train", str(recipe_file), "--output", str(tmp_path / "run"), *(f"--set={w}" for w in words)]) == 2
    said = capsys.readouterr().err
    assert "sums.yaml: 5 problems" in said
    for word in ("Did you mean 'lr'", "loop.steps: a whole", "Did you mean 'nlora'", "nowhere.jsonl", "'float16'"):
        assert word in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "optim.lrr=1"], "Did you mean 'lr'"),
        (["--set", "method.name=nlra"], "Did you mean 'nlora'"),
        (["--set", "loop.steps=0"], "steps must be at least 1"),
    ],
)
def test_mistakes_end_with_2(recipe_file, tmp_path, capsys, words, said):
    assert main(["train", str(recipe_file), "--output", str(tmp_path / "run"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_missing_package_says_how_to_install(recipe_file, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "corelora.train.run", None)
    assert main(["train", str(recipe_file)]) == 2
    assert "pip install corelora[train]" in capsys.readouterr().err
