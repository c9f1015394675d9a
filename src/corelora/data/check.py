"""What is wrong with a recipe's data, as far as it can be told quickly and without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from corelora.data.columns import Column
from corelora.data.forms import FORMS, fitting_forms, rename_problems
from corelora.data.glue import GLUE
from corelora.data.prompts import PROMPTS
from corelora.data.sources import Wanted, first_columns, peek
from corelora.errors import unknown_name
from corelora.recipe.schema import DataPart, SourcePart

LOOKED_AT = 20  # first rows of each file; all rows are checked when they are read


def check_data(part: DataPart, task: str | None = None) -> list[str]:
    """Everything that can be known without weights: unknown forms, missing files and columns, bad first rows.

    Args:
        part: the recipe's `data`.
        task: `instruct` or `classify`, where it is known: their forms differ.

    Returns:
        One sentence a problem; empty where nothing is wrong.
    """
    tables: dict[str, Iterable[str]] = {"instruct": FORMS, "classify": GLUE}
    known = list(tables.get(task or "", [*FORMS, *GLUE]))
    if part.form not in known:
        other = " It is a form of the other task." if part.form in [*FORMS, *GLUE] else ""
        return [f"data.form: {unknown_name('form', part.form, known)}{other}", *_source_problems(part)]
    found = []
    if part.form in GLUE and part.packing:
        found.append("data.packing: GLUE rows are not packed; set it to false")
    return found + rename_problems(_columns(part), part.columns) + _source_problems(part)


def _columns(part: DataPart) -> Mapping[str, Column]:
    """The columns of a form; none where the form is unknown."""
    if part.form in FORMS:
        return FORMS[part.form].columns
    return GLUE[part.form].columns if part.form in GLUE else {}


def _source_problems(part: DataPart) -> list[str]:
    sources = [("data.train", part.train), ("data.test", part.test)]
    return [f"{name}: {text}" for name, source in sources if source for text in _one_source(part, source)]


def _one_source(part: DataPart, source: SourcePart) -> list[str]:
    rows, found = peek(source, Wanted(_columns(part), part.columns), LOOKED_AT)
    if part.form in FORMS:
        read, prompt = FORMS[part.form].read, PROMPTS[part.prompt]
        wrong = [(where, prompt.problem(read(row))) for where, row in rows]
        found += [f"{where}: {text}" for where, text in wrong if text][:1]
        found += _fitting(part.form, source) if found and not rows else []
    return found


def _fitting(form: str, source: SourcePart) -> list[str]:
    """A hint, where the columns in a file are those of other forms."""
    forms = fitting_forms(first_columns(source))
    return [f"its columns fit data.form: {' or '.join(forms)}"] if forms and form not in forms else []
