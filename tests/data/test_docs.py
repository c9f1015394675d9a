"""The tables in docs/data.md are those of the code."""

import re
from pathlib import Path

import pytest
import yaml

from corelora.data.files import FORMATS
from corelora.data.forms import FORMS
from corelora.data.glue import GLUE
from corelora.data.prompts import PROMPTS
from corelora.recipe.schema import DataPart
from corelora.recipe.tree import read_tree

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def page():
    """The page's text."""
    return PAGE.read_text(encoding="utf-8")


def table(page, head):
    """The rows below a table's head: first cell -> the others."""
    lines = page.split(head)[1].split("\n\n")[0].strip().splitlines()[1:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_form_with_its_columns(page):
    rows = table(page, "| `form` | columns | sets |")
    assert {name: re.findall(r"`(\w+)`", row[0]) for name, row in rows.items()} == {
        name: list(form.columns) for name, form in FORMS.items()
    }


def test_every_glue_task(page):
    rows = table(page, "| `form` | texts | labels | metrics |")
    assert set(rows) == set(GLUE)
    for name, (texts, labels, metrics) in rows.items():
        assert tuple(re.findall(r"`(\w+)`", texts)) == GLUE[name].texts
        assert tuple(metrics.split(", ")) == GLUE[name].metrics
        assert labels == ("a number from 0 to 5" if name == "stsb" else str(len(GLUE[name].labels)))


def test_every_prompt_and_file_ending(page):
    assert set(re.findall(r"^- `(\w+)`: ", page, re.MULTILINE)) == set(PROMPTS)
    assert all(f"`{ending}`" in page for ending in FORMATS)


def test_the_example_is_a_recipes_data(page):
    data = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["data"]
    part, problems = read_tree(DataPart, data)
    assert problems == []
    assert part.form == "metamath"


def test_the_form_from_python_works(page):
    try:
        exec(page.split("```python\n")[1].split("```")[0], {})
        row = {"riddle": "q", "solution": "r"}
        assert [m["content"] for m in FORMS["riddles"].read(row)] == ["q", "r"]
    finally:
        FORMS.remove("riddles")
