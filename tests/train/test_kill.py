"""Runs that are killed, and the same command again: nothing differs from a run that nobody disturbed."""

import json
import os
import random
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from corelora.recipe.tree import as_data
from corelora.train.checkpoints import STAGING
from corelora.train.progress import read_metrics
from processes import CORELORA, wait_for
from train.helpers import make_recipe, prepare_folder

TRAIN = (*CORELORA, "train")
STEPS = 48
MEASURED = ("seconds", "memory")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe that would show a wrong seam: dropout, steps of two passes, logs and tests between checkpoints."""
    folder = prepare_folder(tmp_path_factory.mktemp("kill"))
    loop = {"steps": STEPS, "batch_size": 2, "accumulate": 2, "log_every": 3, "save_every": 2, "test_every": 5}
    method = {"name": "nlora", "r": 4, "target_modules": "all-linear", "dropout": 0.1}
    made = make_recipe(folder, loop=loop, method=method, optim={"lr": 2e-2})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_data(made)))
    return path


@pytest.fixture(scope="module")
def unbroken(driver, recipe):
    """The folder of a run that nobody disturbed."""
    folder = recipe.parent / "unbroken"
    assert driver.run(*TRAIN, recipe, "--output", folder, log=recipe.parent / "unbroken.log") == 0
    return folder


def step_of(folder):
    """The step of the newest checkpoint by its name."""
    found = [int(p.name.rpartition("-")[2]) for p in (folder / "checkpoints").glob("checkpoint-*")]
    return max(found, default=0)


def kill_while_writing(pid, folder, draw):
    """Kill when a temporary checkpoint has appeared: at once, or some milliseconds into its writing."""
    before = step_of(folder)
    more = draw.choice([1, 2])
    staging = folder / "checkpoints" / STAGING
    wait_for(lambda: step_of(folder) >= before + 2 * (more - 1) and any(staging.glob("*")))
    time.sleep(draw.choice([0.0, draw.uniform(0, 0.02)]))
    os.kill(pid, signal.SIGKILL)


def kill_after_steps(pid, folder, draw):
    """Kill some time after another checkpoint."""
    before = step_of(folder)
    wait_for(lambda: step_of(folder) > before)
    time.sleep(draw.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)


def kill_early(pid, folder, draw):
    """Kill while data, model and checkpoint are being loaded."""
    time.sleep(draw.uniform(0, 0.8))
    os.kill(pid, signal.SIGKILL)


def losses(folder):
    """The rows of metrics.jsonl without what is measured by the clock."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def assert_equal_runs(one, other):
    """Weights bit for bit, every line of the metrics, the results."""
    weights, expected = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[k], expected[k]) for k in expected)
    assert losses(one) == losses(other)
    found, wanted = (json.loads((f / "results.json").read_text()) for f in (one, other))
    for key in ("steps", "train_loss", "test_loss", "tokens"):
        assert found[key] == wanted[key], key


@pytest.mark.slow
def test_ten_kills_change_nothing(driver, recipe, unbroken, tmp_path):
    """SIGKILL at ten random moments, five of them while a checkpoint is written; the same command ten times more."""
    seed = int.from_bytes(os.urandom(4), "little")
    draw = random.Random(seed)
    ways = [kill_while_writing] * 5 + [kill_after_steps] * 3 + [kill_early] * 2
    draw.shuffle(ways)
    folder, log = tmp_path / "run", tmp_path / "log"
    cut_while_writing = 0
    for way in ways:
        pid = driver.start(*TRAIN, recipe, "--output", folder, log=log)
        way(pid, folder, draw)
        assert driver.wait(pid) == -signal.SIGKILL, f"seed {seed}: the run ended by itself\n{log.read_text()[-2000:]}"
        cut_while_writing += (folder / "checkpoints" / STAGING).exists()
    assert driver.run(*TRAIN, recipe, "--output", folder, log=log) == 0, f"seed {seed}\n{log.read_text()[-2000:]}"
    assert cut_while_writing >= 1, f"seed {seed}: no checkpoint was cut"
    assert log.read_text().count("going on after step") >= 3, f"seed {seed}"  # the least that these moments leave
    assert_equal_runs(folder, unbroken)
    steps = [row["step"] for row in losses(unbroken) if "loss" in row]
    assert steps == list(range(3, STEPS + 1, 3))
    assert losses(unbroken)[-1]["test_loss"] < losses(unbroken)[0]["loss"] - 0.2  # it did learn something
    kept = [p.name for p in (folder / "checkpoints").iterdir()]
    assert sorted(kept) == [f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"]


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused(driver, recipe, unbroken, tmp_path):
    """While one trains the other is told who; once that one is killed the same command goes on; at the end, no more."""
    folder, command = tmp_path / "run", (*TRAIN, recipe, "--output", tmp_path / "run")
    first = driver.start(*command, log=tmp_path / "first")
    wait_for(lambda: step_of(folder) >= 2)
    assert driver.run(*command, log=tmp_path / "second") == 2
    told = (tmp_path / "second").read_text()
    assert f"process {first} on " in told
    assert "give another --output" in told
    os.kill(first, signal.SIGKILL)
    assert driver.wait(first) == -signal.SIGKILL
    assert driver.run(*command, log=tmp_path / "third") == 0
    assert "going on after step" in (tmp_path / "third").read_text()
    assert_equal_runs(folder, unbroken)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    assert driver.run(*command, log=tmp_path / "fourth") == 0
    assert "finished; nothing was done" in (tmp_path / "fourth").read_text()
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == before
