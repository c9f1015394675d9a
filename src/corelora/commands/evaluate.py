"""`corelora evaluate`: a run, an adapter or a model on benchmark suites."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from corelora.commands.output import print_json, table
from corelora.errors import CoreLoraError

HELP = "score a run, an adapter or a model on benchmark suites"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    add(
        "subject",
        metavar="RUN_OR_ADAPTER_OR_MODEL",
        help="a run folder, an adapter folder, a model folder or a hub name",
    )
    add("--suite", required=True, metavar="NAME[,NAME...]", help="suites; `--suite list` shows them")
    add("--protocol", metavar="NAME", help="paper or harness (each suite's first one)")
    add("--data", action="append", default=[], metavar="FOLDER|TASK=PATH", help="local rows in place of the hub's")
    add("--output", metavar="FOLDER", help="results go to FOLDER/eval (the run or adapter folder itself)")
    add("--batch-size", type=int, metavar="N", help="samples at one time (what fits on a GPU, 16 on a CPU)")
    add("--limit", type=int, metavar="N", help="only the first N samples of each task")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="type of the weights")
    add("--no-merge", action="store_true", help="keep the adapter beside the weights (vllm always does)")
    add("--backend", default="transformers", choices=("transformers", "vllm"), help="what writes replies")
    add("--against", metavar="RUN", help="another run, for protocols that compare two (mt_bench pairwise)")
    add("--unsafe-code", action="store_true", help="run model-written code even where no sandbox works")
    add("--seed", type=int, default=0, metavar="N", help="of drawn replies")
    add("--json", action="store_true", help="print the scores as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print the scores.

    Raises:
        CoreLoraError: packages that are missing; anything wrong with subject, suites or rows.
    """
    try:  # here, so that the other commands need none of its packages, nor the time to import them
        from corelora.evaluate.job import Settings
        from corelora.evaluate.run import evaluate
        from corelora.evaluate.subject import find_subject
        from corelora.evaluate.suites import load_suite, suite_names, with_data
    except ModuleNotFoundError as error:
        raise CoreLoraError(f"evaluation needs {error.name}. Install: pip install corelora[train,evaluate]") from None
    if arguments.suite == "list":
        suites = [load_suite(name) for name in suite_names()]
        rows = [[s.name, str(s.version), ", ".join(s.protocols), s.about.split(". ")[0]] for s in suites]
        print(table(["suite", "version", "protocols", "about"], rows, left=("protocols", "about")))
        return 0
    suites = with_data([load_suite(name) for name in arguments.suite.split(",")], arguments.data)
    subject = find_subject(arguments.subject, arguments.output, arguments.dtype)
    settings = Settings(
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        merge=not arguments.no_merge,
        unsafe_code=arguments.unsafe_code,
        backend=arguments.backend,
        seed=arguments.seed,
        against=arguments.against,
    )
    say = (lambda text: None) if arguments.json else print
    results = {str(p): json.loads(p.read_text()) for p in evaluate(subject, suites, arguments.protocol, settings, say)}
    if arguments.json:
        print_json({path: {k: v for k, v in r.items() if k != "samples"} for path, r in results.items()})
    else:
        print(_shown(results))
        print(f"\nEvery sample is in the files above. Next: corelora report {Path(subject.folder)}")
    return 0


def _shown(results: dict[str, dict[str, Any]]) -> str:
    rows = [
        [r["suite"], r["protocol"], name, f"{100 * s['value']:.2f}", f"± {100 * s['stderr']:.2f}", str(s["n"])]
        for r in results.values()
        for name, s in r["scores"].items()
    ]
    headers = ["suite", "protocol", "score", "percent", "error", "samples"]
    return "\n" + table(headers, rows, left=("protocol", "score"))
