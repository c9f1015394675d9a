"""The files that a study is built on, kept in its folder: it can then be moved, and reported on, by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from corelora.compare.study import Study
from corelora.recipe.tree import as_data, read_yaml
from corelora.train.folder import write_text

PARTS = "parts"  # the folder in the study's


def kept_in(root: Path, study: Study, where: Path) -> dict[str, Any]:
    """Copy recipes, with what they are based on, and published figures.

    Args:
        root: the study's folder.
        study: as it was read.
        where: the folder that its files are relative to.

    Returns:
        The study in plain types, with the copies, relative to `root`, in place of the files.
    """
    data = as_data(study)
    (root / PARTS).mkdir(parents=True, exist_ok=True)

    def keep(holder: dict[str, Any], key: str, is_recipe: bool) -> None:
        if holder.get(key) is None:
            return
        given = Path(str(holder[key]))
        own = root / PARTS / "-".join(p for p in given.parts if p not in ("..", given.anchor))
        text = (
            yaml.safe_dump(read_yaml(where / given), sort_keys=False, allow_unicode=True)
            if is_recipe
            else (where / given).read_text(encoding="utf-8")
        )
        write_text(own, text)
        holder[key] = own.relative_to(root).as_posix()

    keep(data, "recipe", True)
    for group in data["groups"]:
        keep(group, "recipe", True)
        if group.get("published"):
            keep(group["published"], "file", False)
        for axis in group["axes"].values():
            for keys in axis.values() if isinstance(axis, Mapping) else ():
                keep(keys, "recipe", True)
    return data
