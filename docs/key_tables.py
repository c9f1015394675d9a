"""Tables of the keys that users write, from the classes that read them."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from typing import Any

from corelora.recipe import Recipe


def table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of cells as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def keys(part: type) -> Callable[[], str]:
    """Every key of a part of a file that a user writes."""

    def made() -> str:
        hints = typing.get_type_hints(part)
        rows = []
        for f in dataclasses.fields(part):
            default = "required" if f.default is f.default_factory is dataclasses.MISSING else _default(f)
            what = str(f.metadata["help"]).replace("|", "\\|")
            rows.append([f"`{f.name}`", _kind(hints[f.name], f.metadata.get("choices")), default, what])
        return table(["key", "value", "if not given", "what"], rows)

    return made


def _kind(hint: Any, choices: Any) -> str:
    """A type in a reader's words."""
    if choices:
        return " ".join(f"`{c}`" for c in choices)
    inner = [t for t in typing.get_args(hint) if t is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_kind(t, None) for t in inner)
    if typing.get_origin(hint) is list:
        return "keys, in a list" if dataclasses.is_dataclass(inner[0]) else "a list"
    if typing.get_origin(hint) is dict or hint is Any or dataclasses.is_dataclass(hint):
        return "keys"
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[hint]


def recipe_parts() -> str:
    """All parts of a recipe, each with its keys: whatever the classes have, so that a new part is here at once."""
    sections = [f"## The file\n\n{keys(Recipe)()}"]
    queue = [("", Recipe)]
    while queue:
        path, part = queue.pop(0)
        hints = typing.get_type_hints(part)
        for f in dataclasses.fields(part):
            nested = [t for t in (hints[f.name], *typing.get_args(hints[f.name])) if dataclasses.is_dataclass(t)]
            for below in nested[:1]:
                where = f"{path}{f.name}"
                queue.append((f"{where}.", below))
                sections.append(f"## `{where}`\n\n{below.__doc__.splitlines()[0]}\n\n{keys(below)()}")
    return "\n\n".join(sections)


def _default(f: dataclasses.Field) -> str:
    value = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    if dataclasses.is_dataclass(value):
        return "its own defaults"
    return "" if value in (None, "") else f"`{json.dumps(value)}`"
