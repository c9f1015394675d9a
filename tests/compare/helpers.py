"""Study files over a tiny model, and run folders written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from corelora.compare.expand import Planned
from corelora.compare.folder import StudyFolder
from corelora.compare.session import start_study
from corelora.recipe.tree import as_data
from train.helpers import make_recipe


def write_study(where: Path, folder: Path, groups: list[dict[str, Any]], **keys: Any) -> Path:
    """A study.yaml over the tiny model's recipe, and that recipe beside it.

    Args:
        where: the study's folder.
        folder: of the tiny model, made by `prepare_folder`.
        groups: as in the file.
        **keys: other keys of the study.
    """
    where.mkdir(parents=True, exist_ok=True)
    recipe = as_data(make_recipe(folder))
    recipe["method"] = {"target_modules": ["q_proj", "v_proj"]}
    (where / "base.yaml").write_text(yaml.safe_dump(recipe))
    path = where / "tiny.yaml"
    path.write_text(yaml.safe_dump({"recipe": "base.yaml", "groups": groups, **keys}, sort_keys=False))
    return path


def opened(tmp_path: Path, folder: Path, groups: list[dict[str, Any]], **keys: Any) -> StudyFolder:
    """A study whose folder is still to be made."""
    return start_study(write_study(tmp_path / "file", folder, groups, **keys), tmp_path / "study")


def pretend(study: StudyFolder, loss: Callable[[Planned], float | None], also: Sequence[Planned] = ()) -> None:
    """Write what runs would leave: a test loss, or a failure where it is None.

    Args:
        study: whose first runs are written.
        loss: the figure of a run.
        also: further runs.
    """
    study.save()
    for run in [*(r for runs in study.first.values() for r in runs), *also]:
        place = run.folder(study.root)
        place.mkdir(parents=True, exist_ok=True)
        value = loss(run)
        if value is None:
            (place / "failed.json").write_text(json.dumps({"error": "step 3: the loss is nan\nmore", "kind": "other"}))
            continue
        figures = {"test_loss": value, "trained_parameters": 1000, "seconds": 2.0, "steps": 20, "peak_memory": 2**30}
        (place / "results.json").write_text(json.dumps({**figures, "versions": {"torch": "2"}}))
        rows = [{"step": n, "loss": 2 - n / 20} for n in range(1, 21)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
