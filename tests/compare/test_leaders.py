"""Who leads, who is a finalist, what is noise: on run folders written by hand."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest

from compare.helpers import opened, pretend
from corelora.compare.charts import group_charts, pareto
from corelora.compare.folder import read_study
from corelora.compare.leaders import leaders
from corelora.compare.tables import csv_text, leaders_text, list_text, markdown, study_data
from corelora.errors import CoreLoraError

LOSS = {("lora", "0.0001"): 0.7, ("lora", "0.001"): 0.604, ("lora", "0.01"): 0.6, ("nlora", "0.0001"): 0.5}
GROUP = {
    "name": "rates",
    "axes": {"method": ["lora", "nlora"], "lr": [1e-4, 1e-3, 1e-2]},
    "tune": ["lr"],
    "set": {"rank": 4},
}


def loss(run):
    """At 1e-3 and 1e-2 nlora diverges; each further seed is 0.002 above."""
    value = LOSS.get((run.labels["method"], run.labels["lr"]))
    return None if value is None else value + 0.002 * run.seed


def test_each_at_its_best_rate(folder, tmp_path):
    """Best first; failed runs counted; rates within 1 % of the best are usable, without a gap."""
    study = opened(tmp_path, folder, [GROUP])
    pretend(study, loss)
    first, second = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert (first.name, dict(first.tuned), first.mean, first.failed) == ("nlora", {"lr": "0.0001"}, 0.5, 2)
    assert (second.name, dict(second.tuned), second.usable) == ("lora", {"lr": "0.01"}, (1e-3, 1e-2))
    assert first.usable == (1e-4, 1e-4)
    assert (first.edges, second.edges) == (("lr",), ("lr",))  # what is above nlora's best rate has failed; below?
    assert second.early_loss == pytest.approx(2 - 2 / 20)
    assert leaders(study.study.groups[0], study.standings()["rates"], "test_loss", False)[0].name == "lora"


def test_a_best_value_at_the_edge_is_said(folder, tmp_path):
    """A run beyond it that failed shows that there is nothing; one that is missing shows nothing."""
    axes = {"method": ["lora"], "lr": [1e-4, 1e-3, 1e-2]}
    study = opened(tmp_path, folder, [{**GROUP, "axes": axes}])
    tops = {"0.0001": 0.7, "0.001": 0.6, "0.01": None}
    pretend(study, lambda run: tops[run.labels["lr"]])
    assert "| lr 0.001 | 0.6000 |" in markdown(study)
    shutil.rmtree(study.first["rates"][2].folder(study.root))
    assert "| lr 0.001 (edge) | 0.6000 |" in markdown(study)


def test_a_setting_has_one_colour(folder, tmp_path):
    """In every chart of a group, whichever settings it draws."""
    study = opened(tmp_path, folder, [GROUP])
    pretend(study, loss)
    charts = group_charts(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    text = json.dumps([chart.to_dict() for chart in charts.values()])
    domains = set(re.findall(r'"domain": (\["[^]]*\])', text))
    assert domains == {'["nlora", "lora"]'}


def test_finalists_are_the_best_of_each_setting(folder, tmp_path):
    """With every further seed; `top` keeps the best ones, `always` those that stay."""
    final = {"seeds": [1, 2]}
    for more, methods in (
        ({}, {"nlora", "lora"}),
        ({"top": 1}, {"nlora"}),
        ({"top": 1, "always": [{"method": "lora"}]}, {"nlora", "lora"}),
    ):
        study = opened(tmp_path, folder, [{**GROUP, "finalists": {**final, **more}}])
        pretend(study, loss)
        chosen = study.finalists(study.study.groups[0])
        assert {(r.labels["method"], r.labels["lr"], r.seed) for r in chosen} == {
            (m, {"nlora": "0.0001", "lora": "0.01"}[m], s) for m in methods for s in (0, 1, 2)
        }


def test_finalists_with_keys_of_their_own(folder, tmp_path):
    """Rates are tuned by the first runs; the finals, the first seed's too, are compared; a wrong key is named."""
    final = {"seeds": [1, 2], "set": {"data.test.split": "test"}}
    study = opened(tmp_path, folder, [{**GROUP, "finalists": final}])
    pretend(study, loss)
    chosen = study.finalists(study.study.groups[0])
    assert {(r.labels["method"], r.labels["lr"], r.seed) for r in chosen} == {
        (m, lr, s) for m, lr in (("nlora", "0.0001"), ("lora", "0.01")) for s in (0, 1, 2)
    }
    assert {r.recipe.data.test.split for r in chosen} == {"test"}
    assert not {r.name for r in chosen} & {r.name for r in study.first["rates"]}

    def on_test(run):
        final = 0.9 + 0.01 * run.seed if run.labels["method"] == "nlora" else 0.8
        return final if run.is_final else loss(run)

    pretend(study, on_test, chosen)
    best, other = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert (best.name, best.scores, best.usable) == ("lora", (0.8, 0.8, 0.8), (1e-3, 1e-2))
    assert (other.name, other.scores, dict(other.tuned)) == ("nlora", (0.9, 0.91, 0.92), {"lr": "0.0001"})
    again = study.finalists(study.study.groups[0])
    assert {r.name for r in again} == {r.name for r in chosen}  # the finals' own scores tune nothing
    with pytest.raises(CoreLoraError, match=r"rates: finalists.*data\.tset"):
        opened(tmp_path / "wrong", folder, [{**GROUP, "finalists": {"set": {"data.tset.split": "test"}}}])


def test_no_finalists_before_all_first_runs_have_ended(folder, tmp_path):
    study = opened(tmp_path, folder, [{**GROUP, "finalists": {"seeds": [1]}}])
    pretend(study, loss)
    missing = study.first["rates"][0].folder(study.root) / "results.json"
    missing.unlink()
    assert study.finalists(study.study.groups[0]) == []


def test_noise_is_said_of_seeds_only(folder, tmp_path):
    """Within two standard errors of the difference; one seed says nothing."""
    study = opened(tmp_path, folder, [{**GROUP, "finalists": {"seeds": [1, 2]}}])
    pretend(study, loss)
    pretend(study, loss, study.finalists(study.study.groups[0]))
    best, other = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert (best.noise, other.noise) == (None, False)
    assert best.scores == (0.5, 0.502, 0.504)
    assert best.deviation == pytest.approx(0.002)

    def near(run):
        if loss(run) is None or run.labels["lr"] == "0.001":
            return None
        return 0.5 + 0.01 * run.seed + (0.005 if run.labels["lr"] == "0.01" else 0.2 * (run.labels["method"] == "lora"))

    pretend(study, near, study.finalists(study.study.groups[0]))
    found = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert [x.noise for x in found] == [None, True]


def test_the_tables_say_it(folder, tmp_path):
    """Terminal, Markdown, CSV and JSON have the same figures; nothing that failed is left out."""
    study = opened(tmp_path, folder, [GROUP])
    pretend(study, loss)
    text = leaders_text(study)
    assert text.index("nlora") < text.index("lora ")
    assert "0.001 to 0.01 (x10)" in text
    assert "| nlora | lr 0.0001 (edge) | 0.5000 | 1 |" in markdown(study)
    lines = csv_text(study).splitlines()
    assert lines[0].startswith("group,method,lr,seed,state,run,")
    assert sum("step 3: the loss is nan" in line for line in lines) == 2
    data = json.loads(json.dumps(study_data(study)))
    assert data["groups"][0]["leaders"][0]["mean"] == 0.5
    assert len(data["runs"]) == 6
    assert "6 runs, 4 done" in list_text(study)


def test_a_setting_without_any_finished_run_comes_last(folder, tmp_path):
    study = opened(tmp_path, folder, [GROUP])
    pretend(study, lambda run: None if run.labels["method"] == "nlora" else 0.6)
    found = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert [x.name for x in found] == ["lora", "nlora"]
    assert math.isnan(found[1].mean)
    assert "nlora" in leaders_text(study)


def test_published_figures_stand_beside(folder, tmp_path):
    """Matched by the axes that both name; ours is the figure that the study says; a wrong column is named."""
    paper = {
        "columns": ["gsm8k"],
        "units": "%",
        "rows": [
            {"method": "LoRA", "rank": None, "values": {"gsm8k": 42.3}},
            {"method": "NLoRA", "model": "LLaMA-2-7B", "values": {"gsm8k": 57.7}},
            {"method": "NLoRA", "model": "Mistral-7B", "values": {"gsm8k": 73.9}},
        ],
    }
    (tmp_path / "paper.json").write_text(json.dumps(paper))
    published = {
        "file": "../paper.json",
        "where": {"model": "LLaMA-2-7B"},
        "columns": {"gsm8k": "eval/gsm8k-paper: accuracy"},
    }
    study = opened(tmp_path, folder, [{**GROUP, "published": published}])
    pretend(study, loss)
    for run in study.first["rates"]:
        place = run.folder(study.root) / "eval"
        place.mkdir()
        score = {"scores": {"accuracy": {"value": 0.25, "stderr": 0.01, "n": 4}}}
        (place / "gsm8k-paper.json").write_text(json.dumps(score))
    text = markdown(study)
    assert "published gsm8k, %" in text
    assert "| 57.7 | 25.00 |" in text
    assert "| 42.3 | 25.00 |" in text
    moved = study.root.rename(tmp_path / "elsewhere")  # and what it was read from is gone
    shutil.rmtree(tmp_path / "file")
    (tmp_path / "paper.json").unlink()
    there = read_study(moved)
    assert there.first == study.first
    assert markdown(there) == text
    study = there
    study.study.groups[0].published.columns = {"gsm9k": "test_loss"}
    with pytest.raises(CoreLoraError, match=r"no column 'gsm9k'\. It has: gsm8k"):
        markdown(study)


def test_the_front():
    """Neither cheaper nor better: off the front; equals stay."""
    points = [(1, 0.9), (2, 0.5), (2, 0.5), (3, 0.6), (4, 0.4)]
    assert pareto(points, True) == [True, True, True, False, True]
    assert pareto([(1, 0.1), (2, 0.5), (3, 0.4)], False) == [True, True, False]
