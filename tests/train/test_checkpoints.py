"""Checkpoints: whole or passed over; a run that goes on ends like one that was not cut; one run a folder."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from corelora.errors import CoreLoraError
from corelora.recipe.tree import as_data
from corelora.train import checkpoints
from corelora.train.checkpoints import (
    MANIFEST,
    STAGING,
    newest_checkpoint,
    newest_whole,
    prune,
    publish,
    read_checkpoint,
    seal,
)
from corelora.train.dry_run import check
from corelora.train.lock import LOCK, locked
from corelora.train.progress import MetricsFile, read_metrics
from corelora.train.resume import HARMLESS, changed_keys
from corelora.train.run import train
from processes import wait_for
from train.helpers import make_recipe, prepare_folder, save_bert, write_rows

HERE = Path(__file__).parent
LOOP = {"steps": 8, "save_every": 2, "log_every": 3, "accumulate": 2, "batch_size": 2}


def written(root, step, text="weights"):
    """A whole checkpoint with a file and a folder in it."""
    staged = root / STAGING / f"checkpoint-{step}"
    (staged / "inner").mkdir(parents=True)
    (staged / "a.txt").write_text(f"{text} of step {step}")
    (staged / "inner" / "b.bin").write_bytes(bytes(range(200)))
    seal(staged, step, {"processes": 1})
    publish(staged, root / staged.name)
    return root / staged.name


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "lacks its file inner/b.bin": lambda c: (c / "inner" / "b.bin").unlink(),
    "b.bin has 199 bytes, was written with 200": lambda c: _cut(c / "inner" / "b.bin"),
    "b.bin is not what was written": lambda c: _flip(c / "inner" / "b.bin"),
    "has no manifest.json": lambda c: (c / MANIFEST).unlink(),
    "manifest.json can't be read": lambda c: _cut(c / MANIFEST),
    "can't be read ('about')": lambda c: (c / MANIFEST).write_text('{"step": 20, "files": {}}'),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_broken_checkpoint_is_passed_over_with_its_reason(tmp_path, reason):
    """The one before it is found; 9 comes before 10, and what is not a checkpoint does not count."""
    for step in (9, 10, 20):
        written(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    DAMAGE[reason](tmp_path / "checkpoint-20")
    told = []
    found = newest_whole(tmp_path, told.append)
    assert found is not None
    assert (found.path, found.step, found.about) == (tmp_path / "checkpoint-10", 10, {"processes": 1})
    assert len(told) == 1
    assert reason in told[0]
    assert "checkpoint-20" in told[0]
    with pytest.raises(CoreLoraError):
        read_checkpoint(tmp_path / "checkpoint-20")


def test_no_checkpoint_is_none(tmp_path):
    """Neither in a folder that is not there, nor where only an unfinished one is."""
    assert newest_whole(tmp_path / "none") is None
    (tmp_path / STAGING / "checkpoint-3").mkdir(parents=True)
    assert newest_whole(tmp_path) is None
    assert newest_checkpoint(tmp_path) is None


def test_a_new_checkpoint_takes_the_place_of_a_broken_one(tmp_path):
    """A run that went back behind a broken checkpoint comes to its step again."""
    DAMAGE["has no manifest.json"](written(tmp_path, 4))
    written(tmp_path, 4, "new weights")
    assert (newest_whole(tmp_path).path / "a.txt").read_text() == "new weights of step 4"


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [2, 3, 4, 5]), (None, [2, 3, 4, 5])])
def test_pruning_keeps_the_newest_and_what_leads_to_it(tmp_path, keep, left):
    """A broken checkpoint with more steps is no reason to delete a whole one: it goes, and is not counted."""
    for step in (2, 3, 4, 5, 12):
        written(tmp_path, step)
    DAMAGE["has no manifest.json"](tmp_path / "checkpoint-12")
    prune(tmp_path, tmp_path / "checkpoint-5", keep)
    assert sorted(int(p.name.partition("-")[2]) for p in tmp_path.glob("checkpoint-*")) == left


# -- a run that is cut off and goes on ------------------------------------------------------------------------------


class Cut(Exception):
    """A run ends here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = prepare_folder(tmp_path_factory.mktemp("checkpoints"))
    save_bert(made / "bert")
    pairs = [{"sentence": f"row {n} is {'good' if n % 2 else 'bad'}", "label": n % 2, "idx": n} for n in range(24)]
    write_rows(made / "sst2.jsonl", pairs)
    return made


def cut_off(recipe, output, monkeypatch, step):
    """A run that ends with an exception when it logs `step`."""
    with monkeypatch.context() as patch:
        log = MetricsFile.on_log

        def on_log(self, args, state, control, **kwargs):
            if state.global_step >= step:
                raise Cut
            log(self, args, state, control, **kwargs)

        patch.setattr(MetricsFile, "on_log", on_log)
        with pytest.raises(Cut):
            train(recipe, output)


def weights(folder):
    """All tensors of a run's adapter or model."""
    files = sorted(p for kind in ("adapter", "model") for p in (folder / kind).glob("*.safetensors"))
    assert files
    return {k: v for f in files for k, v in load_file(f).items()}


def losses(folder):
    """metrics.jsonl without what the clock says."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows]


def assert_same(one, other):
    """Weights bit for bit, metrics, and the figures of the results."""
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert losses(one) == losses(other)
    assert [p for p in one.rglob("*") if p.name == STAGING] == []
    found, expected = (json.loads((f / "results.json").read_text()) for f in (one, other))
    for key in ("train_loss", "steps", "tokens"):
        assert found[key] == expected[key]


RUNS = {
    "nlora": {"method": {"name": "nlora", "r": 4, "target_modules": "all-linear", "dropout": 0.2}},
    "inttune": {"method": {"name": "inttune", "r": 8, "target_modules": "all-linear", "dropout": 0.2}},
    "nora": {"method": {"name": "nora", "r": 4, "target_modules": "all-linear", "dropout": 0.2}},
    "lora_ga": {"method": {"name": "lora_ga", "r": 4, "target_modules": "all-linear"}},
    "rmsprop, three rates": {"optim": {"lr": 1e-3, "name": "rmsprop", "rates": {"B": 4, "core": 2}}},
    "full": {"method": {"name": "full"}},
    "adalora": {
        "method": {
            "name": "adalora",
            "target_modules": "all-linear",
            "target_r": 2,
            "init_r": 6,
            "tinit": 1,
            "tfinal": 2,
        }
    },
    "packed": {"data": {"packing": True}},
    "rows of like length, in the second epoch": {
        "data": {"group_by_length": True},
        "loop": {"batch_size": 8, "accumulate": 2},
    },
    "folded": {"loop": {"fold": True}},
    "classifier": {"task": "classify", "data": {"form": "sst2"}, "method": {"name": "nlora", "r": 4}},
}


def recipe_of(folder, name, **loop):
    parts = dict(RUNS[name])
    if parts.get("task") == "classify":
        rows = {"path": str(folder / "sst2.jsonl")}
        parts["data"] = {**parts["data"], "train": rows, "test": None}
        parts["model"] = {"name": str(folder / "bert")}
        parts["method"] = {**parts["method"], "target_modules": ["query", "value"]}
    return make_recipe(folder, loop={**LOOP, **parts.pop("loop", {}), **loop}, **parts)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_bit_for_bit(folder, name, tmp_path, monkeypatch):
    """Cut at step 6, between its line of metrics and its checkpoint; goes on after step 4, within a mean of losses."""
    recipe = recipe_of(folder, name)
    train(recipe, tmp_path / "whole")
    cut_off(recipe, tmp_path / "cut", monkeypatch, 6)
    assert newest_whole(tmp_path / "cut" / "checkpoints").step == 4
    train(recipe, tmp_path / "cut")
    assert_same(tmp_path / "cut", tmp_path / "whole")
    start = weights(tmp_path / "whole")
    moved = load_file(next((tmp_path / "whole" / "checkpoints" / "checkpoint-6").glob("*.safetensors")))
    assert any(not torch.equal(start[k], v) for k, v in moved.items() if k in start)


def test_the_end_is_reached_from_the_last_checkpoint(folder, tmp_path, monkeypatch):
    """Cut after the last step, in mid-pass over the rows: no further step is made, nothing is logged twice."""
    recipe = make_recipe(folder, loop=LOOP)
    train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "results.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "adapter")
    train(recipe, tmp_path / "cut")
    assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("damage", [_cut, _flip])
def test_a_corrupted_newest_checkpoint_costs_its_steps_only(folder, damage, tmp_path, monkeypatch, capsys):
    """The run says why it passes over it, goes on from the one before, and ends the same."""
    recipe = make_recipe(folder, loop=LOOP)
    train(recipe, tmp_path / "whole")
    cut_off(recipe, tmp_path / "cut", monkeypatch, 8)
    newest = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert newest.name == "checkpoint-6"
    damage(newest / "optimizer.pt")
    train(recipe, tmp_path / "cut")
    told = capsys.readouterr().err
    assert f"passed over: {newest / 'optimizer.pt'}" in told
    assert "going on after step 4" in told
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_room_is_asked_for_once(folder, tmp_path, monkeypatch):
    """What the checkpoints of a run that goes on take already counts as free: it puts its own in their place."""
    recipe = make_recipe(folder, loop=LOOP)
    cut_off(recipe, tmp_path, monkeypatch, 6)
    there = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    assert check(recipe, tmp_path).free == 10**6 + there
    assert check(recipe, tmp_path / "another").free == 10**6


def test_other_versions_are_told(folder, tmp_path, monkeypatch, capsys):
    """The run goes on, and says what its figures depend on and has changed."""
    recipe = make_recipe(folder, loop=LOOP)
    cut_off(recipe, tmp_path, monkeypatch, 6)
    path = tmp_path / "versions.json"
    now = json.loads(path.read_text())["torch"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0", "datasets": "1.0"}))
    train(recipe, tmp_path)
    assert f"goes on but not bit for bit: torch 1.0 -> {now}\n" in capsys.readouterr().err


def test_all_checkpoints_broken_is_a_new_beginning(folder, tmp_path, monkeypatch, capsys):
    """It says so, and the metrics begin anew."""
    recipe = make_recipe(folder, loop=LOOP)
    train(recipe, tmp_path / "whole")
    cut_off(recipe, tmp_path / "cut", monkeypatch, 6)
    for path in (tmp_path / "cut" / "checkpoints").glob("checkpoint-*"):
        _flip(path / "adapter_model.safetensors")
    train(recipe, tmp_path / "cut")
    assert capsys.readouterr().err.count("passed over") == 2
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_a_checkpoint_that_fails_leaves_the_others(folder, tmp_path, monkeypatch):
    """An error while one is sealed: nothing half written stays, and those before it are whole."""
    real = checkpoints.seal

    def fails(staged, step, about):
        if step == 6:
            raise OSError(5, "Input/output error", str(staged))
        real(staged, step, about)

    recipe = make_recipe(folder, loop=LOOP)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal", fails)
        with pytest.raises(OSError, match="Input/output"):
            train(recipe, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert newest_whole(tmp_path / "checkpoints").step == 4


def test_every_file_of_a_checkpoint_is_listed_and_no_arguments_are_pickled(folder, tmp_path):
    """The manifest covers all files; what torch pickled loads without running code."""
    train(make_recipe(folder, loop=LOOP), tmp_path)
    path = tmp_path / "checkpoints" / "checkpoint-8"
    files = json.loads((path / MANIFEST).read_text())["files"]
    assert set(files) | {MANIFEST} == {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    pickled = {name for name in files if name.endswith((".pt", ".pth", ".bin"))}
    assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name in ("optimizer.pt", "scheduler.pt"):
        assert torch.load(path / name, weights_only=True)


# -- one run a folder -----------------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing_more(folder, tmp_path, capsys):
    """Its results come back, and no file is touched."""
    recipe = make_recipe(folder, loop=LOOP)
    results = train(recipe, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != LOCK}
    assert train(recipe, tmp_path) == results
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != LOCK} == before
    assert "finished; nothing was done" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_in_the_folder_is_refused(folder, finished, tmp_path, monkeypatch):
    """Every key that differs is named, with both values; keys that move nothing may differ."""
    recipe = make_recipe(folder, loop=LOOP)
    train(recipe, tmp_path) if finished else cut_off(recipe, tmp_path, monkeypatch, 6)
    other = make_recipe(folder, loop={**LOOP, "seed": 3}, method={"name": "nlora", "r": 2, "dropout": 0.1})
    with pytest.raises(CoreLoraError) as caught:
        train(other, tmp_path)
    for words in (
        "loop.seed was 0, is 3",
        "method.r was 4, is 2",
        "method.dropout was not given, is 0.1",
        "method.target_modules was 'all-linear', is not given",
        "another --output",
    ):
        assert words in str(caught.value)
    train(make_recipe(folder, loop={**LOOP, "log_every": 1, "keep": 1, "save_every": 3}), tmp_path)


def test_the_keys_that_may_differ_exist(folder):
    """A renamed key would be refused without anybody's wish."""
    recipe = make_recipe(folder)
    for key in HARMLESS:
        part, _, name = key.rpartition(".")
        assert name in as_data(getattr(recipe, part) if part else recipe)
    assert changed_keys(recipe, recipe) == []


def test_other_rows_are_refused(folder, tmp_path, monkeypatch):
    """The file under the recipe has changed, so that other rows would follow."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(folder / "train.jsonl", rows)
    recipe = make_recipe(folder, loop=LOOP, data={"train": {"path": str(rows)}})
    cut_off(recipe, tmp_path / "run", monkeypatch, 6)
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    with pytest.raises(CoreLoraError, match="can't be gone on from: rows was"):
        train(recipe, tmp_path / "run")


def test_a_recipe_that_no_run_wrote_is_not_replaced(folder, tmp_path):
    """The user's own recipe.yaml, with --output in its folder."""
    (tmp_path / "recipe.yaml").write_text("task: instruct\n")
    with pytest.raises(CoreLoraError, match=r"recipe\.yaml was not written by a run"):
        train(make_recipe(folder), tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == "task: instruct\n"


@pytest.mark.parametrize("name", ["model/config.json", "adapter/adapter_model.safetensors", "metrics.jsonl"])
def test_what_no_run_wrote_is_not_replaced(folder, tmp_path, name):
    """The user's own model, adapter or metrics, with --output in their folder."""
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    with pytest.raises(CoreLoraError, match=f"no run wrote its {name.partition('/')[0]}, which this one would replace"):
        train(make_recipe(folder, method={"name": "full"}), tmp_path)
    assert own.read_text() == "mine"


HOLD = """
import os, signal, sys
from pathlib import Path
from corelora.train.lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else None
    if child != 0:
        print(child or "alone", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("kind", ["alone", "fork"])
def test_a_lock_goes_with_its_process(driver, tmp_path, kind):
    """Refused while the other lives, with its number and host; free once it is killed, even if a fork of it lives."""
    (tmp_path / "hold.py").write_text(HOLD)
    log = tmp_path / "log"
    pid = driver.start(tmp_path / "hold.py", tmp_path, kind, log=log)
    wait_for(lambda: log.read_text().endswith("\n"))
    with pytest.raises(CoreLoraError, match=rf"process {pid} on \S+ trains in this folder since 20"), locked(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    assert driver.wait(pid) == -signal.SIGKILL
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    if kind == "fork":
        os.kill(int(log.read_text()), signal.SIGKILL)  # it is there, still


# -- disks ----------------------------------------------------------------------------------------------------------


def may_mount():
    """Whether this user can mount a disk of its own."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    )
    return tried.returncode == 0


def on_small_disks(driver, *words):
    """What disk_child.py prints."""
    done = driver.call(HERE / "disk_child.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small_disk_recipe(folder):
    if not may_mount():
        pytest.skip("this user can't mount a disk in a namespace of its own")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(as_data(make_recipe(folder, loop={"steps": 6, "save_every": 1, "log_every": 2}))))
    return path


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_loses_nothing(driver, folder, small_disk_recipe, tmp_path):
    """Disks that fill up in different files; with more room the same command ends as on a large one."""
    whole = folder / "roomy"
    train(make_recipe(folder, loop={"steps": 6, "save_every": 1, "log_every": 2}), whole)
    expected = hashlib.sha256((whole / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    seen = on_small_disks(driver, "full", small_disk_recipe, tmp_path, 180, 240, 300, 360, 430)
    for size in seen:
        assert "the disk is full: " in size["error"]
        assert 1 <= size["kept"] <= 4
        assert f"the same command goes on after {tmp_path}" in size["error"]
        assert f"checkpoint-{size['kept']} " in size["error"]
        assert all(name.startswith("checkpoint-") for name in size["left"])
        assert size["again"] is None
        assert size["weights"] == expected
        rows = [json.loads(line) for line in size["metrics"].splitlines()]
        assert [(r["step"], r.get("loss"), r.get("test_loss")) for r in rows] == [
            (r["step"], r.get("loss"), r.get("test_loss")) for r in losses(whole)
        ]


@pytest.mark.slow
def test_a_disk_that_refuses_is_found_before_training(driver, small_disk_recipe, tmp_path):
    """Read-only: one sentence, and the model was not loaded."""
    seen = on_small_disks(driver, "read-only", small_disk_recipe, tmp_path)
    assert f"the run folder {tmp_path / 'disk'} can't be written (Read-only file system)" in seen["error"]
    assert seen["loaded"] == 0


def test_a_folder_below_a_file_is_found_before_training(folder, tmp_path):
    """A path that can't be a folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CoreLoraError, match=r"run folder \S+ can't be written \(Not a directory\)"):
        train(make_recipe(folder), tmp_path / "file" / "run")
