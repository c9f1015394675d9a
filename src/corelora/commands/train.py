"""`corelora train`: from a recipe to a trained adapter and its run folder."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

from corelora.commands.output import print_json
from corelora.errors import CoreLoraError, raise_all, sentences
from corelora.recipe import Recipe
from corelora.recipe.tree import mended

HELP = "train what a recipe says"
RUNS = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a YAML file; docs/recipes.md lists its keys")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="put a value over the recipe's: optim.lr=2e-4")
    add("--output", metavar="FOLDER", help="run folder (the recipe's `output`, else runs/NAME-OF-THE-RECIPE)")
    add("--dry-run", action="store_true", help="check everything and print the plan; load no weights, write nothing")
    add("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Train, or show what would be trained.

    Raises:
        CoreLoraError: packages that training needs are missing; anything wrong with the recipe or the run.
    """
    try:  # here, so that the other commands need none of its packages, nor the time to import them
        from corelora.train.dry_run import check, plan
        from corelora.train.processes import is_main
        from corelora.train.run import train
        from corelora.train.story import next_steps, say, where_stopped
    except ModuleNotFoundError as error:
        raise CoreLoraError(f"training needs the package {error.name}. Install: pip install corelora[train]") from None
    path = Path(arguments.recipe)
    recipe, found = mended(Recipe, path, arguments.set)
    output = Path(arguments.output or (recipe and recipe.output) or RUNS / path.stem)
    if recipe is None or found:
        try:
            if recipe is not None:
                check(recipe, output)
        except CoreLoraError as error:
            found += [text.removeprefix("recipe: ") for text in sentences(error)]
        raise_all(found, str(path))
        raise AssertionError("there is no recipe, and no mistake that says why")
    if arguments.dry_run:
        print(plan(recipe, output))
        words = ["corelora", "train", str(path), *(f"--set={text}" for text in arguments.set), "--output", str(output)]
        print(f"\nNothing is wrong. Next: {shlex.join(words)}")
        return 0
    try:
        with redirect_stdout(sys.stderr):  # DeepSpeed, where it is installed, logs to standard output
            results = train(recipe, output)
    except KeyboardInterrupt:
        say(f"\n{where_stopped(output)}")
        raise
    if not is_main():
        return 0
    if arguments.json:
        print_json(results)
    else:
        print(next_steps(recipe, output, results))
    return 0
