"""From a study's file to runs: grids, names, mistakes."""

from __future__ import annotations

import json

import pytest

from compare.helpers import opened, write_study
from corelora.compare.expand import final_run, nested
from corelora.compare.folder import read_study
from corelora.compare.session import start_study
from corelora.compare.study import load_study
from corelora.errors import CoreLoraError

RATES = {"name": "rates", "axes": {"method": ["lora", "nlora"], "rank": [2, 4], "lr": [1e-4, 1e-3]}, "tune": ["lr"]}


def test_a_grid_with_short_names(folder, tmp_path):
    """Every point of the grid, each seed; values land in the recipe where their short names say."""
    study = opened(tmp_path, folder, [{**RATES, "seeds": [0, 5], "set": {"loop.steps": 9}}])
    runs = study.first["rates"]
    assert len(runs) == 2 * 2 * 2 * 2 == len({r.name for r in runs})
    run = next(r for r in runs if r.labels == {"method": "nlora", "rank": "4", "lr": "0.001"} and r.seed == 5)
    assert run.recipe.method == {"name": "nlora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    assert (run.recipe.optim.lr, run.recipe.loop.seed, run.recipe.loop.steps) == (1e-3, 5, 9)
    assert run.name.startswith("gsm8k-nlora-r4-lr0.001-s5-")
    assert final_run(run, 0, {}).name in {r.name for r in runs}


def test_values_with_names_of_their_own(folder, tmp_path):
    """A named value sets several keys, a recipe file too; nested and dotted keys mean the same."""
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "other.yaml").write_text("base: base.yaml\nloop: {steps: 3}\n")
    axes = {
        "method": {
            "LoRA+": {"method.name": "lora", "optim.name": "lora_plus"},
            "small": {"method": {"name": "nora", "inner_r": 1}},
        },
        "task": {"other": {"recipe": "other.yaml"}, "own": {}},
    }
    study = opened(tmp_path, folder, [{"name": "named", "axes": axes, "set": {"method.r": 4}}])
    by_labels = {tuple(r.labels.values()): r.recipe for r in study.first["named"]}
    assert by_labels["LoRA+", "own"].optim.name == "lora_plus"
    assert by_labels["LoRA+", "other"].loop.steps == 3
    assert by_labels["small", "own"].method == {"name": "nora", "inner_r": 1, "r": 4}


def test_a_whole_method_takes_the_place_of_the_recipes(folder, tmp_path):
    """Fields of another method don't carry over; a name alone leaves them, and so does what the study sets."""
    axes = {
        "setting": {"full": {"method": {"name": "full"}}, "own": {"method": {"r": 8}}, "name": {"method.name": "slora"}}
    }
    path = write_study(tmp_path / "file", folder, [{"name": "a", "axes": axes}])
    recipe = (tmp_path / "file" / "base.yaml").read_text().replace("method:", "method:\n  name: nlora\n  r: 4")
    (tmp_path / "file" / "base.yaml").write_text(recipe)
    runs = {r.labels["setting"]: r.recipe.method for r in start_study(path, tmp_path / "study").first["a"]}
    assert runs["full"] == {"name": "full"}
    assert (runs["own"]["name"], runs["own"]["r"]) == ("nlora", 8)
    assert (runs["name"]["name"], runs["name"]["r"]) == ("slora", 4)


def test_one_run_that_two_groups_ask_for(folder, tmp_path):
    """It has one name, so it is made once."""
    one = {"name": "one", "axes": {"method": ["lora"]}, "set": {"method.r": 4}}
    two = {
        "name": "two",
        "axes": {
            "method": ["lora"],
        },
        "set": {"rank": 4},
    }
    study = opened(tmp_path, folder, [one, two])
    assert study.first["one"][0].name == study.first["two"][0].name


def test_all_mistakes_of_the_file_at_once(folder, tmp_path):
    """Unknown keys with the nearest, axes without values, tuned axes that are none, seeds twice, names twice."""
    groups = [
        {"name": "a", "axes": {"method": []}, "tune": ["lr"], "seeds": [0, 1], "finalists": {"seeds": [1, 2]}},
        {"name": "a", "axes": {"method": ["lora"]}, "finalist": {}, "best": "low"},
    ]
    with pytest.raises(CoreLoraError) as caught:
        load_study(write_study(tmp_path, folder, groups))
    text = str(caught.value)
    assert "unknown key 'groups[1].finalist'. Did you mean 'finalists'?" in text
    assert "groups[1].best: unknown value 'low'. Did you mean 'lowest'?" in text
    assert "groups[0].axes.method: a list of values" in text
    assert "groups[0].tune: 'lr' is no axis" in text
    assert "groups[0].finalists.seeds: [1] are seeds of every run already" in text
    with pytest.raises(CoreLoraError, match="two are called 'a'"):
        load_study(write_study(tmp_path, folder, [{"name": "a", "axes": {"method": ["lora"]}}] * 2))


def test_what_would_only_fail_after_all_runs_is_said_first(folder, tmp_path):
    """Seeds, finalists, their suites and rows, a paper's figures: before anything is run, all at once."""
    axes = {"axes": {"method": ["lora", "nlora"], "alpha": [1.0, 2.5]}, "set": {"rank": 4}}
    wrong = {"seeds": [1, 1], "top": 0}
    with pytest.raises(CoreLoraError) as caught:
        load_study(write_study(tmp_path, folder, [{"name": "a", **axes, "finalists": wrong}]))
    assert "groups[0].finalists.seeds: 1 is given twice" in str(caught.value)
    assert "groups[0].finalists.top: at least 1 is expected, got 0" in str(caught.value)
    always = [{"method": "nlroa"}, {"alpha": 1.0}, {"alpha": 2}]
    groups = [{"name": "a", **axes, "seeds": [], "finalists": {"always": always}}]
    groups += [{"name": "b", **axes, "seeds": [3, 3]}]
    with pytest.raises(CoreLoraError) as caught:
        load_study(write_study(tmp_path, folder, groups))
    text = str(caught.value)
    assert "groups[0].seeds: none is given" in text
    assert "groups[1].seeds: 3 is given twice" in text
    assert "groups[0].finalists.always: unknown value of method 'nlroa'. Did you mean 'nlora'?" in text
    assert "unknown value of alpha '2'" in text
    assert "unknown value of alpha '1'" not in text
    (tmp_path / "paper.json").write_text(json.dumps({"columns": ["gsm8k"], "rows": [{"model": "M", "values": {}}]}))
    final = {"suites": ["gsm9k", "math"], "protocol": "papr", "data": ["no-folder"]}
    published = {"file": "paper.json", "where": {"modle": "M"}, "columns": {"gsm9k": "test_loss"}}
    groups = [
        {"name": "a", **axes, "finalists": final, "published": published},
        {"name": "b", "axes": {"x": {"one": {"recipe": "gone.yaml"}}}, "published": {**published, "file": "no.json"}},
        {"name": "c", **axes, "finalists": {"suites": ["math"], "data": ["no-folder"]}},
    ]
    with pytest.raises(CoreLoraError) as caught:
        load_study(write_study(tmp_path, folder, groups), data=["mat=x.jsonl"])
    for text in (
        "gone.yaml is no file beside tiny.yaml",
        "--data mat=...: unknown task 'mat'. Did you mean 'math'?",
        "a: finalists: unknown suite 'gsm9k'. Did you mean 'gsm8k'?",
        "a: finalists: suite math: unknown protocol 'papr'",
        "a: published: unknown column 'gsm9k'. Did you mean 'gsm8k'?",
        "a: published: where: unknown label 'modle'. Did you mean 'model'?",
        "b: published: no.json can't be read",
        "--data no-folder: no such folder",
    ):
        assert text in str(caught.value)


def test_local_rows_go_where_their_task_is(folder, tmp_path):
    """A task of one group's suites is no mistake in the other's."""
    axes = {"axes": {"method": ["lora"]}, "set": {"rank": 4}}
    groups = [{"name": name, **axes, "finalists": {"suites": [name]}} for name in ("gsm8k", "math")]
    study = load_study(write_study(tmp_path, folder, groups), data=["math=rows.jsonl", str(tmp_path)])
    assert [g.finalists.data for g in study.groups] == [[str(tmp_path)], ["math=rows.jsonl", str(tmp_path)]]


def test_recipes_that_cannot_be_built(folder, tmp_path):
    """All of them, with the values that make them; a recipe that is no file."""
    with pytest.raises(CoreLoraError) as caught:
        opened(
            tmp_path, folder, [{"name": "a", "axes": {"method": ["lora"], "optim.lrr": [1], "loop.steps": [0, "x"]}}]
        )
    text = str(caught.value)
    assert "unknown key 'optim.lrr'. Did you mean 'lr'?" in text
    assert "loop.steps: a whole number is expected, got 'x'" in text
    with pytest.raises(CoreLoraError, match=r"gone\.yaml is no file beside tiny\.yaml"):
        load_study(write_study(tmp_path, folder, [{"name": "a", "recipe": "gone.yaml", "axes": {"lr": [1]}}]))
    with pytest.raises(CoreLoraError, match="lr holds a value, not keys"):
        nested({"optim.lr": 1, "optim.lr.x": 2})


def test_a_folder_with_something_else(folder, tmp_path):
    """Nothing is mixed with it."""
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").write_text("mine")
    with pytest.raises(CoreLoraError, match="is not empty and holds no study"):
        opened(tmp_path, folder, [{"name": "a", "axes": {"method": ["lora"]}}])


def test_a_folder_of_another_study(folder, tmp_path):
    """Two files of one name share no folder; the same file, changed, goes on, and so does one that was moved."""
    group = {"name": "a", "axes": {"method": ["lora"]}, "set": {"rank": 4}}
    one, two = (write_study(tmp_path / name, folder, [group]) for name in ("one", "two"))
    root = tmp_path / "study"
    start_study(one, root, ["loop.steps=3"]).save()
    with pytest.raises(CoreLoraError, match=r"holds the study of another file, .*one/tiny\.yaml"):
        start_study(two, root)
    write_study(tmp_path / "one", folder, [{**group, "name": "b"}])
    assert list(start_study(one, root).first) == ["b"]
    assert read_study(root).command == f"corelora compare {one} --set=loop.steps=3 --output {root}"
    one.unlink()
    start_study(two, root).save()
    assert str(two) in read_study(root).command


def test_a_name_depends_on_what_is_said_alone(folder, tmp_path):
    """A default that is written out, or a key that a later version adds at its default, leaves a run its folder."""
    first, again, folded = (
        {r.name for r in opened(tmp_path / str(n), folder, [{**RATES, "set": keys}]).first["rates"]}
        for n, keys in enumerate(({}, {"loop.fold": False, "optim.schedule": "cosine"}, {"loop.fold": True}))
    )
    assert first == again
    assert not folded & first
