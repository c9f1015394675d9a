"""`corelora bench`: what adapters cost on this machine, measured side by side: steps, start-up, inference, layers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corelora.bench.shapes import DTYPES, SHAPES
from corelora.bench.step import DEFAULT_NAMES, MODES, Emit, StepBench, StepRequest
from corelora.bench.tables import Table, step_tables
from corelora.commands.output import table
from corelora.registry import METHODS

HELP = "time and memory of adapters on this machine, side by side"
NAMES_HELP = (
    "peers and methods with commas between; METHOD:reference is its path in plain modules; all-methods for both"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments, a subcommand for each thing that is measured."""
    benches = parser.add_subparsers(metavar="WHAT", required=True)
    _add_step(benches.add_parser("step", help="one training step: time and peak memory"))


def run(arguments: argparse.Namespace) -> int:
    """Run the bench that was asked for.

    Raises:
        CoreLoraError: an unknown name, or a number that can't be.
    """
    return arguments.bench(arguments)


def _add_shapes(parser: argparse.ArgumentParser, model: str, names: tuple[str, ...]) -> None:
    add = parser.add_argument
    shapes = ", ".join(SHAPES)
    add("--model", default=model, help=f"{shapes}, a model's folder or config.json (%(default)s)")
    add("--layers", type=int, help="decoder layers, to fit or to try (the model's)")
    add("--methods", default=",".join(names), metavar="NAMES", help=f"{NAMES_HELP} (%(default)s)")
    add("--rank", type=int, default=128, metavar="R", help="outer rank (%(default)s)")
    add("--inner-rank", type=int, metavar="K", help="inner rank of nested cores (a quarter of R)")
    add("--dtype", default="bfloat16", choices=list(DTYPES), help="of the base and the adapters (%(default)s)")
    add("--device", choices=("cuda", "cpu"), help="where to measure (the GPU where there is one)")
    add("--rounds", type=int, default=2, help="visits of each variant, in turn (%(default)s)")
    add("--json", metavar="FILE", help="write JSON lines: the run, each visit, each result")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_step(parser: argparse.ArgumentParser) -> None:
    _add_shapes(parser, "llama-2-7b", DEFAULT_NAMES)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[8], help="sequences in a batch, one or several (%(default)s)")
    add("--length", type=int, default=512, help="tokens in a sequence (%(default)s)")
    add("--checkpointing", action="store_true", help="with gradient checkpointing")
    add("--compile", default="off", choices=list(MODES), help="torch.compile (%(default)s)")
    add("--steps", type=int, default=10, help="timed steps in a visit (%(default)s)")
    add("--warmup", type=int, default=3, help="steps before them (%(default)s)")
    parser.set_defaults(bench=_step)


def _step(arguments: argparse.Namespace) -> int:
    request = StepRequest(
        names=names_of(arguments.methods),
        model=arguments.model,
        layers=arguments.layers,
        batches=tuple(arguments.batch),
        length=arguments.length,
        r=arguments.rank,
        k=_inner(arguments),
        dtype=arguments.dtype,
        checkpointing=arguments.checkpointing,
        compile=arguments.compile,
        rounds=arguments.rounds,
        steps=arguments.steps,
        warmup=arguments.warmup,
        device=arguments.device,
    )
    bench = StepBench(request)
    with _lines(arguments.json) as emit:
        emit(bench.describe())
        results = bench.run(emit)
        for result in results:
            emit(result)
        left_out = bench.left_out
        emit({"kind": "left out", "reasons": left_out})
    _print(step_tables(results, bench.describe()))
    _finish(left_out, "docs/cost.md says what the columns mean and what arithmetic allows.")
    return 0


def names_of(given: str) -> tuple[str, ...]:
    """Names from the command line; "all-methods" stands for every method on both paths."""
    names: list[str] = []
    for name in (n.strip() for n in given.split(",")):
        if name == "all-methods":
            names += [n for method in sorted(METHODS) for n in (method, f"{method}:reference")]
        elif name:
            names.append(name)
    return tuple(names)


def _inner(arguments: argparse.Namespace) -> int:
    return max(1, arguments.rank // 4) if arguments.inner_rank is None else arguments.inner_rank


@contextmanager
def _lines(path: str | None) -> Iterator[Emit]:
    """A function that prints one JSON line as it comes and, with a path, writes it to that file too."""
    file = None
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115  (closed below; there may be none)

    def emit(line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if file is not None:
            file.write(text + "\n")
            file.flush()

    try:
        yield emit
    finally:
        if file is not None:
            file.close()


def _print(tables: list[Table]) -> None:
    for title, headers, rows in tables:
        print(f"\n{title}\n\n{table(headers, rows)}")
    print()


def _finish(left_out: dict[str, str], advice: str) -> None:
    for name, reason in left_out.items():
        print(f"not measured: {name}: {reason}")
    print(f"\nNext: {advice}")
