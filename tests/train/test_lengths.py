"""Rows of like length in one batch."""

import itertools
import random

import datasets
import pytest
import torch

from corelora.recipe import Recipe, read_tree
from corelora.train.lengths import WINDOW, LengthSampler, row_lengths
from corelora.train.run import train
from train.helpers import make_recipe, trainer_of, write_rows


@pytest.fixture
def lengths():
    return [random.Random(n).randint(1, 500) for n in range(1003)]


def test_every_row_once_an_epoch_in_another_order(lengths):
    sampler = LengthSampler(lengths, 8, seed=1)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(1003))
    assert first == again != second
    assert list(LengthSampler(lengths, 8, seed=2)) != first


def test_the_order_is_the_seeds_alone(lengths):
    """A run that goes on has drawn other numbers before."""
    torch.manual_seed(5)
    first = list(LengthSampler(lengths, 8, seed=1))
    torch.manual_seed(6)
    assert list(LengthSampler(lengths, 8, seed=1)) == first


def test_steps_have_little_padding_and_come_in_no_order_of_length(lengths):
    order = list(LengthSampler(lengths, 8, seed=0))
    steps = [[lengths[row] for row in order[start : start + 8]] for start in range(0, 1000, 8)]
    padding = sum(8 * max(step) - sum(step) for step in steps)
    assert padding < 0.1 * sum(lengths)
    assert max(steps[0]) == max(lengths)
    longer = sum(max(a) > max(b) for a, b in itertools.pairwise(steps))
    assert 0.35 < longer / len(steps) < 0.65, "neither sorted up nor down"
    assert WINDOW * 8 < 1000, "more windows than one"


@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_few_rows(count):
    assert sorted(LengthSampler([3] * count, 8, seed=0)) == list(range(count))


def test_lengths_of_shuffled_rows(monkeypatch):
    monkeypatch.setattr("corelora.train.lengths.READ", 8)
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in range(1, 30)]}).shuffle(seed=3)
    assert row_lengths(rows) == [len(row["input_ids"]) for row in rows]


def test_a_run_trains_on_grouped_rows(folder, tmp_path):
    rows = [{"question": "q" * (3 * n % 29 + 1), "answer": "a" * (7 * n % 23 + 1)} for n in range(64)]
    data = {"train": {"path": str(write_rows(tmp_path / "rows.jsonl", rows))}, "group_by_length": True}
    widths = {}
    for grouped in (True, False):
        recipe = make_recipe(folder, data={**data, "group_by_length": grouped}, loop={"batch_size": 8})
        batches = list(trainer_of(recipe, tmp_path / str(grouped)).get_train_dataloader())
        widths[grouped] = sum(batch["input_ids"].shape[1] for batch in batches)
        assert len(batches) == 8
    assert widths[True] < 0.8 * widths[False]
    results = train(make_recipe(folder, data=data), tmp_path / "run")
    assert results["steps"] == 6


def test_the_test_loss_does_not_depend_on_the_order(folder, tmp_path):
    """Test rows are sorted by length: one batch of all and batches of one agree."""
    found = [
        train(make_recipe(folder, loop={"steps": 1, "test_batch_size": size}), tmp_path / str(size))["test_loss"]
        for size in (1, 3, 10)
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("other", [{"packing": True}, {"shuffle": False}])
def test_what_excludes_it(other):
    data = {"train": {"path": "x"}, "form": "gsm8k", "group_by_length": True, **other}
    tree = {"task": "instruct", "model": {"name": "m"}, "method": {"name": "lora"}, "optim": {"lr": 1}, "data": data}
    _, problems = read_tree(Recipe, tree)
    assert any("group_by_length" in problem for problem in problems)
