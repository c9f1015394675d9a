"""What an adapter costs when nothing learns: `corelora bench serve`.

Forward passes without gradients, in interleaved rounds: a prefill of whole sequences, and one token more on top of a
filled cache of keys and values. A method is measured as it is (`NAME`, `NAME:reference`), merged into the weights
(`NAME:merged`) and as the plain PEFT LoRA that `corelora export` writes (`NAME:exported`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from corelora.bench.measure import Device, Emit, Spread
from corelora.bench.peers import BASE, PEERS, Peer, Ranks, core_config, find_peer
from corelora.bench.shapes import DTYPES, random_model, shape_config, shown_name
from corelora.errors import CoreLoraError, raise_all, unknown_name
from corelora.export import export_lora
from corelora.exportcheck import shared_copy
from corelora.registry import METHODS
from corelora.tuner_layer import CoreLoraLayer

_METHODS = ("inttune", "nora", "nora:merged", "nora:exported", "slora", "nlora", "nlora:exported")
DEFAULT_NAMES = (BASE, "peft_lora", *_METHODS)
PHASES = ("prefill", "decode")
OTHERS = (BASE, "peft_lora", "peft_dora")  # peers that make sense without training


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """What to measure.

    Attributes:
        names: `base`, PEFT's own, and methods in any of their forms; the base is always measured.
        model, layers, r, k, dtype, rounds, device: as in a StepRequest.
        batch: sequences served together.
        length: tokens of the prefill, and in the cache before the one token more.
        steps: timed passes in a visit.
        warmup: passes before them.
    """

    names: tuple[str, ...] = DEFAULT_NAMES
    model: str = "llama-2-7b"
    layers: int | None = None
    batch: int = 1
    length: int = 512
    r: int = 128
    k: int = 32
    dtype: str = "bfloat16"
    rounds: int = 2
    steps: int = 20
    warmup: int = 3
    device: str | None = None

    def __post_init__(self) -> None:
        problems = [_problem_of(name) for name in self.names]
        problems.append(None if self.dtype in DTYPES else unknown_name("dtype", self.dtype, DTYPES))
        numbers = {n: getattr(self, n) for n in ("batch", "length", "r", "k", "rounds", "steps")}
        numbers |= {} if self.layers is None else {"layers": self.layers}
        problems += [None if n >= 1 else f"{name} must be at least 1, got {n}." for name, n in numbers.items()]
        raise_all([p for p in problems if p], "bench serve")

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names in order, each once, the base first."""
        return tuple(dict.fromkeys((BASE, *self.names)))


def _problem_of(name: str) -> str | None:
    method, _, form = name.partition(":")
    if method in METHODS:
        return None if not form or form in FORMS else unknown_name("form", form, FORMS)
    return None if name in OTHERS else unknown_name("method or peer", name, [*OTHERS, *METHODS])


class ServeBench:
    """The model, its variants and what has been measured on them.

    Attributes:
        left_out: why a name is not measured.
        times: milliseconds of each pass, by phase and name.
    """

    def __init__(self, request: ServeRequest) -> None:
        self.request = request
        self.device = Device(request.device)
        self.dtype = DTYPES[request.dtype]
        self.ranks = Ranks(r=request.r, k=request.k)
        config = shape_config(request.model, request.layers)
        torch.manual_seed(0)
        self.base = random_model(config, self.device.kind, self.dtype)
        self.ids = torch.randint(0, config.vocab_size, (request.batch, request.length + 1), device=self.device.kind)
        self.left_out: dict[str, str] = {}
        self.times: dict[tuple[str, str], list[float]] = {}
        self.variants: dict[str, tuple[Peer, Any]] = {}
        for name in tqdm(request.all_names, desc="building", unit="variant", delay=2, leave=False):
            self._build(name)

    def _build(self, name: str) -> None:
        method, _, form = name.partition(":")
        try:
            if method in METHODS:
                peer = find_peer(f"{method}:reference" if form == "reference" else method)
                model = FORMS[form](self, method)
            else:
                peer = PEERS[name]
                model = peer.adapt(shared_copy(self.base), self.ranks)
        except (CoreLoraError, ValueError) as error:
            self.left_out[name] = str(error)
            return
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.variants[name] = (peer, inner.eval())

    def adapted(self, method: str) -> Any:
        """A copy of the model with the method's adapter, its factors random: a fresh one adds nothing."""
        config = core_config(method, self.ranks)
        config.init_weights = False
        torch.manual_seed(0)  # the same factors in each form of a method
        return get_peft_model(shared_copy(self.base), config, autocast_adapter_dtype=False)

    def merged(self, method: str) -> Any:
        """The adapter merged into weights of its own: the other variants keep the shared ones."""
        model = self.adapted(method)
        for layer in (m for m in model.modules() if isinstance(m, CoreLoraLayer)):
            base: Any = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        model.merge_adapter()
        return model

    def exported(self, method: str) -> Any:
        """The plain PEFT LoRA that `corelora export` writes, loaded by PEFT."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lora"
            export_lora(self.adapted(method), path, for_="peft", check=False)
            where: Any = {"torch_device": self.device.kind, "autocast_adapter_dtype": False}
            return PeftModel.from_pretrained(shared_copy(self.base), path, **where)

    @torch.no_grad()
    def run(self, emit: Emit) -> list[dict[str, Any]]:
        """Measure everything.

        Args:
            emit: is handed one mapping for each visit as soon as it is over.

        Returns:
            One mapping for each phase and name.
        """
        rounds = range(self.request.rounds)
        visits = [(turn, phase, name) for turn in rounds for phase in PHASES for name in self.variants]
        with tqdm(visits, desc="measuring", unit="visit", delay=2, leave=False) as bar:
            for turn, phase, name in bar:
                bar.set_postfix_str(f"{name}, {phase}", refresh=False)
                peer, model = self.variants[name]
                with peer.running(self.device.kind, self.dtype):
                    times = self._passes(model, phase)
                self.times.setdefault((phase, name), []).extend(times)
                emit({"kind": "visit", "round": turn, "phase": phase, "name": name, "ms": [round(t, 3) for t in times]})
        return self.results()

    def _passes(self, model: Any, phase: str) -> list[float]:
        request = self.request
        if phase == "prefill":
            work = lambda: model(input_ids=self.ids[:, :-1], logits_to_keep=1)  # noqa: E731
            again: Callable[[], Any] = lambda: None  # noqa: E731
        else:
            cache = DynamicCache(config=model.config)
            model(input_ids=self.ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            work = lambda: model(input_ids=self.ids[:, -1:], past_key_values=cache, use_cache=True)  # noqa: E731
            again = lambda: cache.crop(-1)  # noqa: E731
        times = []
        for n in range(request.warmup + request.steps):
            took = self.device.time(work)
            again()
            times += [took] if n >= request.warmup else []
        return times

    def results(self) -> list[dict[str, Any]]:
        """Milliseconds of each phase and name (median, p10, p90) and ratios to the base."""
        found = []
        for (phase, name), times in self.times.items():
            spread = Spread.of(times)
            ratio = spread.median / Spread.of(self.times[phase, BASE]).median
            row = {"kind": "result", "phase": phase, "name": name, "title": self._title(name)}
            found.append({**row, **spread.as_milliseconds(), "ratio": round(ratio, 4)})
        return found

    def _title(self, name: str) -> str:
        method, _, form = name.partition(":")
        if method not in METHODS:
            return "base" if name == BASE else PEERS[name].title
        return METHODS[method].title + (f", {FORM_TITLES[form]}" if form else "")

    def describe(self) -> dict[str, Any]:
        """What was asked for and on which machine: the first line of a file of results."""
        model = shown_name(self.request.model)
        request = asdict(self.request) | {"names": list(self.request.all_names), "model": model}
        return {"kind": "run", "bench": "serve", "request": request, **self.device.describe()}


FORMS: dict[str, Callable[[ServeBench, str], Any]] = {
    "": ServeBench.adapted,
    "reference": ServeBench.adapted,
    "merged": ServeBench.merged,
    "exported": ServeBench.exported,
}
FORM_TITLES = {"reference": "plain modules", "merged": "merged", "exported": "exported to PEFT LoRA"}
