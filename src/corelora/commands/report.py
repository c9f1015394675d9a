"""`corelora report`: one readable page of a run and its evaluations, or of a study."""

from __future__ import annotations

import argparse
from pathlib import Path

from corelora.commands.output import print_json
from corelora.errors import CoreLoraError

HELP = "write a run's scores, samples and curve, or a study's tables and charts, as one HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument(
        "folder", metavar="RUN_OR_STUDY", help="a run folder, a study's, or what an evaluation wrote into"
    )
    parser.add_argument("--json", action="store_true", help="print the page's path as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Write the page.

    Raises:
        CoreLoraError: there is nothing to report.
    """
    folder = Path(arguments.folder)
    try:
        pages = _study(folder) if (folder / "study.yaml").is_file() else _run(folder)
    except ModuleNotFoundError as error:
        needed = "pip install corelora[train,evaluate,compare]"
        raise CoreLoraError(f"reports need {error.name}. Install: {needed}") from None
    if arguments.json:
        print_json({"page": str(pages[0]), "files": [str(p) for p in pages]})
        return 0
    print("\n".join(f"written: {p}" for p in pages))
    print(f"Open {pages[0].name} in a browser: it is one file and needs no network.")
    return 0


def _run(folder: Path) -> list[Path]:
    from corelora.evaluate.page import report

    return [report(folder)]


def _study(folder: Path) -> list[Path]:
    from corelora.compare.folder import read_study
    from corelora.compare.page import report_study

    return report_study(read_study(folder))
