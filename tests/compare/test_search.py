"""Which rates are tried: outward from those to begin with, as far as what lies beyond may matter."""

from __future__ import annotations

import json

import pytest

from compare.helpers import opened, write_study
from corelora.compare.pool import Pool
from corelora.compare.session import Options, Session, start_study
from corelora.errors import CoreLoraError

RATES = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
GROUP = {
    "name": "rates",
    "axes": {"method": ["lora", "nlora"], "lr": RATES},
    "tune": ["lr"],
    "begin": [1e-3],
    "set": {"rank": 4},
}


def walked(study, losses, monkeypatch, write=None):
    """(rates of each method in the order in which a session made them, whether it called itself whole).

    Args:
        study: its folder.
        losses: of (method, rate); runs without one fail.
        monkeypatch: pytest's.
        write: what a run leaves; its loss, if not given.
    """
    write = write or write_loss
    made = {}

    def run(self, tasks, more=tuple):
        waiting = list(tasks)
        while waiting:
            task = waiting.pop(0)
            planned = session.known[task.work.folder]
            method, rate = planned.labels["method"], planned.recipe.optim.lr
            made.setdefault(method, []).append(rate)
            write(planned, study, losses.get((method, rate)))
            waiting += more()

    monkeypatch.setattr(Pool, "run", run)
    session = Session(study, Options(), print)
    return made, session.run()


def write_loss(planned, study, loss):
    place = planned.folder(study.root)
    place.mkdir(parents=True)
    name, text = ("failed.json", '{"error": "nan", "kind": "other"}') if loss is None else ("results.json", "")
    (place / name).write_text(text or f'{{"test_loss": {loss}}}')


def test_outward_until_the_best_lies_inside(folder, tmp_path, monkeypatch):
    """lora's best lies above; nlora fails where it begins and goes down; nothing more is run."""
    lora = dict(zip(RATES, [0.9, 0.8, 0.7, 0.5, 0.6], strict=True))
    nlora = dict(zip(RATES, [0.9, 0.6, None, None, None], strict=True))
    study = opened(tmp_path, folder, [GROUP])
    losses = {("lora", r): x for r, x in lora.items()} | {("nlora", r): x for r, x in nlora.items()}
    made, whole = walked(study, losses, monkeypatch)
    assert whole
    assert made == {"lora": [1e-3, 1e-4, 1e-2, 1e-1], "nlora": [1e-3, 1e-4, 1e-5]}
    assert {s.run.recipe.optim.lr for s in study.standings()["rates"] if s.run.labels["method"] == "lora"} == {
        1e-4,
        1e-3,
        1e-2,
        1e-1,
    }


def test_usable_rates_are_followed_too(folder, tmp_path, monkeypatch):
    """The best lies inside, but the lowest tried is within 1 % of it: how far that goes is what is asked."""
    losses = {("lora", r): x for r, x in zip(RATES, [0.8, 0.503, 0.5, 0.7, 0.9], strict=True)}
    losses |= {("nlora", r): 0.4 + abs(r - 1e-3) for r in RATES}
    made, _ = walked(opened(tmp_path, folder, [GROUP]), losses, monkeypatch)
    assert made["lora"] == [1e-3, 1e-4, 1e-2, 1e-5]
    assert made["nlora"] == [1e-3, 1e-4, 1e-2, 1e-5]


def test_usable_rates_are_not_followed_where_another_figure_decides(folder, tmp_path, monkeypatch):
    """A loss that is as low at rates that are too high leads nowhere when accuracy says so."""
    losses = {(method, r): 0.5 for method in ("lora", "nlora") for r in RATES}
    study = opened(tmp_path, folder, [GROUP], score="test_accuracy")
    made, _ = walked(study, losses, monkeypatch, write_accuracy)
    assert made == {"lora": [1e-3, 1e-4, 1e-2], "nlora": [1e-3, 1e-4, 1e-2]}


def write_accuracy(planned, study, loss):
    place = planned.folder(study.root)
    place.mkdir(parents=True)
    accuracy = 0.9 - abs(planned.recipe.optim.lr - 1e-3)
    (place / "results.json").write_text(json.dumps({"test_loss": loss, "test_accuracy": accuracy}))


def test_a_plateau_is_left(folder, tmp_path, monkeypatch):
    """Rates at which a classifier always answers one class say nothing of what lies beyond them, best or not.

    Two that score the same by chance differ in their losses.
    """
    group = GROUP | {"score": "test_f1", "axes": {"method": ["lora", "nlora", "pissa"], "lr": RATES}}
    figures = {
        "lora": [(0.87, 0.5), (0.81, 0.6), (0.81, 0.601), (0.81, 0.6), (0.81, 0.6)],
        "nlora": [(0.5, 0.7), (0.6, 0.6), (0.7, 0.5), (0.7, 0.55), (0.6, 0.6)],
        "pissa": [(0.87, 0.5), (0.78, 0.65), (0.81, 0.6), (0.81, 0.601), (0.81, 0.6)],
    }
    scores = {(name, r): x for name, found in figures.items() for r, x in zip(RATES, found, strict=True)}

    def write(planned, study, found):
        place = planned.folder(study.root)
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(dict(zip(("test_f1", "test_loss"), found, strict=True))))

    made, whole = walked(opened(tmp_path, folder, [group]), scores, monkeypatch, write)
    assert whole
    everything = [1e-3, 1e-4, 1e-2, 1e-5, 1e-1]
    assert made == {"lora": everything, "nlora": [1e-3, 1e-4, 1e-2], "pissa": everything}


def test_runs_are_kept_while_the_study_goes_on(folder, tmp_path, monkeypatch):
    """runs.jsonl holds what is done, so that a machine that is taken away does not take everything with it."""
    study, seen = opened(tmp_path, folder, [GROUP | {"axes": {"method": ["lora"], "lr": RATES}}]), []
    monkeypatch.setattr("corelora.compare.session.KEEP_EVERY", 0)

    def run(self, tasks, more=tuple):
        for task in tasks:
            planned = session.known[task.work.folder]
            write_loss(planned, study, 0.5)
            session._tell(task)
            seen.append([json.loads(line)["run"] for line in (study.root / "runs.jsonl").read_text().splitlines()])
            assert planned.name in seen[-1]

    monkeypatch.setattr(Pool, "run", run)
    session = Session(study, Options(), print)
    session.run()
    assert seen


def test_rates_to_begin_with_are_checked(folder, tmp_path):
    """Both mistakes in the study's own words, before anything runs."""
    with pytest.raises(CoreLoraError, match=r"begin: 0.5 is not among the rates, \['1e-05', "):
        start_study(write_study(tmp_path / "a", folder, [{**GROUP, "begin": [0.5]}]), tmp_path / "study")
    compared = {key: value for key, value in GROUP.items() if key != "tune"}
    with pytest.raises(CoreLoraError, match="begin: these are rates of a tuned axis"):
        start_study(write_study(tmp_path / "b", folder, [compared]), tmp_path / "study")
