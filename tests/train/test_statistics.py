"""Input statistics are collected from the run's own batches, once."""

import pytest
import torch
from torch import nn

from corelora.errors import CoreLoraError
from corelora.recipe.schema import StatsPart
from corelora.stats import InputStats, collect_stats
from corelora.train import statistics
from corelora.train.models import load_model
from corelora.train.run import train
from corelora.train.statistics import run_stats
from corelora.train.tasks import Rows
from train.helpers import make_recipe, run_of, trainer_of

NORA = {"name": "nora", "r": 6, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes that are really made."""
    made = []

    def counted(model, batches, targets):
        made.append(len(batches))
        return collect_stats(model, batches, targets, progress=False)

    monkeypatch.setattr(statistics, "collect_stats", counted)
    return made


def load(run):
    return load_model(run.recipe.model, run.config, run.task.auto_class, False)


def test_they_are_those_of_the_first_training_rows(folder, tmp_path, monkeypatch, passes):
    """Equal to a pass by hand over the same batches; only the targets are recorded."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path / "cache"))
    run = run_of(make_recipe(folder, method=NORA), tmp_path)
    model, rows = load(run), run.rows["train"]
    part = StatsPart(batches=2, batch_size=3)
    found = run_stats(model, rows, run.collator, part, NORA["target_modules"])
    batches = [run.collator([rows.dataset[n] for n in three]) for three in ((0, 1, 2), (3, 4, 5))]
    wanted = collect_stats(model, batches, NORA["target_modules"], progress=False)
    assert set(found.mean_abs) == set(wanted.mean_abs)
    assert len(found.mean_abs) == 4
    for name, values in wanted.mean_abs.items():
        assert torch.equal(found.mean_abs[name], values)
    assert passes == [2]


def test_they_are_kept_by_model_and_rows(folder, tmp_path, monkeypatch, passes):
    """The same again costs nothing; other rows, another count or another model are collected."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path / "cache"))
    run = run_of(make_recipe(folder, method=NORA), tmp_path)
    model, rows, part = load(run), run.rows["train"], StatsPart(batches=2, batch_size=3)
    first = run_stats(model, rows, run.collator, part, ["q_proj"])
    again = run_stats(model, rows, run.collator, part, ["q_proj"])
    assert isinstance(again, InputStats)
    assert again.fingerprint == first.fingerprint
    assert len(passes) == 1
    run_stats(model, rows, run.collator, StatsPart(batches=3, batch_size=2), ["q_proj"])
    run_stats(model, rows, run.collator, part, ["k_proj"])
    other = run_of(make_recipe(folder, method=NORA, loop={"seed": 5}), tmp_path).rows["train"]
    run_stats(model, other, run.collator, part, ["q_proj"])
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.add_(0.1)
    run_stats(model, rows, run.collator, part, ["q_proj"])
    assert len(passes) == 5


def test_the_run_uses_them(folder, tmp_path, passes):
    """NoRA's outer factors come from the statistics: `weight` in their place gives others."""
    stats = {"batches": 2, "batch_size": 4}
    collected = trainer_of(make_recipe(folder, method=NORA, stats=stats), tmp_path / "a").model
    assert passes == [2]
    plain = trainer_of(make_recipe(folder, method={**NORA, "stats": "weight"}), tmp_path / "b").model
    assert passes == [2]
    name = "base_model.model.model.layers.0.self_attn.q_proj.corelora_A.default.start"
    assert not torch.allclose(collected.state_dict()[name], plain.state_dict()[name])


def test_given_ones_are_taken(folder, tmp_path, passes):
    """A file of statistics in the recipe."""
    run = run_of(make_recipe(folder, method=NORA), tmp_path)
    batch = run.collator([run.rows["train"].dataset[n] for n in range(4)])
    collect_stats(load(run), [batch], NORA["target_modules"], progress=False).save(tmp_path / "s.safetensors")
    method = {**NORA, "stats": str(tmp_path / "s.safetensors")}
    assert train(make_recipe(folder, method=method, loop={"steps": 1}), tmp_path / "run")["steps"] == 1
    assert passes == []


def test_no_row_is_an_error(folder, tmp_path):
    run = run_of(make_recipe(folder, method=NORA), tmp_path)
    empty = Rows(dataset=run.rows["train"].dataset.select([]))
    with pytest.raises(CoreLoraError, match="no training row"):
        run_stats(load(run), empty, run.collator, StatsPart(), None)


def test_the_places_of_a_large_parameter_are_in_it():
    """An embedding of CLIP's size has more entries than float32 has whole numbers."""
    large = nn.Parameter(torch.ones(1).expand(49408 * 512), requires_grad=False)
    assert statistics._print(large) == ([49408 * 512], [1.0] * statistics.SAMPLED)
