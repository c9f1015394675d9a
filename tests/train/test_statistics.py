"""Statistics that starts read are collected from the run's own batches, once."""

import pytest
import torch
from torch import nn

from corelora.data.cache import cache_root
from corelora.errors import CoreLoraError
from corelora.gradients import GradientStats, collect_gradients
from corelora.recipe.schema import StatsPart
from corelora.stats import InputStats, collect_stats
from corelora.train import statistics
from corelora.train.dry_run import check, plan
from corelora.train.methods import wanted_stats
from corelora.train.models import load_model
from corelora.train.progress import read_metrics
from corelora.train.run import train
from corelora.train.statistics import run_gradients, run_stats
from corelora.train.tasks import TASKS, Rows
from train.helpers import make_recipe, run_of, trainer_of

NORA = {"name": "nora", "r": 6, "target_modules": ["q_proj", "down_proj"]}


SB = {"name": "lora_sb", "r": 6, "target_modules": ["q_proj", "down_proj"]}


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


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.fixture
def backward(monkeypatch):
    """Counts the collections of gradients that are really made: (batches, triplets)."""
    made = []

    def counted(model, batches, rank, targets, seed):
        made.append((len(batches), rank))
        return collect_gradients(model, batches, rank, targets, seed=seed, progress=False)

    monkeypatch.setattr(statistics, "collect_gradients", counted)
    return made


def test_gradients_are_those_of_the_first_training_rows_and_kept(folder, tmp_path, monkeypatch, backward):
    """Equal to a collection by hand; the same again costs nothing, another rank, seed or model is collected."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path / "cache"))
    run = run_of(make_recipe(folder, method=SB), tmp_path)
    model, rows, part = load(run), run.rows["train"], StatsPart(batches=2, batch_size=3)
    wanted = wanted_stats(SB)
    assert wanted is not None
    found = run_gradients(model, rows, run.collator, part, wanted)
    batches = [run.collator([rows.dataset[n] for n in three]) for three in ((0, 1, 2), (3, 4, 5))]
    by_hand = collect_gradients(load(run), batches, 6, SB["target_modules"], progress=False)
    assert found.fingerprint == by_hand.fingerprint
    assert len(found.names) == 4
    assert run_gradients(model, rows, run.collator, part, wanted).fingerprint == found.fingerprint
    assert backward == [(2, 6)]
    for other in ({"r": 3}, {"rank_pattern": {"q_proj": 7}}, {"name": "lora_ga"}, {"seed": 1}):
        run_gradients(model, rows, run.collator, part, wanted_stats({**SB, **other}))
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.add_(0.1)
    run_gradients(model, rows, run.collator, part, wanted)
    assert [rank for _, rank in backward] == [6, 3, 7, 12, 6, 6]


@pytest.mark.parametrize("name", ["lora_sb", "lora_ga"])
def test_a_run_that_starts_from_gradients(folder, tmp_path, backward, name):
    """Planned without a pass, trained with one, and better than it began; the file alone begins the next run."""
    recipe = make_recipe(folder, method={**SB, "name": name}, stats={"batches": 2, "batch_size": 4}, optim={"lr": 1e-2})
    assert f"method    {name}" in plan(recipe, tmp_path / "run")
    assert backward == []
    results = train(recipe, tmp_path / "run")
    assert results["trained_parameters"] == check(recipe, tmp_path / "next").trained
    assert len(backward) == 1
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    again = make_recipe(folder, method={**SB, "name": name}, model={"start_from": str(tmp_path / "run")})
    assert train(again, tmp_path / "next")["steps"] == 6


def test_given_gradients_are_taken(folder, tmp_path, backward):
    """A file of statistics in the recipe; too few triplets are told before training."""
    run = run_of(make_recipe(folder, method=SB), tmp_path)
    batch = run.collator([run.rows["train"].dataset[n] for n in range(4)])
    path = tmp_path / "s.safetensors"
    collect_gradients(load(run), [batch], 6, SB["target_modules"], progress=False).save(path)
    method = {**SB, "stats": str(path)}
    assert train(make_recipe(folder, method=method, loop={"steps": 1}), tmp_path / "run")["steps"] == 1
    assert backward == []
    with pytest.raises(CoreLoraError, match="6 triplets of its gradient for 7"):
        check(make_recipe(folder, method={**method, "r": 7}), tmp_path / "more")


def test_gradients_are_refused_by_name(folder, tmp_path, monkeypatch):
    """Where a task's model gives no loss, and under ZeRO-3."""
    monkeypatch.setattr(type(TASKS["instruct"]), "gives_loss", False)
    with pytest.raises(CoreLoraError, match="lora_sb starts from first gradients, and in the task instruct the model"):
        check(make_recipe(folder, method=SB), tmp_path)
    assert not TASKS["clip_few_shot"].gives_loss
    run = run_of(make_recipe(folder, method=NORA), tmp_path)
    monkeypatch.setattr(statistics, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(CoreLoraError, match="under ZeRO-3 no gradients can be collected before training"):
        run_gradients(load(run), run.rows["train"], run.collator, StatsPart(), wanted_stats(SB))


def test_every_layer_with_an_expression(folder, tmp_path, monkeypatch, backward):
    """A regular expression, or all-linear, collects all inner layers; the adapter picks its own."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path / "cache"))
    for targets in ("all-linear", r".*(q|down)_proj"):
        recipe = make_recipe(folder, method={**SB, "target_modules": targets}, stats={"batches": 1})
        model = trainer_of(recipe, tmp_path / str(len(targets))).model
        assert any("corelora_core" in n for n, p in model.named_parameters() if p.requires_grad)
    found = [GradientStats.load(p) for p in (cache_root() / "data" / "stats").glob("*/stats.safetensors")]
    assert found
    assert not any("lm_head" in stats.names for stats in found)
