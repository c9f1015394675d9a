"""Two processes on a CPU, launched with the shipped config files: the losses and weights of one process."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import corelora
from corelora.recipe.tree import as_data
from corelora.train.checkpoints import newest_whole
from corelora.train.progress import read_metrics
from corelora.train.resume import HARMLESS
from train.helpers import make_recipe, prepare_folder, save_bert, write_rows

HERE = Path(__file__).parent
CONFIGS = Path(corelora.__file__).parents[2] / "recipes" / "accelerate"
METHODS = ("nlora", "inttune", "nora")
OTHERS = ("packed", "full", "classifier")  # whatever else reads the weights before the first step
LAUNCHES = ("ddp", "fsdp2", "zero2", "zero3")
NEW = "ddp"  # whose processes are new ones, as those of a user are
RESUMED = ("ddp", "fsdp2", "zero3")  # that also go on after a cut: the ways to hold a model that save it differently
LOOP = {"steps": 8, "log_every": 1, "save_every": 4, "test_every": 4}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CONFIGS.is_dir(), reason="recipes/ belongs to the repository, not to an installed package"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, driver):
    """Recipes for one process and for each of two, with the same rows a step, and the runs of one process.

    Two take the fused path wherever it fits, as on GPUs; one takes the plain products.
    """
    made = prepare_folder(tmp_path_factory.mktemp("devices"))
    for name in (*METHODS, *OTHERS):
        for processes in (1, 2):
            loop = {**LOOP, "batch_size": 4 // processes, "fast": "off" if processes == 1 else "on"}
            loop |= {"steps": 2, "test_every": None} if name in OTHERS else {}
            recipe = make_recipe(made, loop=loop, optim={"lr": 5e-2}, **parts_of(name, made))
            (made / f"{name}-{processes}.yaml").write_text(yaml.safe_dump(as_data(recipe)))
    words = arguments(made, "one", [f"{name}-1" for name in (*METHODS, *OTHERS)])
    done = driver.call(*words, environment=surroundings(made, "one"))
    assert done.returncode == 0, done.stderr[-4000:]
    return made


def parts_of(name, folder):
    """What a recipe has beside the loop."""
    if name == "packed":
        return {"data": {"packing": True}}
    if name == "full":
        return {"method": {"name": "full"}}
    if name in METHODS:
        return {"method": {"name": name, "r": 4, "target_modules": "all-linear"}}
    pairs = [{"sentence": f"row {n} is {'good' if n % 2 else 'bad'}", "label": n % 2, "idx": n} for n in range(24)]
    rows = {"path": str(write_rows(folder / "sst2.jsonl", pairs))}
    return {
        "task": "classify",
        "model": {"name": str(save_bert(folder / "bert"))},
        "data": {"form": "sst2", "train": rows, "test": rows},
        "method": {"name": "nora", "r": 4, "target_modules": ["query", "value"]},
    }


def arguments(folder, launch, names):
    """What follows `python` where a process trains."""
    return [str(HERE / "ranks_child.py"), str(folder), launch, *names]


def surroundings(folder, launch):
    """Environment of the processes; each launch keeps its own cache, so that it makes everything itself."""
    paths = [str(Path(corelora.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        "CORELORA_CACHE": str(folder / launch / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONWARNINGS": "ignore",
    }


def launch(driver, folder, name, recipes):
    """Two processes with a shipped config file: in one launch they are new ones, in the others they are forked."""
    words = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    words += ["--num_processes", "2", "--main_process_port", "0", *arguments(folder, name, recipes)]
    environment = surroundings(folder, name)
    if name == NEW:
        command, given = [sys.executable, *words], os.environ | environment
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=500, check=False)
    else:
        done = driver.call(*words, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def launched(folder, driver):
    """Trains all methods with a config file once, when a test first asks for it."""
    done = set()

    def ask(name):
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        if name not in done:
            again = ["nlora-2:again"] if name in RESUMED else []
            others = OTHERS if name == "zero3" else ()
            launch(driver, folder, name, [*(f"{run}-2" for run in (*METHODS, *others)), *again])
            done.add(name)
        return folder / name

    return ask


def losses(run_folder):
    return [row.get("loss", row.get("test_loss")) for row in read_metrics(run_folder / "metrics.jsonl")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_two_processes_follow_one(launched, folder, name, method):
    """Every loss within 1e-4 of one process with the same rows a step, the saved adapter within 1e-4, too."""
    two, one = launched(name) / f"{method}-2", folder / "one" / f"{method}-1"
    expected = losses(one)
    assert losses(two) == pytest.approx(expected, abs=1e-4)
    assert len(expected) == 11
    assert max(expected) - min(expected) > 0.01  # there was something to follow
    found, wanted = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (two, one))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3, msg=key)
    seen = json.loads((two / "seen.json").read_text())
    assert seen["processes"] == 2
    assert seen["sharded"] == (name in ("fsdp2", "zero3"))


@pytest.mark.parametrize("name", OTHERS)
def test_zero3_follows_wherever_weights_are_read(launched, folder, name):
    """Packing looks at the model before it trains, full training saves all of it, an encoder has other modules."""
    assert losses(launched("zero3") / f"{name}-2") == pytest.approx(losses(folder / "one" / f"{name}-1"), abs=1e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_go_on_from_their_checkpoint(launched, folder, name):
    """Results and adapter taken away and the last checkpoint broken: it ends as before, from step 4."""
    again = launched(name) / "nlora-2"
    before = again.with_name("nlora-2-before")
    assert (before / "results.json").stat().st_mtime_ns < (again / "results.json").stat().st_mtime_ns
    assert newest_whole(before / "checkpoints", lambda line: None).step == 8
    kept, first = (
        [r for r in read_metrics(f / "metrics.jsonl") if r["step"] <= LOOP["save_every"]] for f in (again, before)
    )
    assert kept == first  # seconds and all: these steps were not taken again
    assert losses(again) == pytest.approx(losses(before), abs=1e-6)
    weights = load_file(before / "adapter" / "adapter_model.safetensors")
    for key, value in load_file(again / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, weights[key], atol=1e-6, rtol=1e-5, msg=key)


def test_every_config_file_is_launched_here():
    """A new file under recipes/accelerate needs its case above."""
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == set(LAUNCHES)


def test_the_documents_name_every_config_file():
    """docs/many-devices.md has a command line for each, and the keys of docs/resume.md are those that may differ."""
    docs = CONFIGS.parents[1] / "docs"
    page = (docs / "many-devices.md").read_text()
    for name in LAUNCHES:
        assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml" in page
    harmless = (docs / "resume.md").read_text().split("every key that differs.")[1].split("may differ")[0]
    assert set(re.findall(r"`([a-z_.]+)`", harmless)) == set(HARMLESS)


def test_the_fsdp2_benchmark_on_a_cpu(driver, monkeypatch, capfd):
    """The script for GPUs, with tiny sizes: one process and two, and what they print."""
    script = CONFIGS.parents[1] / "benchmarks" / "fsdp2.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--tiny"])
    launched = []

    def forked(command, **options):
        assert command[0] == sys.executable
        launched.append(driver.call(*command[1:], environment={"GLOO_SOCKET_IFNAME": "lo"}))
        return launched[-1]

    monkeypatch.setattr(subprocess, "run", forked)
    runpy.run_path(str(script), run_name="__main__")
    assert len(launched) == 2
    one, two, ratio = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert (one["devices"], one["sharded"], two["devices"], two["sharded"]) == (1, False, 2, True)
    assert two["loss"] == pytest.approx(one["loss"], abs=0.05)
    assert two["trained"] == one["trained"]
    expected = two["tokens_per_second"] / one["tokens_per_second"]
    assert ratio["ratio"] == pytest.approx(expected, rel=0.01)
