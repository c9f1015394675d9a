"""Time and memory of a training step, side by side: `corelora bench step`.

All variants live in one process around one frozen model and are visited in interleaved rounds, each in an order of its
own, so that a drift of the machine's clock falls on all of them and none always follows the same neighbour. What a
variant trains waits on the CPU between its visits, so that peak memory is that of one variant alone. Ratios are to the
frozen base that passes gradients to its input, in the same run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from corelora.bench.measure import GIB, Device, Emit, Spread
from corelora.bench.peers import BASE, Peer, Ranks, find_peer
from corelora.bench.published import TRAINING_SECONDS, published_ratio
from corelora.bench.shapes import DTYPES, random_model, shape_config, shown_name
from corelora.errors import CoreLoraError, raise_all, unknown_name
from corelora.exportcheck import shared_copy
from corelora.fold import fold, unfold
from corelora.tuner_layer import CoreLoraLayer

_OTHERS = ("peft_lora", "peft_lora_fp32", "peft_dora", "liger")
DEFAULT_NAMES = (BASE, *_OTHERS, "inttune", "nora", "lora", "slora", "nlora", "nlora:folded")
MODES = {"off": (False,), "on": (True,), "both": (False, True)}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
RECORDED = ("reduce-overhead", "max-autotune")  # those with CUDA graphs
RATE = 1e-5
OUT_OF_MEMORY = "out of memory"
LEARNT = 1e-3  # standard deviation of what would start at zero
Cell = tuple[str, bool, int]  # name, compiled, batch


@dataclass(frozen=True, kw_only=True)
class StepRequest:
    """What to measure.

    Attributes:
        names: of peers and methods (peers.py); the base is always measured.
        model: a name of shapes.SHAPES, or where a config is.
        layers: another number of layers than the model's. They stand for as many in its middle: adapters pass on
            a gradient to the input, too, which the first layer of a whole model spares them.
        batches: sequences in a batch, one or several.
        length: tokens in a sequence.
        r, k: ranks.
        dtype: of the base and the adapters.
        checkpointing: with gradient checkpointing (not reentrant).
        compile: "off", "on" or "both".
        compile_mode: torch.compile's, of COMPILE_MODES; with "reduce-overhead" the host launches whole graphs.
        rounds: visits of each variant.
        steps: timed steps in a visit.
        warmup: steps before them.
        device: "cuda" or "cpu"; the GPU where there is one, if None.
    """

    names: tuple[str, ...] = DEFAULT_NAMES
    model: str = "llama-2-7b"
    layers: int | None = None
    batches: tuple[int, ...] = (8,)
    length: int = 512
    r: int = 128
    k: int = 32
    dtype: str = "bfloat16"
    checkpointing: bool = False
    compile: str = "off"
    compile_mode: str = "default"
    rounds: int = 2
    steps: int = 10
    warmup: int = 3
    device: str | None = None

    def __post_init__(self) -> None:
        problems = [_problem_of(name) for name in self.names]
        for kind, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("value of compile", self.compile, MODES),
            ("compile mode", self.compile_mode, COMPILE_MODES),
        ):
            problems.append(None if value in known else unknown_name(kind, value, known))
        numbers = {k: getattr(self, k) for k in ("length", "r", "k", "rounds", "steps")}
        numbers |= {f"batch {b!r}": b for b in self.batches} | ({} if self.layers is None else {"layers": self.layers})
        problems += [None if n >= 1 else f"{name} must be at least 1, got {n}." for name, n in numbers.items()]
        problems.append(None if self.batches else "name at least one batch size.")
        problems.append(None if self.warmup >= 0 else f"warmup must be at least 0, got {self.warmup}.")
        raise_all([p for p in problems if p], "bench step")

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names in order, each once, the base first."""
        return tuple(dict.fromkeys((BASE, *self.names)))


def _problem_of(name: str) -> str | None:
    try:
        find_peer(name)
    except CoreLoraError as error:
        return str(error)
    return None


@dataclass
class Variant:
    """One peer on its twin of the model, eager or compiled.

    Attributes:
        model: what is called: the inner causal language model, adapters inside.
        optimizer: None where nothing learns.
        passes: a gradient goes to the input, too: always where nothing learns.
        own: the tensors that are not the base model's.
        stays: on its device between visits: a recorded graph reads its tensors where they were.
        graph_breaks: reasons that torch.compile gave for breaking the graph, each with a count; None where eager.
    """

    name: str
    peer: Peer
    compiled: bool
    model: Any
    optimizer: torch.optim.Optimizer | None
    passes: bool
    own: list[Tensor] = field(default_factory=list)
    stays: bool = False
    graph_breaks: dict[str, int] | None = None

    def cell(self, batch: int) -> Cell:
        """Where its figures of a batch size are kept."""
        return self.name, self.compiled, batch

    @property
    def trained(self) -> int:
        """How many numbers learn."""
        return 0 if self.optimizer is None else sum(p.numel() for g in self.optimizer.param_groups for p in g["params"])

    @property
    def tensors(self) -> list[Tensor]:
        """Its factors and the optimiser's states."""
        states = [] if self.optimizer is None else [s for v in self.optimizer.state.values() for s in v.values()]
        return [*self.own, *(s for s in states if isinstance(s, Tensor))]

    def move(self, device: str) -> None:
        """Bring what belongs to this variant alone to a device: its factors and the optimiser's states."""
        if self.stays:
            return
        for tensor in self.tensors:
            tensor.data = tensor.data.to(device)
        for module in self.model.modules():
            if isinstance(module, CoreLoraLayer):
                module.forget_forms()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """With its start in the base weights, where the peer says so."""
        if self.peer.folds:
            fold(self.model)
        try:
            yield
        finally:
            unfold(self.model)

    def step(self, ids: Tensor) -> None:
        """Forward, backward and, where something learns, the optimiser."""
        given: dict[str, Tensor] = {"input_ids": ids}
        if self.passes:
            given = {"inputs_embeds": self.model.get_input_embeddings()(ids).detach().requires_grad_(True)}
        self.model(**given, labels=ids).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class StepBench:
    """The model, its variants and what has been measured on them.

    Attributes:
        left_out: why a name is not measured, by name (and " compiled").
        times: milliseconds of each step, by cell.
        peaks: GiB at the peak, by cell; None on a CPU.
    """

    def __init__(self, request: StepRequest) -> None:
        self.request = request
        self.device = Device(request.device)
        self.dtype = DTYPES[request.dtype]
        config = shape_config(request.model, request.layers)
        torch.manual_seed(0)
        self.base = random_model(config, self.device.kind, self.dtype)
        shape = (max(request.batches), request.length)
        self.ids = torch.randint(0, config.vocab_size, shape, device=self.device.kind)
        self.left_out: dict[str, str] = {}
        self.times: dict[Cell, list[float]] = {}
        self.peaks: dict[Cell, float | None] = {}
        self.variants = list(self._variants())

    def _variants(self) -> Iterator[Variant]:
        for compiled in MODES[self.request.compile]:
            bar = tqdm(self.request.all_names, desc="building", unit="variant", delay=2, leave=False)
            for name in bar:
                variant = self._built(name, compiled)
                if variant is not None:
                    yield variant

    def _built(self, name: str, compiled: bool) -> Variant | None:
        """The variant, waiting on the CPU; None, with a reason in `left_out`, where it can't be had."""
        peer, request = find_peer(name), self.request
        missing = peer.missing()
        if missing is not None:
            self.left_out[name] = missing
            return None
        try:
            adapted = peer.adapt(shared_copy(self.base), Ranks(r=request.r, k=request.k))
        except (CoreLoraError, ValueError) as error:
            self.left_out[name] = str(error)
            return None
        model: Any = adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted
        model.train()
        if request.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if compiled:
            model.compile(dynamic=False, mode=request.compile_mode)
        learning = [p for p in model.parameters() if p.requires_grad]
        _leave_zero(learning)
        optimizer = torch.optim.AdamW(learning, lr=RATE, fused=self.device.is_gpu) if learning else None
        shared = {id(t) for t in (*self.base.parameters(), *self.base.buffers())}
        own = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in shared]
        stays = compiled and request.compile_mode in RECORDED and self.device.is_gpu
        passes = optimizer is None or request.layers is not None
        variant = Variant(name, peer, compiled, model, optimizer, passes, own, stays)
        variant.move("cpu")
        self.device.tidy()
        return variant

    def run(self, emit: Emit) -> list[dict[str, Any]]:
        """Measure everything.

        Args:
            emit: is handed one mapping for each visit as soon as it is over.

        Returns:
            One mapping for each variant and batch, as `results` has them.
        """
        bar = tqdm(self._visits(), desc="measuring", unit="visit", delay=2, leave=False)
        with bar, _compiling(self.request.compile):
            for turn, variant in bar:
                bar.set_postfix_str(variant.name, refresh=False)
                for seen in self._visit(variant):
                    emit({"kind": "visit", "round": turn, **seen})
        return self.results()

    def _visits(self) -> list[tuple[int, Variant]]:
        """(round, variant) in the order of visits: another one in each round, the same in every process."""
        visits = []
        for turn in range(self.request.rounds):
            order = random.Random(turn).sample(self.variants, len(self.variants))
            visits += [(turn, variant) for variant in order]
        return visits

    def _visit(self, variant: Variant) -> Iterator[dict[str, Any]]:
        """Warm-up and timed steps of one variant, of one batch size after the other: it is moved once for all."""
        try:
            variant.move(self.device.kind)
            with variant.peer.running(self.device.kind, self.dtype), variant.folded():
                for batch in self.request.batches:
                    yield from self._measured(variant, batch)
        except torch.OutOfMemoryError:  # of what it trains alone
            self.left_out |= {_label(variant.cell(batch)): OUT_OF_MEMORY for batch in self.request.batches}
        finally:
            variant.move("cpu")
            self.device.tidy()

    def _measured(self, variant: Variant, batch: int) -> Iterator[dict[str, Any]]:
        """One batch size; nothing where it ran out of memory, now or before."""
        cell = variant.cell(batch)
        label = _label(cell)
        if label in self.left_out:
            return
        try:
            times, peak = self._steps(variant, self.ids[:batch])
        except torch.OutOfMemoryError:
            self.left_out[label] = OUT_OF_MEMORY
            variant.model.zero_grad(set_to_none=True)
            self.device.tidy()
            return
        self.times.setdefault(cell, []).extend(times)
        self.peaks[cell] = peak
        rounded = [round(t, 3) for t in times]
        yield {"name": variant.name, "compiled": variant.compiled, "batch": batch, "ms": rounded, "gib": peak}

    def _steps(self, variant: Variant, ids: Tensor) -> tuple[list[float], float | None]:
        if variant.compiled and variant.graph_breaks is None:
            variant.graph_breaks = _graph_breaks(lambda: variant.step(ids))
        for _ in range(self.request.warmup):
            variant.step(ids)
        self.device.start_peak()
        times = self.device.times(lambda: variant.step(ids), self.request.steps)
        return times, self._own_peak(variant)

    def _own_peak(self, variant: Variant) -> float | None:
        """GiB at the peak, without what others keep on the device."""
        peak = self.device.peak_gib()
        others = [t for v in self.variants if v.stays and v is not variant for t in v.tensors]
        return None if peak is None else peak - sum(t.nbytes for t in others) / GIB

    def results(self) -> list[dict[str, Any]]:
        """What was measured: milliseconds (median, p10, p90), ratios to the base and to PEFT LoRA, peak GiB."""
        found = []
        cells = [(v, v.cell(batch)) for batch in self.request.batches for v in self.variants]
        for variant, (name, compiled, batch) in (one for one in cells if one[1] in self.times):
            spread = Spread.of(self.times[name, compiled, batch])
            breaks = None if variant.graph_breaks is None else sum(variant.graph_breaks.values())
            row = {
                "kind": "result",
                "name": name,
                "title": variant.peer.title,
                "compiled": compiled,
                "batch": batch,
                **spread.as_milliseconds(),
                "ratio": self._over(spread, (BASE, compiled, batch)),
                "over_peft_lora": self._over(spread, ("peft_lora", compiled, batch)),
                "published_over_lora": published_ratio(TRAINING_SECONDS, name),
                "gib": self.peaks[name, compiled, batch],
                "gib_over_base": self._gib_over_base((name, compiled, batch)),
                "trained": variant.trained,
                "graph_breaks": breaks,
            }
            found.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        return found

    def _over(self, spread: Spread, other: Cell) -> float | None:
        return spread.median / Spread.of(self.times[other]).median if other in self.times else None

    def _gib_over_base(self, cell: Cell) -> float | None:
        own, base = self.peaks.get(cell), self.peaks.get((BASE, *cell[1:]))
        return None if own is None or base is None else own - base

    def describe(self) -> dict[str, Any]:
        """What was asked for and on which machine: the first line of a file of results."""
        model = shown_name(self.request.model)
        request = asdict(self.request) | {"names": list(self.request.all_names), "model": model}
        return {"kind": "run", "bench": "step", "request": request, **self.device.describe()}


def _leave_zero(parameters: list[torch.nn.Parameter]) -> None:
    """Small random numbers where a factor starts at zero, as after some training.

    A GPU that is short of power runs products with zeros, or with the few values of one step of AdamW, at a higher
    clock: a variant that starts at zero would look faster than it is from the first hundred steps on.
    """
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            if not p.any():
                p.copy_(LEARNT * torch.randn(p.shape, generator=made))


@contextmanager
def _compiling(mode: str) -> Iterator[None]:
    """How every variant is compiled.

    There is room for all: beyond the eighth, PyTorch would quietly run them uncompiled. And inductor does not time two
    forms of each elementwise kernel to take the faster: one timing is noise enough that a variant now and then has the
    slower form of a kernel of the model's own, for the whole run (silu(gate) * up: by a half slower).
    """
    if mode == "off":
        yield
        return
    from torch._inductor import config as inductor  # takes a second to import, which eager runs do without

    limits = {"recompile_limit": 1024, "accumulated_recompile_limit": 4096, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits), inductor.patch({"triton.autotune_pointwise": False}):
        yield


def _graph_breaks(work: Callable[[], Any]) -> dict[str, int]:
    """Why torch.compile broke the graph of what `work` calls for the first time: reasons with counts."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    work()
    return dict(counters["graph_break"])


def _label(cell: Cell) -> str:
    name, compiled, batch = cell
    return f"{name}{' compiled' if compiled else ''}, batch {batch}"
