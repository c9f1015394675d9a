"""`corelora plan`: trained parameters, file size and memory of each method on a model, before anything is loaded."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import yaml

from corelora.commands.output import gibibytes, megabytes, print_json, table
from corelora.errors import CoreLoraError
from corelora.plan import DTYPES, MethodPlan, PlanRequest, make_plan
from corelora.plan_memory import OPTIMIZERS, RESERVE, Step
from corelora.registry import METHODS
from corelora.spec import VARIANTS

HELP = "what each method would cost on a model: parameters, file, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, a config.json, a model type such as llama, or a name on the hub")
    add("--method", default="lora,slora,nlora,inttune,nora", help="names with commas between, or all (%(default)s)")
    add("--variant", default="default", choices=VARIANTS, help="of the methods' choices (%(default)s)")
    add("--r", type=int, default=16, help="outer rank (%(default)s)")
    add("--inner-r", type=int, metavar="K", help="inner rank (half of r)")
    add("--target", nargs="+", default=["all-linear"], metavar="NAME", help="modules to adapt (all-linear)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of CoreLoraConfig")
    add("--gpu", type=float, default=24, metavar="GIB", help="size of the GPU in GiB (%(default)s)")
    add("--batch", type=int, default=4, help="sequences in a batch (%(default)s)")
    add("--length", type=int, default=512, help="tokens in a sequence, at most the model's positions (%(default)s)")
    add("--dtype", default="bfloat16", choices=list(DTYPES), help="of the base weights (%(default)s)")
    add("--optimizer", default="adamw", choices=list(OPTIMIZERS), help="for its states' size (%(default)s)")
    add("--checkpointing", action="store_true", help="with gradient checkpointing")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="whose computation path is counted (%(default)s)")
    add("--no-memory", action="store_true", help="parameters and files only, which is faster")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        CoreLoraError: no method can be had on this model; otherwise those that can't are named on standard error.
    """
    request = request_of(arguments)
    plans = make_plan(request, memory=not arguments.no_memory)
    problems = _problems(plans)
    if not any(p.trained for p in plans):
        raise CoreLoraError("\n".join(problems))
    for problem in problems:
        print(problem, file=sys.stderr)
    if arguments.json:
        print_json({"model": request.model, "dtype": request.dtype, "plans": [p.as_dict() for p in plans]})
    else:
        _print(request, plans)
    return 0


def request_of(arguments: argparse.Namespace) -> PlanRequest:
    """The command line as a request.

    Raises:
        CoreLoraError: an unknown method, a setting that is not KEY=VALUE, or a number that can't be.
    """
    settings = dict(_setting(given) for given in arguments.set)
    names = sorted(METHODS) if arguments.method == "all" else [n for n in arguments.method.split(",") if n]
    target = arguments.target
    return PlanRequest(
        model=arguments.model,
        methods=tuple(n.strip() for n in names),
        variant=arguments.variant,
        r=arguments.r,
        inner_r=arguments.inner_r,
        target_modules="all-linear" if target == ["all-linear"] else target,
        settings=settings,
        dtype=arguments.dtype,
        gpu=arguments.gpu,
        step=Step(
            batch=arguments.batch,
            length=arguments.length,
            optimizer=arguments.optimizer,
            checkpointing=arguments.checkpointing,
            device=arguments.device,
        ),
    )


def _setting(given: str) -> tuple[str, Any]:
    """`KEY=VALUE` as a pair; the value is YAML: a number, a word, a list in brackets."""
    key, sign, value = given.partition("=")
    mistake = f"--set takes KEY=VALUE with a value in YAML, got {given!r}"
    if not sign:
        raise CoreLoraError(mistake)
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise CoreLoraError(mistake) from None


def _problems(plans: list[MethodPlan]) -> list[str]:
    """One line a problem, after the names of the methods that have it."""
    methods: dict[str, list[str]] = {}
    for plan in plans:
        if plan.problem:
            methods.setdefault(plan.problem, []).append(plan.method)
    return [f"{', '.join(names)}: {problem}" for problem, names in methods.items()]


def _print(request: PlanRequest, plans: list[MethodPlan]) -> None:
    good = [p for p in plans if p.trained is not None]
    k = good[0].inner_r
    print(f"{request.model}, {request.dtype} weights, r = {request.r}, k = {k}, {good[0].modules} adapted modules\n")
    headers = ["method", "trained", "file", f"file in {request.dtype}", "outer factors left out"]
    sizes = [(p.file_bytes, p.file_bytes_native, p.file_bytes_small) for p in good]
    rows = [[p.method, f"{p.trained:,}", *map(megabytes, s)] for p, s in zip(good, sizes, strict=True)]
    print(table(headers, rows))
    print("\nfile: trained factors in float32, as PEFT keeps and saves them. 1 MB = 10^6 bytes, header included.")
    if any(p.memory for p in good):
        _print_memory(request, [p for p in good if p.memory])
    if all(p.fits is False for p in good):
        print("\nNext: nothing fits. Try --checkpointing, a smaller --batch or --length, or a larger --gpu.")
        return
    best = min((p for p in good if p.fits is not False), key=lambda p: p.trained or 0).method
    print(f'\nNext: CoreLoraConfig(method="{best}", r={request.r}); `corelora methods {best}` says what it does.')


def _print_memory(request: PlanRequest, plans: list[MethodPlan]) -> None:
    step = request.step
    extra = ", gradient checkpointing" if step.checkpointing else ""
    length = plans[0].length
    batch = f"batch {step.batch}" if length is None else f"{step.batch} x {length} tokens"
    print(f"\nPeak of one training step in GiB, {batch}, {step.optimizer}{extra}:\n")
    headers = ["method", "weights", "adapter", "optimizer", "logits", "activations", "peak"]
    headers += [f"fits {request.gpu:g} GiB", "largest batch"]
    rows = []
    for plan in plans:
        m = plan.memory
        assert m is not None
        parts = (m.weights, m.trained + m.outer + m.gradients, m.optimizer, m.logits, m.activations, m.peak)
        fits = "yes" if plan.fits else "no"
        rows.append([plan.method, *(gibibytes(p) for p in parts), fits, str(plan.largest_batch)])
    print(table(headers, rows))
    print(f"\nA GPU keeps {RESERVE / 2**30:g} GiB for its context, workspaces and fragmentation.")
    print("docs/cost.md says what else is counted and what is not.")
