"""Tokens a second of FSDP2 on several GPUs of one host against one GPU that holds the model whole.

    python benchmarks/fsdp2.py                  # LLaMA-2-7B shapes, NLoRA r = 128, 8 x 512 tokens a GPU, 2 GPUs
    python benchmarks/fsdp2.py --checkpointing  # where 8 x 512 does not fit
    python benchmarks/fsdp2.py --tiny           # the same code on a CPU, in seconds

Weights are random and in bfloat16: time does not depend on what they are. Each visit is a launch of its own through
torchrun, with one process a GPU; one GPU and several take turns, for as many rounds as are asked for. Prints one JSON
object a visit, and a last one with the ratio: what several GPUs do a second over what one does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from corelora.bench.measure import Device, Spread
from corelora.bench.peers import Ranks, adapt_core
from corelora.bench.shapes import random_model, shape_config
from corelora.kernels.fast import set_fast

TINY = {"model": "tiny", "r": 4, "batch": 2, "length": 16, "steps": 3, "warmup": 1, "rounds": 1, "device": "cpu"}
RATE = 1e-4


@dataclass(frozen=True)
class Request:
    """What is measured."""

    model: str
    method: str
    r: int
    batch: int
    length: int
    steps: int
    warmup: int
    rounds: int
    devices: int
    checkpointing: bool
    keep_gathered: bool
    device: str
    layers: int | None


def main() -> None:
    """Measure, or be one process of a visit."""
    arguments = vars(_parser().parse_args())
    worker, tiny = arguments.pop("worker"), arguments.pop("tiny")
    if worker:
        visit(Request(**json.loads(worker)))
    else:
        compare(Request(**(arguments | (TINY if tiny else {}))))


def compare(request: Request) -> None:
    """Launch the visits in turn and print what came out."""
    speeds: dict[int, list[float]] = {1: [], request.devices: []}
    for turn in range(request.rounds):
        for devices in speeds:
            seen = _launch(request, devices)
            speeds[devices].append(seen["tokens_per_second"])
            print(json.dumps({"kind": "visit", "round": turn, **seen}), flush=True)
    one, many = (median(speeds[n]) for n in (1, request.devices))
    summary = {
        "kind": "ratio",
        "devices": request.devices,
        "tokens_per_second_one": round(one, 1),
        "tokens_per_second_many": round(many, 1),
        "ratio": round(many / one, 3),
        "request": asdict(request),
        **Device(request.device).describe(),
    }
    print(json.dumps(summary), flush=True)


def _launch(request: Request, devices: int) -> dict[str, Any]:
    """One visit in processes of its own; what its first process printed last."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    command = [*launcher, __file__, "--worker", json.dumps(asdict(request))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"fsdp2: the visit with {devices} processes failed; its error is above")
    return json.loads(done.stdout.strip().splitlines()[-1])


def visit(request: Request) -> None:
    """Build, shard where there are several processes, warm up, measure; the first process prints."""
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = request.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = Device(request.device)
    set_fast("on")  # on a CPU as on GPUs
    torch.manual_seed(0)  # the same weights everywhere: each process keeps its part of them
    model = _adapted(request)
    if world > 1:
        _shard(model, request, world)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, fused=on_gpu)
    torch.manual_seed(1 + rank)  # other rows on each
    ids = torch.randint(0, model.config.vocab_size, (request.batch, request.length), device=request.device)
    for _ in range(request.warmup):
        _step(model, optimizer, ids)
    device.start_peak()
    dist.barrier()
    device.settle()
    began, losses = time.perf_counter(), []
    times = device.times(lambda: losses.append(_step(model, optimizer, ids)), request.steps)
    dist.barrier()
    seconds = time.perf_counter() - began
    if rank == 0:
        tokens = world * request.batch * request.length * request.steps
        seen = {"devices": world, "sharded": world > 1, "tokens_per_second": round(tokens / seconds, 1)}
        trained = sum(p.numel() for p in learning)
        rest = {"gib": device.peak_gib(), "loss": float(losses[-1]), "trained": trained}
        print(json.dumps({**seen, **Spread.of(times).as_milliseconds(), **rest}), flush=True)
    dist.destroy_process_group()


def _adapted(request: Request) -> Any:
    """The model with its adapters in the base's type, as `corelora bench step` measures it."""
    config = shape_config(request.model, request.layers)
    base = random_model(config, request.device, torch.bfloat16 if request.device == "cuda" else torch.float32)
    model: Any = adapt_core(base, request.method, Ranks(r=request.r, k=max(1, request.r // 4))).get_base_model()
    model.train()
    if request.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _shard(model: Any, request: Request, world: int) -> None:
    """fully_shard in the units that accelerate makes: the embedding, each layer, norm and head, the rest."""
    mesh = init_device_mesh(request.device, (world,))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": not request.keep_gathered}
    body: nn.Module = model.model
    for layer in body.layers:  # type: ignore[union-attr]
        fully_shard(layer, **options)
    fully_shard(model.get_input_embeddings(), **options)
    fully_shard([body.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def _step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama-2-7b", help="a shape that `corelora bench` knows, or a config")
    add("--layers", type=int, help="decoder layers; the model's own if not given")
    add("--method", default="nlora")
    add("--r", type=int, default=128)
    add("--batch", type=int, default=8, help="rows a GPU")
    add("--length", type=int, default=512, help="tokens a row")
    add("--steps", type=int, default=20)
    add("--warmup", type=int, default=5)
    add("--rounds", type=int, default=2)
    add("--devices", type=int, default=2)
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--checkpointing", action="store_true", help="recompute activations")
    add("--keep-gathered", action="store_true", help="layers stay whole between forward and backward: faster, larger")
    add("--tiny", action="store_true", help="tiny sizes on a CPU")
    add("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
