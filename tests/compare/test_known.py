"""Runs as one small file: what another folder begins with instead of making them."""

from __future__ import annotations

import json

import pytest

from compare.helpers import opened, pretend, write_study
from corelora.cli import main
from corelora.compare.folder import read_study
from corelora.compare.known import KNOWN, _by_kind, forget_known, take_known
from corelora.compare.page import report_study
from corelora.compare.session import start_study
from corelora.compare.tables import study_data
from corelora.compare.work import Work
from corelora.errors import CoreLoraError

GROUP = {"name": "g", "axes": {"method": ["lora", "nlora"]}, "set": {"rank": 4}}

LAYERS = [  # one of each kind, so that means are the layers themselves; the first singular value is a unit
    {"layer": kind, "norm": 1.5, "relative": 0.25, "stable_rank": 2.0, "values": [1.0, 0.5]} for kind in ("q", "v")
]


def reported(tmp_path, folder):
    """A study with a finished run and a failed one, and its runs.jsonl."""
    study = opened(tmp_path, folder, [GROUP])
    pretend(study, lambda run: 0.5 if run.labels["method"] == "lora" else None)
    for run in study.first["g"]:
        (run.folder(study.root) / "updates.json").write_text(json.dumps({"layers": LAYERS}))
        (run.folder(study.root) / "eval").mkdir()
        (run.folder(study.root) / "eval" / "s-paper.json").write_text('{"scores": {"s": {"value": 1.0}}, "more": 1}')
    return study, report_study(study)[-1]


def test_another_folder_has_the_same_figures(folder, tmp_path):
    """Tables, curves, updates, evaluations and failures; only weights are not in the file."""
    study, file = reported(tmp_path, folder)
    there = start_study(write_study(tmp_path / "there", folder, [GROUP]), tmp_path / "other")
    there.save()
    assert take_known(there.root, [file]) == 2
    assert take_known(there.root, [file]) == 0
    assert study_data(there) == study_data(study)
    ours, theirs = (s.standings()["g"] for s in (there, study))
    assert [s.curve for s in ours] == [s.curve for s in theirs]
    assert [s.updates for s in ours] == [s.updates for s in theirs]
    assert report_study(read_study(there.root))[-1].read_text() == file.read_text()


def test_updates_are_means_by_kind():
    """Of norms, and of singular values as parts of the largest; a kind is a layer's last name."""
    layers = [
        {"layer": f"model.{n}.q", "norm": n, "relative": n / 10, "stable_rank": 1.0, "values": [2.0 * n, 1.0]}
        for n in (1, 2)
    ]
    means = {"layer": "q", "norm": 1.5, "relative": 0.15, "stable_rank": 1.0, "values": [1.0, 0.375]}
    assert _by_kind(layers) == [means]


def test_weights_that_are_wanted_are_made_again(folder, tmp_path):
    """The folder of a run that was taken is emptied for that; one that was made here is never."""
    study, file = reported(tmp_path, folder)
    take_known(tmp_path / "other", [file])
    name = study.first["g"][0].name
    work = Work(recipe=study.first["g"][0].recipe, folder=tmp_path / "other" / "runs" / name)
    assert work.is_done
    forget_known(work.folder)
    assert not [*work.folder.iterdir()]
    made = study.root / "runs" / name
    forget_known(made)
    assert (made / "results.json").is_file()


@pytest.mark.parametrize("line", ["{", "[]", '{"run": "../elsewhere", "results": {}}', '{"results": {}}'])
def test_other_files_are_refused(folder, tmp_path, line):
    """Before anything is written."""
    file = tmp_path / "runs.jsonl"
    file.write_text('{"run": "a", "results": {}}\n' + line + "\n")
    with pytest.raises(CoreLoraError, match="line 2 is not a run"):
        take_known(tmp_path / "study", [file])
    assert not (tmp_path / "study").exists()
    with pytest.raises(CoreLoraError, match="can't be read"):
        take_known(tmp_path / "study", [tmp_path / "nothing"])


def test_the_command_makes_nothing_that_is_known(folder, tmp_path, capsys):
    """All runs are known: the table comes at once."""
    study, file = reported(tmp_path, folder)
    path = study.file
    assert main(["compare", str(path), "--output", str(tmp_path / "there"), "--known", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "2 finished runs taken" in err
    assert "0.5000" in out
    assert (tmp_path / "there" / "runs.jsonl").read_text() == file.read_text()
    name = study.first["g"][0].name
    assert json.loads((tmp_path / "there" / "runs" / name / KNOWN).read_text()) == {"run": name}


def test_no_run_begins_when_time_is_up(folder, tmp_path, capsys):
    """The command says so, and how to go on; a time that is none is refused."""
    path = write_study(tmp_path / "file", folder, [GROUP])
    words = ["compare", str(path), "--output", str(tmp_path / "study")]
    assert main([*words, "--minutes", "1e-9"]) == 0
    assert "Time is up; runs are still missing. Go on with: corelora compare" in capsys.readouterr().out
    assert not list((tmp_path / "study").glob("runs/*"))
    assert main([*words, "--minutes", "0"]) != 0
    assert "more than 0 is expected" in capsys.readouterr().err
