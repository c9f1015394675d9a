"""`corelora report`: one readable page of a run and its evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path

from corelora.commands.output import print_json
from corelora.errors import CoreLoraError

HELP = "write a run's scores, samples and curve as one HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("folder", metavar="RUN", help="a run folder, or the folder that an evaluation wrote into")
    parser.add_argument("--json", action="store_true", help="print the page's path as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Write the page.

    Raises:
        CoreLoraError: there is nothing to report.
    """
    try:
        from corelora.evaluate.page import report
    except ModuleNotFoundError as error:
        raise CoreLoraError(f"reports need {error.name}. Install: pip install corelora[train,evaluate]") from None
    page = report(Path(arguments.folder))
    if arguments.json:
        print_json({"page": str(page)})
        return 0
    print(f"written: {page}\nOpen it in a browser: it is one file and needs no network.")
    return 0
