"""From a study's groups to runs: which recipe each one is, and where its folder lies."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from corelora.compare.study import SHORT, Group, Study, label
from corelora.errors import CoreLoraError, raise_all
from corelora.recipe import Recipe, read_tree
from corelora.recipe.tree import as_data, as_given, merged, read_yaml

NOT_THE_RUN = ("about", "output")  # keys that change nothing that is trained


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a study.

    Attributes:
        group: the name of its group.
        labels: the value of each axis, as the study writes it.
        seed: of the run.
        recipe: the whole run.
        name: of its folder; two groups that ask for the same run share it.
        is_final: a finalist's run with keys of its own: it is compared, and nothing is tuned by it.
    """

    group: str
    labels: Mapping[str, str]
    seed: int
    recipe: Recipe
    name: str
    is_final: bool = False

    def folder(self, root: Path) -> Path:
        """Its run folder in a study's folder."""
        return root / "runs" / self.name


def expand(study: Study, where: Path) -> dict[str, list[Planned]]:
    """All runs of the first seeds, by group.

    Args:
        study: as it was read.
        where: the folder that its recipes are relative to.

    Raises:
        CoreLoraError: every recipe that can't be built, at once.
    """
    runs: dict[str, list[Planned]] = {}
    problems: list[str] = []
    for group in study.groups:
        runs[group.name], wrong = _expand_group(study, group, where)
        problems += wrong
        if group.finalists is not None and runs[group.name]:
            problems += _wrong_finals(runs[group.name][0], group.finalists.set)
    raise_all(list(dict.fromkeys(problems)), "study")
    return runs


def final_run(run: Planned, seed: int, keys: Mapping[str, Any]) -> Planned:
    """The same run with another seed, and with a finalist's own keys.

    Args:
        run: of the first seeds.
        seed: the seed.
        keys: recipe keys over the run's.

    Raises:
        CoreLoraError: keys that no recipe has.
    """
    data = _laid_over(as_data(run.recipe), nested(keys), {"loop": {"seed": seed}})
    recipe, problems = read_tree(Recipe, data)
    raise_all(problems, f"{run.group}: finalists")
    assert recipe is not None
    name, is_final = run_name(recipe), bool(keys)
    return Planned(group=run.group, labels=run.labels, seed=seed, recipe=recipe, name=name, is_final=is_final)


def _wrong_finals(run: Planned, keys: Mapping[str, Any]) -> list[str]:
    """What is wrong with the finalists' own keys: said before anything runs, not when the finals begin."""
    try:
        final_run(run, run.seed, keys)
    except CoreLoraError as error:
        return [str(error)]
    return []


def identity(recipe: Recipe) -> str:
    """Eight hexadecimal digits for everything of a recipe that a run depends on."""
    data = {key: value for key, value in as_given(recipe).items() if key not in NOT_THE_RUN}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]


def run_name(recipe: Recipe) -> str:
    """A folder's name from the recipe alone, so that groups share a run: data, method, rank, rate, seed, identity."""
    rank = f"-r{recipe.method['r']}" if "r" in recipe.method else ""
    words = f"{recipe.data.form}-{recipe.method['name']}{rank}-lr{recipe.optim.lr:g}-s{recipe.loop.seed}"
    return f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', words)}-{identity(recipe)}"


def _expand_group(study: Study, group: Group, where: Path) -> tuple[list[Planned], list[str]]:
    runs: list[Planned] = []
    problems: list[str] = []
    below = merged(nested(study.set), nested(group.set))
    read_once = cache(read_yaml)
    for labels, above in _points(group):
        for seed in group.seeds:
            file = above.get("recipe") or group.recipe or study.recipe
            keys = {k: v for k, v in above.items() if k != "recipe"}
            base = copy.deepcopy(read_once(where / str(file)))
            if any(_is_whole_method(k, v) for given in (study.set, group.set, keys) for k, v in given.items()):
                base.pop("method", None)
            data = _laid_over(base, below, nested(keys), {"loop": {"seed": seed}})
            recipe, wrong = read_tree(Recipe, data)
            what = ", ".join(f"{axis} {value}" for axis, value in labels.items())
            problems += [f"{group.name} ({what}): {p}" for p in wrong]
            if recipe is None:
                continue
            if "name" not in recipe.method:
                problems.append(f"{group.name} ({what}): method.name is missing: no axis and no recipe says it")
                continue
            name = run_name(recipe)
            if all(name != r.name for r in runs):
                runs.append(Planned(group=group.name, labels=labels, seed=seed, recipe=recipe, name=name))
    return runs, problems


def _points(group: Group) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """(label of each axis, recipe keys) of every point of the grid."""
    axes = [[(axis, *value) for value in _values(axis, values)] for axis, values in group.axes.items()]
    for point in product(*axes):
        keys: dict[str, Any] = {}
        for _, _, given in point:
            keys |= given
        yield {axis: label for axis, label, _ in point}, keys


def _values(axis: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    """(label, recipe keys) of each value of an axis."""
    if isinstance(values, Mapping):
        return [(str(given), dict(keys)) for given, keys in values.items()]
    return [(label(v), {axis: v}) for v in values]


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`{"optim.lr": 1}` as `{"optim": {"lr": 1}}`, short names of axes written out.

    Raises:
        CoreLoraError: a key below another that holds a value.
    """
    out: dict[str, Any] = {}
    for key, value in keys.items():
        short = SHORT.get(key, key) if not isinstance(value, Mapping) else key
        *path, last = short.split(".")
        node = out
        for step in path:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                raise CoreLoraError(f"study: {key}: {step} holds a value, not keys")
        both = isinstance(node.get(last), Mapping) and isinstance(value, Mapping)
        node[last] = merged(node[last], value) if both else value
    return out


def _is_whole_method(key: str, value: Any) -> bool:
    """Whether a key is a method with its name: the recipe's own method, whose fields may be another's, gives way."""
    return key == "method" and isinstance(value, Mapping) and "name" in value


def _laid_over(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers over earlier ones."""
    data: dict[str, Any] = {}
    for layer in layers:
        data = merged(data, layer)
    return data
