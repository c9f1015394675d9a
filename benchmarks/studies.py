"""This project's own studies, one after the other or several at once, from local data, as long as a machine is there.

    python benchmarks/studies.py --data DATA --minutes 9 --jobs 8 smollm2-gsm8k/methods minilm-glue/mrpc
    python benchmarks/studies.py --data DATA --minutes 9 --jobs 2 --together 4 smollm2-tasks/{boolq,obqa,arc-easy}
    python benchmarks/studies.py --list

DATA has math/, commonsense/, glue/ and vision/ with the files that `words` names. Runs of docs/results/known/NAME.jsonl
are not made again; what is there afterwards is written to that folder, or to --known's, while the studies go on. Each
study's own folder is studies/NAME. RTE begins from MNLI: its first run here is recipes/minilm-glue/mnli/full.yaml.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from joblib import cpu_count

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "recipes" / "studies"
VISION = ROOT / "recipes" / "vision" / "studies"
TASKS = {"arc-easy": "arc_easy", "boolq": "boolq", "obqa": "obqa"}
MNLI = "runs/minilm-mnli"


def files() -> dict[str, Path]:
    """Every study that can be run from local data, by name."""
    own = [
        f"{folder}/{path.stem}"
        for folder in ("smollm2-gsm8k", "smollm2-tasks", "minilm-glue", "published-rates")
        for path in sorted((STUDIES / folder).glob("*.yaml"))
        if path.stem != "base"
    ]
    return {name: STUDIES / f"{name}.yaml" for name in own} | {"dtd-efficientnet": VISION / "dtd-efficientnet.yaml"}


def file_name(name: str) -> str:
    """What a study's folder and the file of its kept runs are called."""
    return name.replace("/", "-")


def words(name: str, data: str) -> list[str]:
    """The recipe keys that say where a study's rows are.

    Args:
        name: of the study.
        data: the folder.
    """
    folder, _, task = name.partition("/")
    if name == "dtd-efficientnet":
        pictures = f"{data}/vision/dtd10/images"
        split = f"{data}/vision/splits/split_zhou_DescribableTextures.json.gz"
        return [*paths(pictures, pictures), f"images.split_file={split}"]
    if folder == "smollm2-gsm8k" or name == "published-rates/smollm2":
        return paths(f"{data}/math/gsm8k_train.jsonl.gz", f"{data}/math/gsm8k_test.jsonl")
    if folder == "smollm2-tasks":
        if task not in TASKS:
            return []
        stem = f"{data}/commonsense/{TASKS[task]}"
        return paths(f"{stem}_train.jsonl{'.gz' if task == 'boolq' else ''}", f"{stem}_test.jsonl")
    task = "sst2" if folder == "published-rates" else task
    train = {"sst2": "sst2_train.jsonl.gz", "qnli": "qnli_train_10k.jsonl.gz"}.get(task, f"{task}_train.jsonl")
    begin = [f"model.name={MNLI}/model"] if task == "rte" else []
    return [*paths(f"{data}/glue/{train}", f"{data}/glue/{task}_dev.jsonl"), *begin]


def paths(train: str, test: str) -> list[str]:
    """Where training and test rows are, as recipe keys."""
    return [f"data.train.path={train}", f"data.test.path={test}"]


def train_mnli(data: str) -> None:
    """What runs on RTE begin from, made once."""
    rows = paths(f"{data}/glue/mnli_train_10k.jsonl.gz", f"{data}/glue/mnli_dev_matched.jsonl.gz")
    corelora("train", "recipes/minilm-glue/mnli/full.yaml", *sets([*rows, "loop.graphs=auto"]), "--output", MNLI)


def sets(given: list[str]) -> list[str]:
    """Recipe keys as words of the command."""
    return [f"--set={text}" for text in given]


def corelora(*given: str, meanwhile: Callable[[], None] = lambda: None, together: int = 1) -> int:
    """Run one command of this project's, its output as it comes; `meanwhile` is called every second, and afterwards.

    Each command takes the machine to be its own: it is told of its share of the cores, one of `together`.
    """
    print("corelora", *given, flush=True)
    share = {"LOKY_MAX_CPU_COUNT": str(max(1, cpu_count() // together))}  # joblib's name for it
    process = subprocess.Popen([sys.executable, "-m", "corelora", *given], cwd=ROOT, env=os.environ | share)
    while process.poll() is None:
        time.sleep(1)
        meanwhile()
    meanwhile()
    return process.returncode


def keep(made: Path, kept: Path) -> None:
    """Take over the runs of a study that goes on, whole or not at all."""
    if made.is_file() and (not kept.is_file() or made.stat().st_mtime > kept.stat().st_mtime):
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(".new")
        shutil.copy2(made, new)
        new.replace(kept)


def main() -> int:
    """Run the studies that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, help="runs at a time, of each study")
    parser.add_argument("--together", type=int, default=1, help="studies at a time: one that searches makes few runs")
    parser.add_argument("--known", default="docs/results/known")
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="KEY=VALUE")
    given = parser.parse_args()
    known, studies = Path(given.known), files()
    wrong = [name for name in given.names if name not in studies]
    if given.list or wrong or not given.names:
        print("\n".join([*(f"unknown: {name}" for name in wrong), *studies]))
        return 1 if wrong else 0
    ends = time.monotonic() + 60 * given.minutes
    with ThreadPoolExecutor(given.together) as pool:
        return max(pool.map(lambda name: compare(name, studies[name], known, ends, given), given.names))


def compare(name: str, file: Path, known: Path, ends: float, given: argparse.Namespace) -> int:
    """Go on with one study.

    Args:
        name: of the study.
        file: its file.
        known: the folder of kept runs, relative to the project's.
        ends: when there is no more time, of the monotonic clock.
        given: what the command was given.

    Returns:
        The exit code.
    """
    left = (ends - time.monotonic()) / 60
    if left <= 0:
        return 0
    if name == "minilm-glue/rte" and not (ROOT / MNLI / "results.json").is_file():
        train_mnli(given.data)
    kept, folder = ROOT / known / f"{file_name(name)}.jsonl", f"studies/{file_name(name)}"
    more = ["--known", str(kept)] if kept.is_file() else []
    more += ["--jobs", str(given.jobs)] if given.jobs else []
    about = [*sets([*words(name, given.data), *given.more]), "--data", given.data]
    about += ["--output", folder, "--minutes", f"{left:.2f}"]
    made = ROOT / folder / "runs.jsonl"
    command = ("compare", str(file.relative_to(ROOT)), *about, *more)
    return corelora(*command, meanwhile=partial(keep, made, kept), together=given.together)


if __name__ == "__main__":
    raise SystemExit(main())
