"""This project's own studies from local data: `benchmarks/studies.py`, and the runs that docs/results/known keeps."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest

from corelora.compare.known import take_known
from corelora.compare.session import planned_runs, start_study

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ROOT / "docs" / "results" / "known"
DATA = "../shared/data"  # kept runs are told by their recipes, which hold this path


def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("studies", ROOT / "benchmarks" / "studies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


studies = script()


@pytest.mark.parametrize("name", studies.files())
def test_every_study_knows_where_its_rows_are(name):
    """Each names files of its own task; where the data is, they are there."""
    given = dict(text.split("=", 1) for text in studies.words(name, DATA))
    rows = [value for key, value in given.items() if key.startswith("data.")]
    assert len(rows) == (0 if name == "smollm2-tasks/word-problems" else 2)
    if (ROOT / DATA).is_dir():
        assert all((ROOT / value).exists() for key, value in given.items() if key != "model.name"), given


@pytest.mark.parametrize("path", sorted(KNOWN.glob("*.jsonl")), ids=lambda p: p.stem)
def test_kept_runs_are_runs_of_their_study(path, tmp_path):
    """Names follow from recipes: a study or a recipe that changed would silently make all of them again."""
    [name] = [name for name in studies.files() if studies.file_name(name) == path.stem]
    folder = start_study(studies.files()[name], tmp_path / "study", studies.words(name, DATA))
    folder.save()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert take_known(folder.root, [path]) == len(lines)
    first = {run.name for run in planned_runs(folder)}
    finals = {line["run"] for line in lines} - first
    assert len(finals) < len(lines)
    if all(s.state != "missing" for group in folder.study.groups for s in folder.asked(group)):
        chosen = {run.name for group in folder.study.groups for run in folder.finalists(group)}
        assert finals <= chosen


def test_the_commands_that_it_runs(monkeypatch, tmp_path, capsys):
    """One `compare` a study, with what is known, within the minutes that are left; unknown names run nothing."""
    made = []
    monkeypatch.setattr(studies, "corelora", lambda *words, **keys: made.append(words) or 0)
    name = "smollm2-gsm8k/methods"
    monkeypatch.setattr("sys.argv", ["studies.py", "--minutes", "5", "--jobs", "3", "--set", "loop.steps=2", name])
    assert studies.main() == 0
    [words] = made
    assert words[:2] == ("compare", "recipes/studies/smollm2-gsm8k/methods.yaml")
    assert "--set=loop.steps=2" in words
    assert words[words.index("--jobs") + 1] == "3"
    assert 4.9 < float(words[words.index("--minutes") + 1]) <= 5
    assert words[words.index("--known") + 1].endswith("smollm2-gsm8k-methods.jsonl")
    monkeypatch.setattr("sys.argv", ["studies.py", "smollm2-gsm8k/method"])
    assert studies.main() == 1
    assert "unknown: smollm2-gsm8k/method\n" in capsys.readouterr().out
    assert len(made) == 1


def test_several_studies_at_once(monkeypatch):
    """One waits for the other; the worst exit code is the script's."""
    both = Barrier(2, timeout=30)
    monkeypatch.setattr(studies, "corelora", lambda *words, **keys: both.wait() * 0 + ("boolq" in words[1]))
    monkeypatch.setattr("sys.argv", ["studies.py", "--together", "2", "smollm2-tasks/boolq", "smollm2-tasks/obqa"])
    assert studies.main() == 1


@pytest.mark.parametrize(("together", "cores"), [(1, "8"), (3, "2"), (9, "1")])
def test_each_of_several_studies_has_a_share_of_the_cores(monkeypatch, together, cores):
    """What joblib counts in its process, and with it the threads of its runs."""
    given = []
    ended = SimpleNamespace(poll=lambda: 0, returncode=0)
    monkeypatch.setattr(studies, "cpu_count", lambda: 8)
    monkeypatch.setattr(studies.subprocess, "Popen", lambda words, *, env, **keys: given.append(env) or ended)
    assert studies.corelora("compare", together=together) == 0
    assert given[0]["LOKY_MAX_CPU_COUNT"] == cores


def test_runs_are_taken_over_as_they_come(tmp_path):
    """Only newer ones, and without a moment in which the kept file is half of one."""
    made, kept = tmp_path / "runs.jsonl", tmp_path / "known" / "runs.jsonl"
    studies.keep(made, kept)
    assert not kept.exists()
    made.write_text("1\n")
    studies.keep(made, kept)
    assert kept.read_text() == "1\n"
    kept.write_text("2\n")
    os.utime(made, (1, 1))
    studies.keep(made, kept)
    assert kept.read_text() == "2\n"
    assert [p.name for p in kept.parent.iterdir()] == ["runs.jsonl"]
