"""A recorded pass over adapted layers with and without branches (corelora.kernels.branches), beside the base's own.

    python benchmarks/branches.py >> docs/results/branches-h200.jsonl

LLaMA-2-7B's shapes with 8 x 512 tokens in bfloat16, r = 128, k = 32. Prints one JSON object a method and group of
layers that read one input: microseconds of a forward pass, and of both passes, recorded as CUDA graphs and played in
turns; medians of six turns of ten plays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch import Tensor, nn
from turns import in_turns

from corelora import CoreLoraConfig
from corelora.kernels import branches

HIDDEN, INNER = 4096, 11008
GROUPS = {
    "q k v": (HIDDEN, (HIDDEN,) * 3),
    "o": (HIDDEN, (HIDDEN,)),
    "gate up": (HIDDEN, (INNER,) * 2),
    "down": (INNER, (HIDDEN,)),
}
METHODS = ("slora", "nlora", "nora", "inttune")


class Group(nn.Module):
    """Layers on one input."""

    def __init__(self, i: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for o in widths).requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """y[T,o] of each."""
        return [layer(x) for layer in self.layers]


def main() -> None:
    """Measure every method and group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shrink", type=int, default=1, help="divides both widths, for a trial")
    options = parser.parse_args()
    for name, (i, widths) in GROUPS.items():
        sizes = i // options.shrink, tuple(o // options.shrink for o in widths)
        for method in METHODS:
            print(json.dumps({"layers": name, "method": method, **measure(method, *sizes, options.tokens)}), flush=True)


def measure(method: str, i: int, widths: tuple[int, ...], tokens: int) -> dict[str, float]:
    """Microseconds of each variant."""
    new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, dys = new(tokens, i).requires_grad_(), [new(tokens, o) for o in widths]
    base = Group(i, widths).to("cuda", torch.bfloat16)
    plays = {f"base {name}": play for name, play in recorded(base, x, dys).items()}
    config = CoreLoraConfig(method=method, r=128, target_modules="all-linear", stats="weight", init_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model
    for label, streams in {"one stream": 0, "branches": branches.STREAMS}.items():
        with patch.object(branches, "STREAMS", streams):
            plays |= {f"{label} {name}": play for name, play in recorded(model, x, dys).items()}
    return in_turns(plays)


def recorded(model: nn.Module, x: Tensor, dys: list[Tensor]) -> dict[str, Callable[[], None]]:
    """What plays a forward pass and both passes again."""
    learned = [p for p in model.parameters() if p.requires_grad]

    def forward() -> Any:
        return model(x)

    def both() -> Any:
        return torch.autograd.grad(model(x), [x, *learned], dys)

    return {"forward": graph_of(forward), "both": graph_of(both)}


def graph_of(work: Callable[[], Any]) -> Callable[[], None]:
    """Plays the recorded work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # layers that read one input are found; kernels are chosen
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def play(kept: Any = kept) -> None:
        graph.replay()

    return play


if __name__ == "__main__":
    main()
