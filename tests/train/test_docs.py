"""docs/training.md says what is so: its recipe is one, its methods and files exist."""

import re
from pathlib import Path

import yaml

from corelora.recipe import Recipe, read_tree
from corelora.train.methods import method_names, problems
from corelora.train.plots import loss_curve
from corelora.train.run import train
from train.helpers import make_recipe

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()


def rows_of(header):
    """First cells of the table under a header line."""
    table = PAGE.split(header)[1].split("\n\n")[0]
    return [line.split("|")[1] for line in table.splitlines()[2:] if line.startswith("|")]


def test_its_recipe_is_one():
    [block] = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    recipe, found = read_tree(Recipe, yaml.safe_load(block))
    assert found == []
    assert problems(recipe.method) == []


def test_its_methods_exist():
    named = re.findall(r"`([a-z_:]+)`", " ".join(rows_of("| `method.name` | what |")))
    assert len(named) > 12
    assert set(named) <= set(method_names())


def test_its_files_are_those_of_a_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("corelora.train.run.loss_curve", loss_curve)
    train(make_recipe(folder, loop={"report_to": ["tensorboard"]}), tmp_path)
    named = set(re.findall(r"`([^`]+)`", " ".join(rows_of("| file | what |"))))
    made = {p.name + ("/" if p.is_dir() else "") for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert made == named - {"model/"}
