"""YAML into a tree of dataclasses. Every mistake is collected, with the key's whole path and the nearest right name."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from corelora.errors import CoreLoraError, nearest, raise_all

Part = TypeVar("Part")


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader, in C where PyYAML has it. 2e-4 is a number, as in YAML 1.2, which PyYAML takes for a text."""


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping without a key that is given twice: PyYAML keeps the last one and says nothing."""
    seen: dict[str, int] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        line = key.start_mark.line + 1
        if seen.setdefault(key.value, line) != line:
            raise yaml.YAMLError(f"key {key.value!r} is given twice, in lines {seen[key.value]} and {line}")
    return loader.construct_mapping(node, deep=True)


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def setting(text: str, default: Any = dataclasses.MISSING, *, choices: Sequence[str] = ()) -> Any:
    """A field of a part: its help text, its default, and the values it may take.

    Args:
        text: what the documents and error messages say about it.
        default: a value; a class (a nested part, list, dict), which is called for each new part; none: required.
        choices: the only values, for a text.
    """
    metadata = {"help": text, "choices": tuple(choices)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load_recipe(kind: type[Part], path: str | Path, overrides: Sequence[str] = ()) -> Part:
    """Read a YAML file, put `a.b=c` overrides over it, and build the tree.

    Args:
        kind: dataclass of the root.
        path: the file. `base: other.yaml` at its top puts it over another file, found relative to it.
        overrides: as after `--set`; the value is read as YAML.

    Raises:
        CoreLoraError: every mistake at once: the file is missing or no YAML, keys that don't exist (with the
            nearest), values of a wrong type, required keys that are missing.
    """
    built, problems = mended(kind, path, overrides)
    raise_all(problems, str(path))
    assert built is not None
    return built


def mended(kind: type[Part], path: str | Path, overrides: Sequence[str] = ()) -> tuple[Part | None, list[str]]:
    """As `load_recipe`, but mistakes inside the file are returned, so that what comes after can be looked at as well.

    Returns:
        The tree, where a value that is wrong is as if it were not given; None where it can't do without. And every
        mistake, one sentence each.

    Raises:
        CoreLoraError: the file is missing or no YAML.
    """
    data = read_yaml(Path(path))
    problems: list[str] = []
    for text in overrides:
        problems += _override(data, text)
    built, found = _read_parts(kind, data, "")
    return built, problems + found


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over the files that its `base` names.

    Raises:
        CoreLoraError: names the file, and for broken YAML the line.
    """
    if path.resolve() in above:
        raise CoreLoraError(f"{path}: `base` leads back to this file")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        guess = nearest(path.name, beside)
        named = f"{above[-1]}: base: " if above else ""
        raise CoreLoraError(f"{named}{path}: no such file.{f' Did you mean {guess}?' if guess else ''}") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise CoreLoraError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise CoreLoraError(f"{path}: a mapping of keys is expected, found {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data
    return merged(read_yaml(path.parent / str(base), (*above, path.resolve())), data)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: mappings are joined key by key, everything else is replaced."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def read_tree(kind: type[Part], data: Mapping[str, Any], where: str = "") -> tuple[Part | None, list[str]]:
    """Build a dataclass from a mapping.

    Returns:
        The object, or None where something is wrong, and what is wrong, one sentence each. A part's own `problems()`,
        where it has one, is asked once all of its values have the right type.
    """
    built, found = _read_parts(kind, data, where)
    return (None if found else built), found


def _read_parts(kind: type[Part], data: Mapping[str, Any], where: str) -> tuple[Part | None, list[str]]:
    """The same, what is wrong left out of the object; None where it can't be made without."""
    hints, fields = _hints(kind), {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    found = [_unknown(where + str(key), str(key), fields) for key in data if key not in fields]
    values: dict[str, Any] = {}
    for name, f in fields.items():
        path = where + name
        if name not in data:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                found.append(f"{path} is missing: {f.metadata.get('help', '')}")
            continue
        choices = f.metadata.get("choices")
        value, wrong = _read_value(hints[name], _switch(data[name], choices), path)
        if choices and not wrong and value is not None and value not in choices:
            guess = nearest(str(value), choices)
            hint = f" Did you mean {guess!r}?" if guess else ""
            wrong = [f"{path}: unknown value {value!r}.{hint} Known: {', '.join(choices)}."]
        found += wrong
        if not wrong or dataclasses.is_dataclass(value):
            values[name] = value
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if not required <= values.keys():
        return None, found
    built = kind(**values)
    own = getattr(built, "problems", None)
    outside = [f"{where}{p}" for p in own()] if own and not found else []
    return (None if outside else built), found + outside


_hints = cache(typing.get_type_hints)


def _switch(value: Any, choices: Sequence[str] | None) -> Any:
    """YAML reads a bare `on` or `off` as a truth value; where they are choices they are words."""
    return ("off", "on")[value] if isinstance(value, bool) and choices and {"off", "on"} <= set(choices) else value


def as_data(part: Any) -> Any:
    """The tree as plain dicts, lists and values, defaults included: what a run folder keeps."""
    return dataclasses.asdict(part)


def as_given(part: Any) -> Any:
    """The tree without what is as it would be if nobody had said anything: a key that is new with a later version, at
    its default, changes nothing here."""
    if not dataclasses.is_dataclass(part):
        return part
    data = {f.name: as_given(getattr(part, f.name)) for f in dataclasses.fields(part)}
    return {name: value for name, value in data.items() if not _is_default(type(part), name, value)}


def _is_default(cls: type, name: str, value: Any) -> bool:
    given = next(f for f in dataclasses.fields(cls) if f.name == name)
    if given.default_factory is not dataclasses.MISSING:
        return value == as_given(given.default_factory())
    return given.default is not dataclasses.MISSING and value == given.default


def _unknown(path: str, key: str, fields: Mapping[str, Any]) -> str:
    guess = nearest(key, fields)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return f"unknown key {path!r}.{hint} Known here: {', '.join(fields)}."


def _override(data: dict[str, Any], text: str) -> list[str]:
    """Put `a.b=c` into nested mappings; what is wrong with the text itself, if anything."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        return [f"--set {text!r}: write it as key=value, such as optim.lr=2e-4"]
    try:
        parsed = yaml.load(value, Loader) if value.strip() else None
    except yaml.YAMLError:
        return [f"--set {text!r}: {value!r} is not a YAML value"]
    *path, last = key.strip().split(".")
    node = data
    for step in path:
        below = node.get(step)
        if below is None:
            below = node[step] = {}
        if not isinstance(below, dict):
            return [f"--set {text!r}: {step} holds a value, not keys"]
        node = below
    node[last] = parsed
    return []


def _read_value(hint: Any, value: Any, path: str) -> tuple[Any, list[str]]:
    """One value as its type; numbers written as 2e-4, which YAML takes for text, are numbers."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _read_union(inner, value, path)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            return None, [f"{path}: keys are expected below it, got {value!r}"]
        return _read_parts(typing.cast(type, hint), value, f"{path}.")
    if hint is Any:
        return value, []
    if origin is list:
        return _read_list(inner[0], value, path)
    if origin is dict:
        return _read_dict(inner[1], value, path)
    return _read_plain(hint, value, path)


def _read_union(options: tuple[Any, ...], value: Any, path: str) -> tuple[Any, list[str]]:
    if value is None:
        return (None, []) if type(None) in options else (None, [f"{path}: a value is expected"])
    options = tuple(o for o in options if o is not type(None))
    results = [_read_value(o, value, path) for o in options]
    for option, (read, wrong) in zip(options, results, strict=True):
        if not wrong and (option is Any or typing.get_origin(option) or isinstance(value, option)):
            return read, []
    good = [read for read, wrong in results if not wrong]
    if good:
        return good[0], []
    names = " or ".join(dict.fromkeys(_type_name(o) for o in options))
    return None, results[0][1] if len(options) == 1 else [f"{path}: {names} is expected, got {value!r}"]


def _read_list(inner: Any, value: Any, path: str) -> tuple[Any, list[str]]:
    if not isinstance(value, list):
        return None, [f"{path}: a list is expected, got {value!r}"]
    read = [_read_value(inner, item, f"{path}[{n}]") for n, item in enumerate(value)]
    return [v for v, _ in read], [p for _, wrong in read for p in wrong]


def _read_dict(inner: Any, value: Any, path: str) -> tuple[Any, list[str]]:
    if not isinstance(value, Mapping):
        return None, [f"{path}: keys are expected below it, got {value!r}"]
    read = {str(k): _read_value(inner, v, f"{path}.{k}") for k, v in value.items()}
    return {k: v for k, (v, _) in read.items()}, [p for _, wrong in read.values() for p in wrong]


def _read_plain(hint: Any, value: Any, path: str) -> tuple[Any, list[str]]:
    wrong = [f"{path}: {_type_name(hint)} is expected, got {value!r}"]
    if hint is bool:
        return (value, []) if isinstance(value, bool) else (None, wrong)
    if isinstance(value, bool) or value is None:
        return None, wrong
    if hint in (int, float):
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None, wrong
        if hint is float:
            return (number, []) if math.isfinite(number) else (None, wrong)
        return (int(number), []) if number.is_integer() else (None, wrong)
    if hint is str:
        return (str(value), []) if isinstance(value, (str, int, float)) else (None, wrong)
    raise TypeError(f"{path}: a recipe cannot hold {hint!r}")


def _type_name(hint: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain.get(hint) or {list: "a list", dict: "a mapping"}.get(typing.get_origin(hint) or hint, "a mapping")
