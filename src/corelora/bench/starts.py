"""How long adapters take to start: `corelora bench init`.

`get_peft_model` on twins of one model, in interleaved rounds, by the host's clock until the device is done. What a
method does beyond creating its modules is the difference to the same call that leaves the values out, as a load from a
file does. For decompositions, also how much of the best possible they keep, and whether they come out the
same again.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from tqdm.auto import tqdm

from corelora.bench.measure import Device, Emit, Spread
from corelora.bench.peers import Ranks, lora_config
from corelora.bench.published import START_SECONDS, published_ratio
from corelora.bench.shapes import DTYPES, has_weights, random_model, real_model, shape_config, shown_name
from corelora.config import ADAPTER_FORMAT, CoreLoraConfig
from corelora.errors import CoreLoraError, raise_all, unknown_name
from corelora.exportcheck import shared_copy
from corelora.gradients import GradientStats, collect_gradients
from corelora.measured import given_to
from corelora.outer import Outer, floored, truncated_svd
from corelora.registry import METHODS, OUTERS, Registry
from corelora.stats import InputStats, collect_stats
from corelora.tuner_layer import CoreLoraLayer

DEFAULT_NAMES = ("peft_lora", "peft_pissa", "lora", "slora", "nlora", "inttune", "nora", "pissa", "lora_xs")
SOLVERS = ("auto", "randomized")


@dataclass(frozen=True)
class Starter:
    """A start of PEFT's own.

    Attributes:
        title: for tables.
        settings: of its LoraConfig.
        keeps_base: the base weights stay as they are; others subtract the start from them.
    """

    title: str
    settings: dict[str, Any]
    keeps_base: bool = True


STARTERS: Registry = Registry("start")
STARTERS.add("peft_lora", Starter("PEFT LoRA", {}))
STARTERS.add("peft_dora", Starter("PEFT DoRA", {"use_dora": True}))
STARTERS.add("peft_pissa", Starter("PEFT PiSSA, 16 iterations", {"init_lora_weights": "pissa_niter_16"}, False))
STARTERS.add("peft_pissa_exact", Starter("PEFT PiSSA, exact", {"init_lora_weights": "pissa"}, False))
STARTERS.add("peft_olora", Starter("PEFT OLoRA", {"init_lora_weights": "olora"}, False))


@dataclass(frozen=True, kw_only=True)
class StartRequest:
    """What to measure.

    Attributes:
        names: of other libraries' starts (`STARTERS`) and of methods; PEFT LoRA is always measured.
        model: a name of shapes.SHAPES with random weights, or a model's folder with its own.
        layers: another number of layers, random weights only.
        r, k: ranks.
        dtype: of the base and the adapters.
        rounds: how often each is started, after once for warm-up.
        energy: compare decompositions with the exact truncated SVD of each weight, which takes long on a large model.
        device: "cuda" or "cpu"; the GPU where there is one, if None.
    """

    names: tuple[str, ...] = DEFAULT_NAMES
    model: str = "llama-2-7b"
    layers: int | None = None
    r: int = 128
    k: int = 32
    dtype: str = "bfloat16"
    rounds: int = 5
    energy: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        known = [*STARTERS, *METHODS]
        problems = [unknown_name("start or method", n, known) for n in self.names if n not in known]
        problems += [] if self.dtype in DTYPES else [unknown_name("dtype", self.dtype, DTYPES)]
        numbers = {n: getattr(self, n) for n in ("r", "k", "rounds")} | {"layers": self.layers or 1}
        problems += [f"{name} must be at least 1, got {n}." for name, n in numbers.items() if n < 1]
        if self.layers is not None and has_weights(self.model):
            problems.append("layers changes random weights only: leave it out for a folder with weights.")
        raise_all(problems, "bench init")

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names in order, each once, PEFT LoRA first."""
        return tuple(dict.fromkeys(("peft_lora", *self.names)))


class StartBench:
    """The model and what has been measured on it.

    Attributes:
        left_out: why a name is not measured.
        seconds: of each whole start, by name.
        modules: of the same without values.
    """

    def __init__(self, request: StartRequest) -> None:
        self.request = request
        self.device = Device(request.device)
        dtype = DTYPES[request.dtype]
        torch.manual_seed(0)
        self.is_real = has_weights(request.model)
        if self.is_real:
            self.base = real_model(request.model, self.device.kind, dtype)
        else:
            self.base = random_model(shape_config(request.model, request.layers), self.device.kind, dtype)
        self.ranks = Ranks(r=request.r, k=request.k)
        self.left_out: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {}
        self.modules: dict[str, list[float]] = {}
        self.stats, self.gradients = self._stats(), self._gradients()

    def _stats(self) -> InputStats | None:
        """Input statistics where a method wants them: of random tokens through real weights, else random numbers."""
        if not any(o.stats == InputStats.kind for o in self._outers()):
            return None
        if self.is_real:
            return collect_stats(self.base, [self._tokens()])
        generator = torch.Generator().manual_seed(0)
        means = {key: 0.1 + torch.rand(m.in_features, generator=generator) for key, m in self._linears()}
        return InputStats(means, dict.fromkeys(means, 512))

    def _gradients(self) -> GradientStats | None:
        """The same for gradient statistics."""
        reach = max((o.reach for o in self._outers() if o.stats == GradientStats.kind), default=0)
        if not reach:
            return None
        n = reach * self.ranks.r
        if self.is_real:
            ids = self._tokens()
            return collect_gradients(self.base, [{"input_ids": ids, "labels": ids}], n)
        found, generator = GradientStats({}, {}, {}), torch.Generator().manual_seed(0)
        for key, m in self._linears():
            count = min(n, m.out_features, m.in_features)
            found.left[key] = torch.randn(m.out_features, count, generator=generator)
            found.right[key] = torch.randn(count, m.in_features, generator=generator)
            found.singular[key] = torch.ones(count)
        return found

    def _outers(self) -> list[Outer]:
        return [OUTERS[METHODS[n].default.outer] for n in self.request.all_names if n in METHODS]

    def _tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.base.config.vocab_size, (4, 128), generator=generator)

    def _linears(self) -> list[tuple[str, torch.nn.Linear]]:
        return [(key, m) for key, m in self.base.named_modules() if isinstance(m, torch.nn.Linear)]

    def config(self, name: str, **settings: Any) -> Any:
        """The PEFT config that `name` starts with."""
        if name in STARTERS:
            return lora_config(self.ranks, **STARTERS[name].settings)
        kind = OUTERS[METHODS[name].default.outer].stats
        made = {InputStats.kind: self.stats, GradientStats.kind: self.gradients}
        extra: dict[str, Any] = {} if kind is None else {"stats": made[kind]}
        ranks = {"r": self.ranks.r, "inner_r": self.ranks.k, "target_modules": self.ranks.target_modules}
        return CoreLoraConfig(method=name, **ranks, **extra, **settings)

    def started(self, name: str, values: bool = True, **settings: Any) -> tuple[float, Any]:
        """(seconds, adapted twin): one start, by the host's clock.

        Args:
            name: what to start.
            values: False creates the modules only.
            settings: more settings of a method's config.
        """
        # PEFT's other starts can't leave values out; their modules are those of its LoRA.
        config = self.config(name if values or name in METHODS else "peft_lora", **settings)
        on_meta = not values and name in STARTERS
        if name in METHODS and not values:
            config.adapter_format = ADAPTER_FORMAT  # values would come from a file
        keeps_base = name in METHODS or STARTERS[name].keeps_base
        model = shared_copy(self.base) if keeps_base else copy.deepcopy(self.base)
        torch.manual_seed(0)  # what is random follows the seed, so two starts are the same
        return self.device.wall(
            lambda: get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=on_meta)
        )

    def run(self, emit: Emit) -> list[dict[str, Any]]:
        """Measure everything.

        Args:
            emit: is handed one mapping for each start as soon as it is over.

        Returns:
            One mapping for each name, as `results` has them, then one for each decomposition.
        """
        visits = [(turn, name) for turn in range(-1, self.request.rounds) for name in self.request.all_names]
        with tqdm(visits, desc="starting", unit="start", delay=2, leave=False) as bar:
            for turn, name in bar:
                bar.set_postfix_str(name, refresh=False)
                self._visit(turn, name, emit)
        return [*self.results(), *self._decompositions()]

    def _visit(self, turn: int, name: str, emit: Emit) -> None:
        """One start with values and one without; the round -1 is warm-up and is not counted."""
        if name in self.left_out:
            return
        found = {}
        for kind, store in (("modules", self.modules), ("seconds", self.seconds)):
            try:
                found[kind], model = self.started(name, values=kind == "seconds")
            except (CoreLoraError, ValueError) as error:
                self.left_out[name] = str(error)
                return
            del model
            self.device.tidy()
            if turn >= 0:
                store.setdefault(name, []).append(found[kind])
        if turn >= 0:
            emit({"kind": "visit", "round": turn, "name": name, **{k: round(v, 4) for k, v in found.items()}})

    def results(self) -> list[dict[str, Any]]:
        """Seconds of each start (median, p10, p90), of its modules alone, of the rest, and ratios to PEFT LoRA."""
        found = []
        lora = Spread.of(self.seconds["peft_lora"]).median
        for name, seconds in self.seconds.items():
            spread, modules = Spread.of(seconds), Spread.of(self.modules[name]).median
            rest = Spread.of([s - m for s, m in zip(seconds, self.modules[name], strict=True)]).median
            row: dict[str, float | None]
            row = {"seconds": spread.median, "p10": spread.p10, "p90": spread.p90, "modules": modules, "values": rest}
            row |= {"over_peft_lora": spread.median / lora, "published_over_lora": published_ratio(START_SECONDS, name)}
            rounded = {k: None if v is None else round(v, 4) for k, v in row.items()}
            title = (STARTERS.get(name) or METHODS[name]).title
            found.append({"kind": "result", "name": name, "title": title, "n": spread.n, **rounded})
        return found

    # -- decompositions ------------------------------------------------------------------------------------------------

    def _decompositions(self) -> Iterator[dict[str, Any]]:
        """For each measured method that decomposes the weights: the same again?, and with `energy`, how good."""
        names = [n for n in self.seconds if n in METHODS and OUTERS[METHODS[n].default.outer].decomposes]
        for name in names:
            for solver in SOLVERS:
                seconds, model = self.started(name, svd_solver=solver)
                digest = factor_digest(model)
                again = factor_digest(self.started(name, svd_solver=solver)[1])
                row = {"kind": "decomposition", "name": name, "title": METHODS[name].title, "solver": solver}
                row |= {"seconds": round(seconds, 4), "same_again": digest == again}
                if self.request.energy:
                    row |= self._energy(model, solver)
                yield row
                del model
                self.device.tidy()

    def _energy(self, model: Any, solver: str) -> dict[str, Any]:
        """The share of the exact truncated SVD's energy that the solver keeps: of the sum, and of the worst layer."""
        layers = [m for m in model.modules() if isinstance(m, CoreLoraLayer)]
        kept = best = 0.0
        worst = 1.0
        for layer in tqdm(layers, desc="exact", unit="layer", delay=2, leave=False):
            W, spec = layer.weight_access.full(), layer.cores["default"].spec
            d = given_to(self.stats, layer.key, spec)
            own, exact = _energies(W if d is None else W * floored(d.to(W)), spec.r, solver)
            kept, best, worst = kept + own, best + exact, min(worst, own / exact)
        return {"energy": kept / best, "worst_layer": worst}

    def describe(self) -> dict[str, Any]:
        """What was asked for and on which machine: the first line of a file of results."""
        model = shown_name(self.request.model)
        request = asdict(self.request) | {"names": list(self.request.all_names), "model": model}
        weights = "real" if self.is_real else "random"
        return {"kind": "run", "bench": "init", "request": request, "weights": weights, **self.device.describe()}


def factor_digest(model: Any) -> str:
    """A hash of all factors of all adapters, trained and frozen, bit for bit."""
    digest = hashlib.sha256()
    for layer in (m for m in model.modules() if isinstance(m, CoreLoraLayer)):
        for slot, factor in sorted(layer.factors("default").items()):
            for tensor in (t for t in (factor.weight, factor.start) if t is not None):
                digest.update(slot.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _energies(M: Tensor, r: int, solver: str) -> tuple[float, float]:
    """(energy of M[o,i] in the solver's r left directions, energy of its exact top r), computed in float64."""
    U, _, _ = truncated_svd(M, r, solver, torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(U.double()).Q
    exact = torch.linalg.svdvals(M.double())[:r]
    return float((Q.T @ M.double()).square().sum()), float(exact.square().sum())
