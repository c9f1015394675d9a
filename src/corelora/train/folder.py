"""The run folder: what is where, and what the run writes about itself at its start and end."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from corelora.recipe import Recipe
from corelora.recipe.tree import as_data

PACKAGES = ("corelora", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "vllm")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe with everything filled in."""
        return self.root / "recipe.yaml"

    @property
    def versions(self) -> Path:
        """Packages, Python, device."""
        return self.root / "versions.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line and log."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What a run that was cut off goes on from."""
        return self.root / "checkpoints"

    @property
    def results(self) -> Path:
        """Figures of a finished run."""
        return self.root / "results.json"

    @property
    def curve(self) -> Path:
        """The loss curve."""
        return self.root / "loss.png"

    def weights(self, full: bool) -> Path:
        """The adapter, or the whole model after full fine-tuning."""
        return self.root / ("model" if full else "adapter")

    @property
    def made_in_training(self) -> list[Path]:
        """What a run writes after its recipe, and so replaces where it is there already."""
        weights = [self.weights(full) for full in (False, True)]
        return [self.checkpoints, *weights, self.metrics, self.results, self.curve]

    def begin(self, recipe: Recipe) -> None:
        """Write the resolved recipe and the versions.

        Raises:
            OSError: the folder can't be written.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.versions, versions())  # first: beside it, a recipe.yaml is known as a run's own
        write_text(self.recipe, yaml.safe_dump(as_data(recipe), sort_keys=False, allow_unicode=True))


def versions() -> dict[str, Any]:
    """Versions of the packages that the figures depend on, and the machine's kind."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {name: known for name in PACKAGES if (known := _version(name)) is not None}
    found["torch"] = torch.__version__  # says which build it is, which its package's metadata may not
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    found["threads"] = torch.get_num_threads()
    return found


@cache
def _version(package: str) -> str | None:
    """Of an installed package; kept, because a package's metadata is searched for and read anew each time."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
