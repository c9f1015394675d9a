"""Training a small model with its steps as CUDA graphs against launching each kernel: seconds a step, memory.

    python benchmarks/graphs.py recipes/smollm2-gsm8k/nlora.yaml [more recipes] [--set KEY=VALUE ...]

Both kinds of run take turns in one process. Prints one JSON object a run: the median of the steps after the first
twenty, in which the graphs are recorded, the whole run's seconds, its test loss, and its peak memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from corelora.recipe import Recipe, load_recipe
from corelora.train.run import train

WARM_UP = 20


def main() -> None:
    """Measure every recipe, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    for _ in range(given.rounds):
        for recipe in given.recipes:
            for graphs in ("off", "auto"):
                fixed = [f"loop.graphs={graphs}", f"loop.steps={given.steps}", "loop.log_every=1"]
                print(json.dumps(measure(recipe, [*given.changes, *fixed])), flush=True)


def measure(path: str, changes: list[str]) -> dict[str, Any]:
    """One run."""
    recipe = load_recipe(Recipe, path, changes)
    with tempfile.TemporaryDirectory() as folder:
        results = train(recipe, Path(folder))
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    times = [row["seconds"] for row in rows if "loss" in row]
    steps = [after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    cuda = torch.cuda.is_available()
    return {
        "recipe": path,
        "graphs": recipe.loop.graphs,
        "step_seconds": median(steps),
        "seconds": results["seconds"],
        "test_loss": results.get("test_loss"),
        "peak_memory": results["peak_memory"],
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
