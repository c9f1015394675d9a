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
    """Best first; failed runs counted; rates within 1 % of the best are usable, by a line between those tried."""
    study = opened(tmp_path, folder, [GROUP])
    pretend(study, loss)
    first, second = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert (first.name, dict(first.tuned), first.mean, first.failed) == ("nlora", {"lr": "0.0001"}, 0.5, 2)
    assert (second.name, dict(second.tuned)) == ("lora", {"lr": "0.01"})
    assert second.usable == pytest.approx((1e-3 * 0.1 ** (0.002 / 0.096), 1e-2))  # 0.606 between 0.604 and 0.7
    assert first.usable == (1e-4, 1e-4)
    assert second.early_loss == pytest.approx(2 - 2 / 20)
    assert leaders(study.study.groups[0], study.standings()["rates"], "test_loss", False)[0].name == "lora"


def test_usable_rates_are_those_of_the_loss(folder, tmp_path):
    """Whatever decides: here the accuracy is best where the loss has begun to rise."""
    study = opened(tmp_path, folder, [GROUP], score="test_accuracy")
    losses = {"0.0001": 0.5, "0.001": 0.503, "0.01": 0.6}
    accuracies = {"0.0001": 0.7, "0.001": 0.71, "0.01": 0.8}
    pretend(study, lambda run: losses[run.labels["lr"]])
    for run in study.first["rates"]:
        path = run.folder(study.root) / "results.json"
        figures = json.loads(path.read_text())
        path.write_text(json.dumps(figures | {"test_accuracy": accuracies[run.labels["lr"]]}))
    group = study.study.groups[0]
    for leader in leaders(group, study.standings()["rates"], *study.study.score_of(group)):
        assert leader.mean == 0.8
        assert leader.usable == pytest.approx((1e-4, 1e-3 * 10 ** (0.002 / 0.097)))
        path = leader.runs[0].folder / "results.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "test_loss"}))
    found = leaders(group, study.standings()["rates"], *study.study.score_of(group))
    own = pytest.approx((1e-2 * 0.1 ** (0.008 / 0.09), 1e-2))
    assert [x.usable for x in found] == [own, own], "without a loss it is the score's"


@pytest.mark.parametrize(
    ("score", "lower"),
    [
        ("test_loss", True),
        ("train_loss", True),
        ("seconds", True),
        ("test_accuracy", False),
        ("test_matthews_correlation", False),
        ("test_f1", False),
        ("eval/gsm8k-paper: gsm8k (gsm8k_paper)", False),
        ("tokens_per_second", False),
    ],
)
def test_what_is_best_is_in_the_scores_name(folder, tmp_path, score, lower):
    study = opened(tmp_path / "a", folder, [GROUP], score=score).study
    assert study.score_of(study.groups[0]) == (score, lower)
    said = opened(tmp_path / "b", folder, [{**GROUP, "best": "highest" if lower else "lowest"}], score=score).study
    assert said.score_of(said.groups[0]) == (score, not lower)


def test_what_is_best_is_asked_where_the_name_does_not_say(folder, tmp_path):
    with pytest.raises(CoreLoraError, match="best: the name 'trained_parameters' does not say"):
        opened(tmp_path / "a", folder, [GROUP], score="trained_parameters")
    study = opened(tmp_path / "b", folder, [GROUP], score="trained_parameters", best="lowest").study
    assert study.score_of(study.groups[0]) == ("trained_parameters", True)
    with pytest.raises(CoreLoraError, match="best: the name 'spread' does not say"):
        opened(tmp_path / "c", folder, [{**GROUP, "score": "spread"}], best="lowest")  # said of another score


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
    assert (best.name, best.scores) == ("lora", (0.8, 0.8, 0.8))
    assert best.usable == pytest.approx((1e-3 * 0.1 ** (0.002 / 0.096), 1e-2))  # of the runs that tuned
    assert (other.name, other.scores, dict(other.tuned)) == ("nlora", (0.9, 0.91, 0.92), {"lr": "0.0001"})
    again = study.finalists(study.study.groups[0])
    assert {r.name for r in again} == {r.name for r in chosen}  # the finals' own scores tune nothing
    with pytest.raises(CoreLoraError, match=r"rates: finalists.*data\.tset"):
        opened(tmp_path / "wrong", folder, [{**GROUP, "finalists": {"set": {"data.tset.split": "test"}}}])


def test_an_evaluations_score_decides_among_finalists(folder, tmp_path):
    """Only they are evaluated: who is one is told by the training loss, who leads by what came out."""
    name = "eval/gsm8k-paper: gsm8k (gsm8k_paper)"
    study = opened(
        tmp_path, folder, [{**GROUP, "score": name, "finalists": {"suites": ["gsm8k"], "protocol": "paper"}}]
    )
    pretend(study, lambda run: 1.0)
    for run in study.first["rates"]:
        path = run.folder(study.root) / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"train_loss": loss(run) or 0.9}))
    group = study.study.groups[0]
    chosen = study.finalists(group)
    assert {(r.labels["method"], r.labels["lr"]) for r in chosen} == {("nlora", "0.0001"), ("lora", "0.01")}
    assert [x.scores for x in leaders(group, study.standings()["rates"], name, False)] == [(), ()]
    for run in chosen:
        (run.folder(study.root) / "eval").mkdir()
        value = {"lora": 0.31, "nlora": 0.3}[run.labels["method"]]
        made = {"scores": {"gsm8k (gsm8k_paper)": {"value": value}}}
        (run.folder(study.root) / "eval" / "gsm8k-paper.json").write_text(json.dumps(made))
    found = leaders(group, study.standings()["rates"], *study.study.score_of(group))
    assert [(x.name, x.scores) for x in found] == [("lora", (0.31,)), ("nlora", (0.3,))]


def test_no_finalists_before_the_first_runs_have_ended(folder, tmp_path):
    """Those of the setting: one that is added to a study hides no other's seeds. Where the best are chosen, of all."""
    for more, methods in (({}, {"lora"}), ({"top": 2}, set())):
        study = opened(tmp_path, folder, [{**GROUP, "finalists": {"seeds": [1], **more}}])
        pretend(study, loss)
        missing = next(run for run in study.first["rates"] if run.labels["method"] == "nlora")
        (missing.folder(study.root) / "results.json").unlink()
        assert {run.labels["method"] for run in study.finalists(study.study.groups[0])} == methods


def test_noise_is_said_of_seeds_only(folder, tmp_path):
    """Within what seeds alone make of the difference, so few of them being counted; one seed says nothing."""
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


@pytest.mark.parametrize(
    ("other", "noise"),
    [
        ({0: 0.512, 1: 0.514}, True),  # three and a half standard errors of two seeds each: nothing yet
        ({0: 0.512, 1: 0.514, 2: 0.513}, False),
        ({0: 0.5, 1: 0.502, 2: 0.509}, True),
        ({0: 0.6}, None),
    ],
)
def test_noise_of_two_and_three_seeds(folder, tmp_path, other, noise):
    """Welch's t-test: with two seeds only a wide distance is more than noise."""
    best = {0: 0.5, 1: 0.508} if len(other) == 2 else {0: 0.5, 1: 0.503, 2: 0.501}
    group = {"name": "rates", "axes": {"method": ["lora", "nlora"]}, "seeds": [0, 1, 2], "set": {"rank": 4}}
    study = opened(tmp_path, folder, [group])
    pretend(study, lambda run: {"lora": best, "nlora": other}[run.labels["method"]].get(run.seed))
    found = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert [(x.name, x.noise) for x in found] == [("lora", None), ("nlora", noise)]


def test_one_seed_in_front_takes_no_mark_from_the_others(folder, tmp_path):
    """The best that has several seeds is what the others are compared with."""
    axes = {"method": ["lora", "nlora", "pissa"]}
    scores = {"lora": {0: 0.49}, "nlora": {0: 0.5, 1: 0.51, 2: 0.52}, "pissa": {0: 0.501, 1: 0.512, 2: 0.52}}
    study = opened(tmp_path, folder, [{"name": "rates", "axes": axes, "seeds": [0, 1, 2], "set": {"rank": 4}}])
    pretend(study, lambda run: scores[run.labels["method"]].get(run.seed))
    found = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert [(x.name, x.noise) for x in found] == [("lora", None), ("nlora", None), ("pissa", True)]


@pytest.mark.parametrize("axis", ["lr", "optim.lr", "named"])
def test_the_edge_of_the_rates_is_said(folder, tmp_path, axis):
    """By whatever name the axis goes; inside, nothing is said; a usable range that ends at one may be wider."""
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    values = {f"rate {n}": {"optim.lr": r} for n, r in enumerate(rates)} if axis == "named" else rates
    name = "lr" if axis == "named" else axis
    axes = {"method": ["lora", "nlora", "pissa"], name: values}
    best = {"lora": {1e-4: 0.5}, "nlora": {1e-3: 0.5, 1e-2: 0.504}, "pissa": {1e-2: 0.501, 1e-1: 0.5}}
    study = opened(tmp_path, folder, [{"name": "rates", "axes": axes, "tune": [name], "set": {"rank": 4}}])
    pretend(study, lambda run: best[run.labels["method"]].get(run.recipe.optim.lr, 0.7))
    found = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert {x.name: x.edge for x in found} == {"lora": "lowest", "nlora": None, "pissa": "highest"}
    ends = {"lora": (1e-4, 1.06e-4), "nlora": (9.44e-4, 1.01e-2), "pissa": (9.55e-3, 1e-1)}
    assert {x.name: x.usable for x in found} == {name: pytest.approx(end, rel=2e-3) for name, end in ends.items()}
    text = markdown(study)
    assert "0.00094 to 0.01 (x10.7) |" in text
    assert "0.0095 to 0.1 (x10.5 or more)" in text
    assert "(lowest tried)" in text
    assert study_data(study)["groups"][0]["leaders"][0]["best_at_the_edge"] in ("lowest", "highest", None)


def test_a_score_that_is_no_number_is_a_failure(folder, tmp_path):
    """It is neither averaged nor passed over, in a final too; the page's charts stay data that a browser reads."""
    final = {"seeds": [1, 2], "set": {"data.test.split": "test"}}
    study = opened(tmp_path, folder, [{**GROUP, "finalists": final}])
    pretend(study, lambda run: math.inf if run.labels["lr"] == "0.01" else 0.5)
    assert [x.failed for x in leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)] == [1, 1]
    chosen = study.finalists(study.study.groups[0])
    pretend(study, lambda r: (math.nan if r.seed == 1 else 0.6) if r.is_final else math.inf, chosen)
    pretend(study, lambda r: math.inf if r.labels["lr"] == "0.01" else 0.5)
    for run in chosen:
        log = run.folder(study.root) / "metrics.jsonl"
        log.write_text(log.read_text() + json.dumps({"step": 21, "loss": math.nan}) + "\n")
    found = leaders(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert [(x.scores, x.failed) for x in found] == [((0.6, 0.6), 2)] * 2
    charts = group_charts(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert all(json.dumps(chart.to_dict(), allow_nan=False) for chart in charts.values())


def test_charts_of_any_name(folder, tmp_path):
    """Axes with dots and scores with colons or brackets are names, not Vega's paths and types."""
    axes = {"method": ["lora", "nlora"], "loop.steps": [10, 20], "optim.lr": [1e-3, 1e-2]}
    score = "eval/gsm8k-paper: gsm8k (a.b[c])"
    study = opened(tmp_path, folder, [{"name": "rates", "axes": axes, "tune": ["optim.lr"], "set": {"rank": 4}}])
    pretend(study, lambda run: 0.5)
    for run in study.first["rates"]:
        place = run.folder(study.root) / "eval"
        place.mkdir()
        found = {"gsm8k (a.b[c])": {"value": run.recipe.loop.steps / 100}}
        (place / "gsm8k-paper.json").write_text(json.dumps({"scores": found}))
    charts = group_charts(study.study.groups[0], study.standings()["rates"], score, False)
    assert {f"{score} over loop.steps", f"{score} over learning rate"} < set(charts)
    fields = re.findall(r'"field": "([^"]*)"', json.dumps([chart.to_dict() for chart in charts.values()]))
    assert fields
    assert not [name for name in fields if re.search(r"[.:\[\]\\]", name)]


def test_a_setting_has_one_colour_in_all_charts(folder, tmp_path):
    """Ten methods or more, too; a chart that leaves settings out says so."""
    axes = {"method": {f"method {n:02}": {"method.alpha": n + 1} for n in range(15)}}
    study = opened(tmp_path, folder, [{"name": "rates", "axes": axes, "set": {"rank": 4, "method.name": "lora"}}])
    pretend(study, lambda run: float(run.labels["method"].split()[1]))
    for run in study.first["rates"]:
        path = run.folder(study.root) / "results.json"
        figures = json.loads(path.read_text())
        path.write_text(json.dumps({**figures, "seconds": figures["test_loss"] + 1}))
    charts = group_charts(study.study.groups[0], study.standings()["rates"], "test_loss", True)
    assert "training loss of the best 14" in charts
    scales = re.findall(r'"scale": (\{"domain": \["method[^}]*\})', json.dumps([c.to_dict() for c in charts.values()]))
    colours = [dict(zip(s["domain"], s["range"], strict=True)) for s in map(json.loads, scales)]
    assert len(colours) == 2
    assert all(len(set(c.values())) == len(c) for c in colours)
    assert all(a[name] == b[name] for a in colours for b in colours for name in a.keys() & b.keys())


def test_the_tables_say_it(folder, tmp_path):
    """Terminal, Markdown, CSV and JSON have the same figures; nothing that failed is left out."""
    study = opened(tmp_path, folder, [GROUP])
    pretend(study, loss)
    text = leaders_text(study)
    assert text.index("nlora") < text.index("lora ")
    assert "0.00095 to 0.01 (x10.5 or more)" in text
    assert "| nlora | lr 0.0001 (lowest tried) | 0.5000 | 1 |" in markdown(study)
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
    assert "| 57.7 | 25.00 |" in markdown(there)
    study = there
    study.study.groups[0].published.columns = {"gsm9k": "test_loss"}
    with pytest.raises(CoreLoraError, match=r"no column 'gsm9k'\. It has: gsm8k"):
        markdown(study)


def test_the_front():
    """Neither cheaper nor better: off the front; equals stay."""
    points = [(1, 0.9), (2, 0.5), (2, 0.5), (3, 0.6), (4, 0.4)]
    assert pareto(points, True) == [True, True, True, False, True]
    assert pareto([(1, 0.1), (2, 0.5), (3, 0.4)], False) == [True, True, False]
