"""docs/vision.md says what is so: its recipe is one, its sets are those that are known, its figures are the files'."""

import json
import re

import yaml

from corelora.recipe import Recipe, read_tree
from corelora.train.methods import problems
from corelora.vision.sets import SETS
from vision.helpers import REPOSITORY
from vision.test_classification import TARGETS

PAGE = (REPOSITORY / "docs" / "vision.md").read_text()


def table(header):
    """Rows of the table under a header line, their cells without marks."""
    lines = PAGE.split(header)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_its_recipe_is_one():
    """Every key is one, and the method can be built."""
    [block] = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    recipe, found = read_tree(Recipe, yaml.safe_load(block))
    assert found == []
    assert problems(recipe.method) == []


def test_its_sets_are_the_known_ones():
    """With their prompts."""
    assert {row[0]: row[1] for row in table("| `data.form` | prompt | names |")} == {
        name: known.template for name, known in SETS.items()
    }


def test_its_targets_are_those_that_are_tested():
    """A row a kind of model."""
    rows = table("| model | `target_modules` |")
    assert [yaml.safe_load(row[1]) for row in rows] == [
        TARGETS[k] for k in ("vit", "convnext", "resnet", "efficientnet")
    ]


def test_its_files_exist_and_its_figures_are_theirs():
    """Paths in the text, and the run that the picture shows."""
    for path in re.findall(r"(?:recipes|benchmarks)/[\w./-]+\.(?:yaml|py)", PAGE):
        assert (REPOSITORY / path).is_file(), path
    for path in re.findall(r"\]\(([\w./-]+)\)", PAGE):
        assert (REPOSITORY / "docs" / path).is_file(), path
    run = json.loads((REPOSITORY / "docs" / "results" / "vision-head-cpu.json").read_text())
    assert f"{100 * run['test_accuracy']:.1f} % of 360 test pictures" in PAGE
    assert f"| {run['trained_parameters']:,} | {run['seconds']:.0f} |" in PAGE
