"""`corelora methods`: the methods that are registered, and one of them in full."""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from dataclasses import asdict
from typing import Any

from corelora.adapter import CoreAdapter
from corelora.commands.output import print_json, table
from corelora.layers import LinearView
from corelora.registry import CORES, METHODS
from corelora.spec import CHOICE_NAMES, AdapterSpec, Choices, Method

HELP = "list the methods, or show one in full"
R, K, SIDE = 128, 64, 4096  # of the reference layer whose count the list shows
HEADERS = ["method", "outer", "core", "train", "start", "published has", "trains", f"at {SIDE}, r {R}", "source"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this method's choices, settings and source")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the list, or one method."""
    if arguments.name is not None:
        return _show(METHODS[arguments.name], arguments.json)
    if arguments.json:
        print_json([describe(METHODS[name]) for name in sorted(METHODS)])
        return 0
    rows = [[*row[:-1], textwrap.shorten(row[-1], 36, placeholder=" ...")] for row in method_rows()]
    print(table(HEADERS, rows, left=[h for h in HEADERS if not h.startswith("at ")]))
    print(f"\ni inputs, o outputs, r outer rank, k inner rank; counted for one {SIDE} x {SIDE} layer with k = {K}.")
    print("Next: `corelora methods NAME` shows one method, `corelora plan MODEL` what it costs on a model.")
    return 0


def _show(method: Method, as_json: bool) -> int:
    if as_json:
        print_json(describe(method))
        return 0
    print(_document(method))
    rows = [[name, str(default), str(published)] for name, default, published in _choice_rows(method)]
    print("\n" + table(["choice", "default", "published"], rows, left=["default", "published"]))
    print(f"\ntrains: {formula(method.default)} numbers a layer; {count(method.default):,} at {SIDE} x {SIDE}, r = {R}")
    print(f"default departs from the paper: {method.departures}")
    if method.settings:
        print("the paper's settings: " + ", ".join(f"{k} {v}" for k, v in method.settings.items()))
    print(f'\nNext: CoreLoraConfig(method="{method.name}"), or `corelora plan MODEL --method {method.name}`.')
    return 0


def method_rows() -> list[list[str]]:
    """One row a registered method, under `HEADERS`."""
    rows = []
    for name in sorted(METHODS):
        method, c = METHODS[name], METHODS[name].default
        changed = ", ".join(f"{k} {v}" for k, _, v in _choice_rows(method, changed_only=True)) or "the same"
        cells = [name, c.outer, c.core, " ".join(c.train), c.start, changed, formula(c), f"{count(c):,}", method.paper]
        rows.append(cells)
    return rows


def describe(method: Method) -> dict[str, Any]:
    """A method as plain data."""
    data = asdict(method)
    data["trains"] = formula(method.default)
    data["trained_on_reference_layer"] = count(method.default)
    data["reference_layer"] = {"i": SIDE, "o": SIDE, "r": R, "k": K}
    data["document"] = _document(method)
    return data


def formula(choices: Choices) -> str:
    """How many numbers a layer trains, in letters: "r*i + r*r + o*r"."""
    slots = CORES[choices.core].at(choices.position)[0]
    trained = [s for s in slots if s.part in choices.train]
    return " + ".join(s.rows if s.diagonal else f"{s.rows}*{s.cols}" for s in trained)


def count(choices: Choices) -> int:
    """The same in numbers, on the reference layer."""
    spec = AdapterSpec(choices=choices, r=R, inner_r=K, scale=1.0)
    return CoreAdapter.of(spec, LinearView((SIDE, SIDE))).trained_parameters()


def _choice_rows(method: Method, changed_only: bool = False) -> list[tuple[str, Any, Any]]:
    """(choice, default's, published's)."""
    rows = [(n, _text(getattr(method.default, n)), _text(getattr(method.published, n))) for n in CHOICE_NAMES]
    return [row for row in rows if not changed_only or row[1] != row[2]]


def _text(value: Any) -> Any:
    return " ".join(value) if isinstance(value, tuple) else value


def _document(method: Method) -> str:
    """The docstring of the method's file; title and source for a method that has no file of its own here."""
    module = sys.modules.get(f"corelora.methods.{method.name}")
    return inspect.getdoc(module) or f"{method.title}. {method.paper}."
