"""Whether the fused path pays on this device: `corelora bench layers`.

Each shape of linear layer that a model has, adapted by each method, forward and backward (and forward alone), on the
fused path, in plain modules and as "auto" chooses between them, in turn. The figures are the geometric means over
shapes of fused over plain and of auto over plain.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from corelora.bench.measure import Device, Emit, Spread
from corelora.bench.peers import PATHS, Ranks, core_config
from corelora.bench.shapes import DTYPES, shape_config, shown_name
from corelora.errors import CoreLoraError, raise_all, unknown_name
from corelora.kernels.fast import fast_path
from corelora.plan import build_on_meta
from corelora.registry import METHODS

DEFAULT_NAMES = ("inttune", "nora", "lora", "slora", "nlora", "lora_xs")
PASSES = ("forward and backward", "forward")
MODES = {**PATHS, "auto": "auto"}
SHORT = 32  # tokens: passes of fewer are timed together, as many as make this number
Key = tuple[str, str, int, str]  # method, dtype, tokens, pass


@dataclass(frozen=True, kw_only=True)
class LayersRequest:
    """What to measure.

    Attributes:
        names: of methods.
        model: whose shapes; a name of shapes.SHAPES, or where a config is.
        dtypes: of the layers, one or several.
        tokens: rows of the input, one or several numbers.
        r, k: ranks.
        rounds: how often the whole is gone through.
        steps: timed passes of each path in a round, in turn.
        warmup: passes of each path before them.
        device: "cuda" or "cpu"; the GPU where there is one, if None.
    """

    names: tuple[str, ...] = DEFAULT_NAMES
    model: str = "smollm2"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    tokens: tuple[int, ...] = (1, 64, 512)
    r: int = 128
    k: int = 32
    rounds: int = 2
    steps: int = 10
    warmup: int = 2
    device: str | None = None

    def __post_init__(self) -> None:
        problems = [METHODS.miss(name) for name in self.names]
        problems += [None if d in DTYPES else unknown_name("dtype", d, DTYPES) for d in self.dtypes]
        numbers = {n: getattr(self, n) for n in ("r", "k", "rounds", "steps")} | {f"tokens {t}": t for t in self.tokens}
        problems += [None if n >= 1 else f"{name} must be at least 1, got {n}." for name, n in numbers.items()]
        lists = {"method": self.names, "dtype": self.dtypes, "number of tokens": self.tokens}
        problems += [None if given else f"name at least one {what}." for what, given in lists.items()]
        raise_all([p for p in problems if p], "bench layers")


class _Layers(nn.Module):
    """One linear layer of each shape, all called with their own input."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        for n, (o, i) in enumerate(shapes):
            self.add_module(f"layer{n}", nn.Linear(i, o, bias=False))


def layer_shapes(model: str) -> list[tuple[int, int]]:
    """The different shapes (o, i) of a model's linear layers but the output embeddings, in their order."""
    built: Any = build_on_meta(shape_config(model, 1))
    head = built.get_output_embeddings()
    layers = [m for m in built.modules() if isinstance(m, nn.Linear) and m is not head]
    return list(dict.fromkeys((m.out_features, m.in_features) for m in layers))


class LayersBench:
    """The shapes, and what has been measured on them.

    Attributes:
        left_out: why a method is not measured.
        times: milliseconds of each pass, by what is measured, shape and path.
    """

    def __init__(self, request: LayersRequest) -> None:
        self.request = request
        self.device = Device(request.device)
        self.shapes = layer_shapes(request.model)
        self.left_out: dict[str, str] = {}
        self.times: dict[Key, dict[tuple[int, int], dict[str, list[float]]]] = {}

    def run(self, emit: Emit) -> list[dict[str, Any]]:
        """Measure everything.

        Args:
            emit: is handed one mapping for each round, method and type as soon as it is over.

        Returns:
            One mapping for each method, type, number of tokens and pass.
        """
        request = self.request
        visits = list(product(range(request.rounds), request.dtypes, request.names))
        with tqdm(visits, desc="measuring", unit="visit", delay=2, leave=False) as bar:
            for turn, dtype, name in bar:
                bar.set_postfix_str(f"{name}, {dtype}", refresh=False)
                if self._visit(name, dtype):
                    emit({"kind": "visit", "round": turn, "name": name, "dtype": dtype})
        return self.results()

    def _adapted(self, name: str, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        model = _Layers(self.shapes).to(self.device.kind, dtype)
        config = core_config(name, Ranks(r=self.request.r, k=self.request.k, target_modules=r"layer\d+"))
        config.init_weights = False
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=False).train()
        except CoreLoraError as error:
            self.left_out[name] = str(error)
            return None

    def _visit(self, name: str, dtype: str) -> bool:
        """All passes of one method in one type; False where it can't be made."""
        model = self._adapted(name, DTYPES[dtype])
        if model is None:
            return False
        for tokens, which in product(self.request.tokens, PASSES):
            self._measure(model, (name, dtype, tokens, which))
        return True

    def _measure(self, model: Any, key: Key) -> None:
        """All paths in turn on every shape."""
        _, dtype, tokens, which = key
        passes = max(1, SHORT // tokens)
        for n, shape in enumerate(self.shapes):
            layer = model.get_submodule(f"base_model.model.layer{n}")
            x = torch.randn(1, tokens, shape[1], device=self.device.kind, dtype=DTYPES[dtype])
            work = partial(_PASSES[which], layer, x)
            store = self.times.setdefault(key, {}).setdefault(shape, {path: [] for path in MODES})
            for turn in range(self.request.warmup + self.request.steps):
                for path, mode in MODES.items():
                    took = self._timed(work, mode, passes)
                    store[path] += [took] if turn >= self.request.warmup else []

    def _timed(self, work: Callable[[], Any], mode: str, passes: int) -> float:
        with fast_path(mode):
            work()  # in a model the layer before took the same path: its code is in the caches, not the other path's
            return self.device.time(lambda: [work() for _ in range(passes)]) / passes

    def results(self) -> list[dict[str, Any]]:
        """For each method, type, number of tokens and pass: fused and auto over plain by shape, and their means."""
        found = []
        for (name, dtype, tokens, which), by_shape in self.times.items():
            row = {"kind": "result", "name": name, "title": METHODS[name].title, "dtype": dtype, "tokens": tokens}
            row |= {"pass": which}
            for path, mean, ratios in (("fast", "mean", "ratios"), ("auto", "auto", "auto_ratios")):
                over = _over_plain(by_shape, path)
                row |= {mean: round(statistics.geometric_mean(over.values()), 4), ratios: over}
            found.append(row)
        return found

    def describe(self) -> dict[str, Any]:
        """What was asked for and on which machine: the first line of a file of results."""
        shapes = [f"{o} x {i}" for o, i in self.shapes]
        request = asdict(self.request) | {"model": shown_name(self.request.model)}
        return {"kind": "run", "bench": "layers", "request": request, "shapes": shapes, **self.device.describe()}


def _over_plain(by_shape: dict[tuple[int, int], dict[str, list[float]]], path: str) -> dict[str, float]:
    """The ratio of medians for each shape."""
    found = {}
    for (o, i), times in by_shape.items():
        found[f"{o} x {i}"] = round(Spread.of(times[path]).median / Spread.of(times["reference"]).median, 4)
    return found


def _forward_and_backward(layer: nn.Module, x: Tensor) -> None:
    x.requires_grad_(True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    x.grad = None
    layer.zero_grad(set_to_none=True)


def _forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


_PASSES = dict(zip(PASSES, (_forward_and_backward, _forward), strict=True))


def overall(results: list[dict[str, Any]], which: str, figure: str = "mean") -> float | None:
    """The geometric mean over everything measured of one pass, None where nothing was; "auto" is that of auto."""
    means = [row[figure] for row in results if row["pass"] == which]
    return statistics.geometric_mean(means) if means else None
