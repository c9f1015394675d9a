"""From YAML to a recipe: bases, overrides, types, and every mistake at once with the nearest right name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from corelora.errors import CoreLoraError
from corelora.recipe import Recipe, load_recipe, read_tree
from corelora.recipe.tree import as_data, merged, read_yaml, setting

WHOLE = """
task: instruct
model: {name: some/model}
data: {train: {path: rows.jsonl}, form: gsm8k}
method: {name: nlora, r: 8}
optim: {lr: 2e-4}
"""


def file(folder: Path, text: str, name: str = "run.yaml") -> Path:
    """A YAML file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(text: str) -> list[str]:
    """What is wrong with a recipe's text."""
    return read_tree(Recipe, yaml.safe_load(text))[1]


def test_defaults_are_filled_in(tmp_path):
    recipe = load_recipe(Recipe, file(tmp_path, WHOLE))
    assert (recipe.optim.lr, recipe.optim.schedule, recipe.loop.batch_size) == (2e-4, "cosine", 4)
    assert recipe.data.train.split == "train"
    assert recipe.data.test is recipe.images is recipe.subject is None


def test_what_a_run_folder_keeps_reads_back(tmp_path):
    """The resolved recipe is a recipe, and the same one."""
    recipe = load_recipe(Recipe, file(tmp_path, WHOLE))
    again = file(tmp_path, yaml.safe_dump(as_data(recipe)), "again.yaml")
    assert load_recipe(Recipe, again) == recipe


def test_a_base_below(tmp_path):
    """Mappings are joined key by key, lists and values replaced; bases have bases, found beside their file."""
    file(tmp_path, WHOLE, "shared/lowest.yaml")
    file(tmp_path, "base: lowest.yaml\nmethod: {r: 16, target_modules: [q_proj, k_proj]}\n", "shared/base.yaml")
    path = file(tmp_path, "base: shared/base.yaml\nmethod: {target_modules: [v_proj]}\noptim: {schedule: linear}\n")
    recipe = load_recipe(Recipe, path)
    assert recipe.method == {"name": "nlora", "r": 16, "target_modules": ["v_proj"]}
    assert (recipe.optim.lr, recipe.optim.schedule) == (2e-4, "linear")


def test_a_base_that_leads_back(tmp_path):
    file(tmp_path, "base: b.yaml\n", "a.yaml")
    with pytest.raises(CoreLoraError, match="`base` leads back to this file"):
        read_yaml(file(tmp_path, "base: a.yaml\n", "b.yaml"))


def test_values_put_over_the_file(tmp_path):
    """Read as YAML: numbers, lists, mappings, nothing; paths that are not there yet are made."""
    path = file(tmp_path, WHOLE)
    words = ["optim.lr=1e-3", "method.target_modules=[q_proj]", "data.test.path=x.jsonl", "loop={steps: 3}", "output="]
    recipe = load_recipe(Recipe, path, words)
    assert (recipe.optim.lr, recipe.method["target_modules"], recipe.loop.steps) == (1e-3, ["q_proj"], 3)
    assert (recipe.data.test.path, recipe.output) == ("x.jsonl", None)


def test_on_and_off_are_words_where_they_are_choices(tmp_path):
    """YAML 1.1 reads them bare as truth values."""
    path = file(tmp_path, WHOLE + "loop: {fast: off, compile: on}\n")
    recipe = load_recipe(Recipe, path, ["loop.graphs=off"])
    assert (recipe.loop.fast, recipe.loop.graphs, recipe.loop.compile) == ("off", "off", True)
    assert load_recipe(Recipe, path, ["loop.fast=on"]).loop.fast == "on"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("optim.lr.x=3", "lr holds a value, not keys"),
        ("method=[1", "is not a YAML value"),
        ("optim.rl=3", "unknown key 'optim.rl'. Did you mean 'lr'?"),
    ],
)
def test_values_that_cannot_be_put_there(tmp_path, word, message):
    with pytest.raises(CoreLoraError) as caught:
        load_recipe(Recipe, file(tmp_path, WHOLE), [word])
    assert message in str(caught.value)


def test_every_mistake_at_once(tmp_path):
    """Misspelt keys at any depth with the nearest, wrong types, unknown choices, what is missing."""
    text = """
    task: instruct
    modle: {name: x}
    data: {train: {path: a, spilt: b}, form: gsm8k, promt: chat, max_length: long, packing: 1}
    method: {name: nlora}
    optim: {lr: fast, betas: [0.9, x], rates: 3}
    loop: {batch_size: 2.5, fast: maybe}
    """
    found = "\n".join(problems(text))
    for message in (
        "unknown key 'modle'. Did you mean 'model'?",
        "model is missing",
        "unknown key 'data.promt'. Did you mean 'prompt'?",
        "unknown key 'data.train.spilt'. Did you mean 'split'?",
        "data.max_length: a whole number is expected, got 'long'",
        "data.packing: true or false is expected, got 1",
        "optim.lr: a number is expected, got 'fast'",
        "optim.betas[1]: a number is expected, got 'x'",
        "optim.rates: keys are expected below it, got 3",
        "loop.batch_size: a whole number is expected, got 2.5",
        "loop.fast: unknown value 'maybe'",
    ):
        assert message in found


def test_a_key_given_twice_is_named_with_its_lines(tmp_path):
    """PyYAML by itself keeps the last one, and the settings of the first are lost."""
    with pytest.raises(CoreLoraError, match="key 'optim' is given twice, in lines 6 and 7"):
        read_yaml(file(tmp_path, WHOLE + "optim: {name: sgd}\n"))


@pytest.mark.parametrize("value", [".inf", ".nan", "inf"])
def test_a_number_is_finite(value):
    found = problems(WHOLE.replace("lr: 2e-4", f"lr: {value}"))
    assert found == [f"optim.lr: a number is expected, got {yaml.safe_load(value)!r}"]


def test_numbers_out_of_range():
    """A part's own checks, each with its path."""
    optim = "optim: {lr: -1, eps: 0, rates: {C: 1, A: 0}}"
    text = WHOLE.replace("optim: {lr: 2e-4}", f"{optim}\nloop: {{steps: 0, seed: -1, report_to: [x]}}\n")
    text += "stats: {batches: 0}\n"
    found = "\n".join(problems(text))
    for message in (
        "optim.lr must be above 0, got -1.0",
        "optim.rates.C: no such group. Known: A, core, core_a, core_b, B, head.",
        "optim.rates.A must be above 0",
        "loop.steps must be at least 1, got 0",
        "loop.report_to: unknown 'x'",
        "optim.eps must be above 0",
        "loop.seed must be between 0 and 2^32 - 1, got -1",
        "stats.batches must be at least 1, got 0",
    ):
        assert message in found


def test_files_that_are_no_recipes(tmp_path):
    """Missing (with the nearest beside it), broken (with the line), no mapping, a folder."""
    file(tmp_path, WHOLE, "quick.yaml")
    for path, message in (
        (tmp_path / "quik.yaml", "no such file. Did you mean quick.yaml?"),
        (file(tmp_path, "a: [1\nb: 2\n", "broken.yaml"), "line 2"),
        (file(tmp_path, "- a\n", "list.yaml"), "a mapping of keys is expected, found list"),
        (tmp_path, "not a YAML file"),
    ):
        with pytest.raises(CoreLoraError) as caught:
            load_recipe(Recipe, path)
        assert message in str(caught.value)


def test_numbers_as_yaml_1_2_has_them(tmp_path):
    """2e-4 is a number under keys of any type, as in a method's own fields; words and versions stay texts."""
    text = "a: 2e-4\nb: [1E3, -5e+2, 1.5e-3]\nc: {d: 1e5}\nname: e5\nother: 1e5x\n"
    data = read_yaml(file(tmp_path, text))
    assert data == {"a": 2e-4, "b": [1e3, -5e2, 1.5e-3], "c": {"d": 1e5}, "name": "e5", "other": "1e5x"}


@dataclass(kw_only=True)
class Inner:
    """A part."""

    n: int = setting("A number.")


@dataclass(kw_only=True)
class Outer:
    """Every kind of field that the reader knows."""

    parts: list[Inner] = setting("Parts in a list.", list)
    named: dict[str, Inner] = setting("Parts by name.", dict)
    either: int | str | None = setting("A number or a text.", None)
    anything: Any = setting("Whatever.", None)
    inner: Inner | None = setting("A part, or none.", None)
    own: list[str] = field(default_factory=lambda: ["x"], metadata={"help": "A list with a default."})


def test_parts_in_lists_and_mappings():
    """Paths lead into lists and names; a whole number written as 3.0 is one; None only where it may be."""
    data = {"parts": [{"n": 3.0}], "named": {"a": {"n": "4"}}, "either": "5", "anything": {"x": [1]}, "inner": {"n": 1}}
    built, found = read_tree(Outer, data)
    assert found == []
    assert (built.parts[0].n, built.named["a"].n, built.either, built.anything) == (3, 4, "5", {"x": [1]})
    wrong = {"parts": [{"n": 1}, {"m": 1}], "named": {"a": 3}, "either": [1], "own": None}
    text = "\n".join(read_tree(Outer, wrong)[1])
    assert "unknown key 'parts[1].m'" in text
    assert "parts[1].n is missing" in text
    assert "named.a: keys are expected below it, got 3" in text
    assert "either: a whole number or a text is expected, got [1]" in text
    assert "own" in text


def test_merging_leaves_its_parts_alone():
    below, above = {"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]}
    assert merged(below, above) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert (below, above) == ({"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]})


def test_a_base_that_is_missing_is_said_with_the_file_that_names_it(tmp_path):
    (tmp_path / "quick.yaml").write_text("base: qick-base.yaml\n")
    (tmp_path / "quick-base.yaml").write_text("a: 1\n")
    with pytest.raises(CoreLoraError) as caught:
        read_yaml(tmp_path / "quick.yaml")
    assert "quick.yaml: base: " in str(caught.value)
    assert str(caught.value).endswith("qick-base.yaml: no such file. Did you mean quick-base.yaml?")
