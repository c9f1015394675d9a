"""`corelora compare`: all runs of a study, and its report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from corelora.commands.output import print_json
from corelora.errors import CoreLoraError

HELP = "run a study of methods, ranks, rates, seeds and write its report"
STUDIES = Path("studies")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    add("study", metavar="STUDY", help="a YAML file; docs/compare.md lists its keys")
    add("--output", metavar="FOLDER", help="the study's folder (studies/NAME-OF-THE-FILE)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key for all runs: loop.steps=50")
    add("--data", action="append", default=[], metavar="FOLDER|TASK=PATH", help="local rows for the finalists' suites")
    add("--known", action="append", default=[], metavar="FILE", help="finished runs of other folders: a runs.jsonl")
    add("--jobs", type=int, metavar="N", help="runs at a time on each GPU (as many as fit) or on the CPU (1)")
    add("--minutes", type=float, metavar="N", help="begin no run after so many minutes; those that run are finished")
    add("--retry", action="store_true", help="make failed runs again")
    add("--shard", metavar="I/N", help="only every N-th run, beginning with the I-th from 0: one job of an array")
    add("--keep-models", action="store_true", help="keep the weights of full fine-tuning, one model a run")
    add("--list", action="store_true", help="print the runs and which are done; run nothing")
    add("--dry-run", action="store_true", help="check every recipe of the study; run nothing")
    add("--json", action="store_true", help="print the leading settings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing, write the report, print who leads.

    Raises:
        CoreLoraError: packages that are missing; anything wrong with the study; another process runs it.
    """
    try:  # here, so that the other commands need none of its packages, nor the time to import them
        from corelora.compare.known import keep_runs, take_known
        from corelora.compare.session import Options, check_study, run_study, start_study
        from corelora.compare.tables import leaders_text, list_text, study_data
    except ModuleNotFoundError as error:
        raise CoreLoraError(f"studies need {error.name}. Install: pip install corelora[train,compare]") from None
    _check_numbers(arguments)
    path = Path(arguments.study)
    options = Options(
        jobs=arguments.jobs,
        retry=arguments.retry,
        shard=_shard(arguments.shard),
        keep_models=arguments.keep_models,
        minutes=arguments.minutes,
    )
    output = Path(arguments.output or STUDIES / path.stem)
    folder = start_study(path, output, arguments.set, arguments.data)
    if arguments.list:
        print(list_text(folder))
        return 0
    if arguments.dry_run:
        print(f"{check_study(folder)} different recipes, nothing is wrong. Next: {folder.command}")
        return 0
    if arguments.known:
        folder.save()  # before its runs: a folder without it would be a stranger's
        taken = take_known(output, [Path(file) for file in arguments.known])
        print(f"{taken} finished runs taken from {', '.join(arguments.known)}", file=sys.stderr)
    whole = run_study(folder, options, (lambda text: None) if arguments.json else print)
    keep_runs(folder)
    if arguments.json:
        print_json(study_data(folder))
        return 0
    print(f"\n{leaders_text(folder)}")
    if not whole:
        why = "This shard is done; runs of others" if arguments.shard else "Time is up; runs"
        print(f"\n{why} are still missing. Go on with: {folder.command}")
        return 0
    print(f"\nNext: corelora report {folder.root}")
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.jobs is not None and arguments.jobs < 1:
        raise CoreLoraError(f"--jobs {arguments.jobs}: at least 1 is expected")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise CoreLoraError(f"--minutes {arguments.minutes:g}: more than 0 is expected")


def _shard(text: str | None) -> tuple[int, int] | None:
    """(n, of) out of `n/of`."""
    if text is None:
        return None
    n, slash, of = text.partition("/")
    if not slash or not n.isdigit() or not of.isdigit() or not int(n) < int(of):
        raise CoreLoraError(f"--shard {text}: write it as I/N with I from 0 to N - 1, such as 0/8")
    return int(n), int(of)
