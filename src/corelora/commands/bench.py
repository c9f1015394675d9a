"""`corelora bench`: what adapters cost on this machine, measured side by side: steps, start-up, inference, layers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corelora.bench.layers import DEFAULT_NAMES as LAYER_NAMES
from corelora.bench.layers import PASSES, LayersBench, LayersRequest, overall
from corelora.bench.measure import Bench, Emit
from corelora.bench.serve import DEFAULT_NAMES as SERVE_NAMES
from corelora.bench.serve import ServeBench, ServeRequest
from corelora.bench.shapes import DTYPES, SHAPES
from corelora.bench.starts import DEFAULT_NAMES as START_NAMES
from corelora.bench.starts import StartBench, StartRequest
from corelora.bench.step import COMPILE_MODES, DEFAULT_NAMES, MODES, StepBench, StepRequest
from corelora.bench.tables import Table, layers_tables, number, serve_tables, start_tables, step_tables
from corelora.commands.output import table
from corelora.registry import METHODS

HELP = "time and memory of adapters on this machine, side by side"
NAMES_HELP = (
    "peers and methods, commas between; METHOD:reference is its path in plain modules, METHOD:folded has its start in "
    "the base weights, all-methods is each method on both paths"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments, a subcommand for each thing that is measured."""
    parser.epilog = "`corelora bench WHAT --help` has the options of each; all take --json FILE."
    benches = parser.add_subparsers(metavar="WHAT", required=True)
    _add_step(benches.add_parser("step", help="one training step: time and peak memory"))
    _add_serve(benches.add_parser("serve", help="forward passes: a prefill, and one token more"))
    _add_layers(benches.add_parser("layers", help="the fused path against plain modules, layer by layer"))
    _add_init(benches.add_parser("init", help="get_peft_model: seconds, and what decompositions keep"))


def run(arguments: argparse.Namespace) -> int:
    """Run the bench that was asked for.

    Raises:
        CoreLoraError: an unknown name, or a number that can't be.
    """
    return arguments.bench(arguments)


def _add_shapes(parser: argparse.ArgumentParser, model: str, names: tuple[str, ...], rounds: int = 2) -> None:
    add = parser.add_argument
    shapes = ", ".join(SHAPES)
    add("--model", default=model, help=f"{shapes}, a model's folder or config.json (%(default)s)")
    add("--layers", type=int, help="decoder layers, to fit or to try, as if from the middle (the model's)")
    add("--methods", default=",".join(names), metavar="NAMES", help=f"{NAMES_HELP} (%(default)s)")
    add("--rank", type=int, default=128, metavar="R", help="outer rank (%(default)s)")
    add("--inner-rank", type=int, metavar="K", help="inner rank of nested cores (a quarter of R)")
    add("--dtype", default="bfloat16", choices=list(DTYPES), help="of the base and the adapters (%(default)s)")
    add("--device", choices=("cuda", "cpu"), help="where to measure (the GPU where there is one)")
    add("--rounds", type=int, default=rounds, help="visits of each variant, in turn (%(default)s)")
    add("--json", metavar="FILE", help="write JSON lines: the run, each visit, each result")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")


def _add_step(parser: argparse.ArgumentParser) -> None:
    _add_shapes(parser, "llama-2-7b", DEFAULT_NAMES)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[8], help="sequences in a batch, one or several (%(default)s)")
    add("--length", type=int, default=512, help="tokens in a sequence (%(default)s)")
    add("--checkpointing", action="store_true", help="with gradient checkpointing")
    add("--compile", default="off", choices=list(MODES), help="torch.compile (%(default)s)")
    add("--compile-mode", default="default", choices=COMPILE_MODES, help="torch.compile's mode (%(default)s)")
    add("--steps", type=int, default=10, help="timed steps in a visit (%(default)s)")
    add("--warmup", type=int, default=3, help="steps before them (%(default)s)")
    parser.set_defaults(bench=_step)


def _step(arguments: argparse.Namespace) -> int:
    names = ("length", "checkpointing", "compile", "compile_mode", "steps", "warmup")
    own = {key: getattr(arguments, key) for key in names}
    bench = StepBench(StepRequest(**_common(arguments), batches=tuple(arguments.batch), **own))
    results = _measured(bench, arguments.json)
    _print(step_tables(results, bench.describe()))
    _finish(bench.left_out, "docs/cost.md says what the columns mean and what arithmetic allows.")
    return 0


def _add_init(parser: argparse.ArgumentParser) -> None:
    _add_shapes(parser, "llama-2-7b", START_NAMES, rounds=5)
    parser.add_argument(
        "--energy", action="store_true", help="compare decompositions with exact ones, which takes long"
    )
    parser.set_defaults(bench=_init)


def _init(arguments: argparse.Namespace) -> int:
    bench = StartBench(StartRequest(**_common(arguments), energy=arguments.energy))
    results = _measured(bench, arguments.json)
    _print(start_tables(results, bench.describe()))
    _finish(bench.left_out, "`corelora bench step` measures what a step costs once it has started.")
    return 0


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_shapes(parser, "llama-2-7b", SERVE_NAMES)
    add = parser.add_argument
    add("--batch", type=int, default=1, help="sequences served together (%(default)s)")
    add("--length", type=int, default=512, help="tokens of the prefill (%(default)s)")
    add("--steps", type=int, default=20, help="timed passes in a visit (%(default)s)")
    add("--warmup", type=int, default=3, help="passes before them (%(default)s)")
    parser.set_defaults(bench=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    own = {key: getattr(arguments, key) for key in ("batch", "length", "steps", "warmup")}
    bench = ServeBench(ServeRequest(**_common(arguments), **own))
    results = _measured(bench, arguments.json)
    _print(serve_tables(results, bench.describe()))
    _finish(bench.left_out, "`corelora merge` and `corelora export` make what costs nothing or serves anywhere.")
    return 0


def _add_layers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="smollm2", help=f"{', '.join(SHAPES)}, a model's folder or config.json (%(default)s)")
    add("--methods", default=",".join(LAYER_NAMES), metavar="NAMES", help="methods, commas between (%(default)s)")
    add("--rank", type=int, default=128, metavar="R", help="outer rank (%(default)s)")
    add("--inner-rank", type=int, metavar="K", help="inner rank of nested cores (a quarter of R)")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES), help="of the layers")
    add("--tokens", type=int, nargs="+", default=[1, 64, 512], help="rows of the input (%(default)s)")
    add("--device", choices=("cuda", "cpu"), help="where to measure (the GPU where there is one)")
    add("--rounds", type=int, default=2, help="how often the whole is gone through (%(default)s)")
    add("--steps", type=int, default=10, help="timed passes of each path in a round (%(default)s)")
    add("--json", metavar="FILE", help="write JSON lines: the run, each visit, each result")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    parser.set_defaults(bench=_layers)


def _layers(arguments: argparse.Namespace) -> int:
    same = {key: getattr(arguments, key) for key in ("model", "rounds", "steps", "device")}
    ranks = {"r": arguments.rank, "k": _inner(arguments), "names": names_of(arguments.methods)}
    request = LayersRequest(**same, **ranks, dtypes=tuple(arguments.dtype), tokens=tuple(arguments.tokens))
    bench = LayersBench(request)
    results = _measured(bench, arguments.json)
    _print(layers_tables(results, bench.describe()))
    for which in PASSES:
        auto, fused = (number(overall(results, which, figure), 3) for figure in ("auto", "mean"))
        print(f"all together, {which}: auto {auto}, fused {fused}")
    _finish(bench.left_out, "below 1 is faster than plain modules; auto, the default, is the fused path where it pays.")
    return 0


def _inner(arguments: argparse.Namespace) -> int:
    return max(1, arguments.rank // 4) if arguments.inner_rank is None else arguments.inner_rank


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every bench is asked for."""
    same = {key: getattr(arguments, key) for key in ("model", "layers", "dtype", "rounds", "device")}
    return {**same, "names": names_of(arguments.methods), "r": arguments.rank, "k": _inner(arguments)}


def _measured(bench: Bench, path: str | None) -> list[dict[str, Any]]:
    """Run a bench; its lines are printed as they come and, with a path, written to that file too."""
    with _lines(path) as emit:
        emit(bench.describe())
        results = bench.run(emit)
        for result in results:
            emit(result)
        emit({"kind": "left out", "reasons": bench.left_out})
    return results


def names_of(given: str) -> tuple[str, ...]:
    """Names from the command line; "all-methods" stands for every method on both paths."""
    names: list[str] = []
    for name in (n.strip() for n in given.split(",")):
        if name == "all-methods":
            names += [n for method in sorted(METHODS) for n in (method, f"{method}:reference")]
        elif name:
            names.append(name)
    return tuple(names)


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
