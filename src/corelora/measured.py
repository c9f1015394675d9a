"""Statistics of a model's layers, which starts read: what all kinds have in common.

Names, files, fingerprints, and whether they serve a model. The kinds are in stats.py (inputs) and gradients.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corelora.errors import CoreLoraError
from corelora.layers import view_of
from corelora.registry import OUTERS, STATS
from corelora.spec import AdapterSpec
from corelora.storage import BaseWeight, backend_of, gathered, wrapped_layer

Batch = Mapping[str, Any] | Tensor  # what a model is run on


class Stats(ABC):
    """Numbers measured on a model's layers, by layer name.

    A kind of statistics registers itself in STATS; an outer start names the kind that it reads (`Outer.stats`).

    Attributes:
        samples: layer name -> a few entries of its weight, which tell whether a model is the same.
    """

    kind: ClassVar[str]
    format: ClassVar[str]  # of the file
    how_to: ClassVar[str]  # what to do where there are none
    samples: dict[str, Tensor]

    @abstractmethod
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """What was measured: name of the quantity -> layer name -> values."""

    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """What else the file says, as JSON has it."""

    @classmethod
    @abstractmethod
    def of(cls, parts: dict[str, dict[str, Tensor]], notes: dict[str, Any], samples: dict[str, Tensor]) -> Self:
        """Statistics of what `parts` and `notes` gave."""

    @abstractmethod
    def given(self, key: str, spec: AdapterSpec) -> Any:
        """What the start of the layer `key` reads."""

    @abstractmethod
    def misfit(self, key: str, shape: tuple[int, int], count: int) -> str | None:
        """Why what was measured on the layer `key` does not fit a weight[o,i], or has fewer triplets than `count`."""

    @property
    def names(self) -> set[str]:
        """The layers that were measured."""
        return set(next(iter(self.parts().values())))

    @property
    def fingerprint(self) -> str:
        """A short hash of names and values."""
        digest = hashlib.sha256()
        for values in self.parts().values():
            for name in sorted(values):
                digest.update(name.encode())
                digest.update(values[name].float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file; it appears whole or not at all.

        Args:
            path: the file's path, `.safetensors` by custom.
        """
        parts = {**self.parts(), "sample": self.samples}
        tensors = {f"{part}/{n}": t.float().contiguous() for part, values in parts.items() for n, t in values.items()}
        metadata = {"format": self.format, **{key: json.dumps(value) for key, value in self.notes().items()}}
        temporary = f"{os.fspath(path)}.tmp"
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):  # only where something broke off
                os.unlink(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read what `save` wrote.

        Raises:
            CoreLoraError: the file is missing, broken, or holds something else.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CoreLoraError(f"statistics {os.fspath(path)}: can't be read ({error}); {cls.how_to}") from None
        if metadata.pop("format", None) != cls.format:
            raise CoreLoraError(f"statistics {os.fspath(path)}: not a file of {cls.kind} statistics; {cls.how_to}")
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        samples = parts.pop("sample", {})
        return cls.of(parts, {key: json.loads(value) for key, value in metadata.items()}, samples)


def measured_layers(model: nn.Module, target_modules: str | Iterable[str] | None, who: str) -> dict[str, nn.Module]:
    """The layers of a supported kind that the targets name, by their names in the plain model; all where None.

    Raises:
        CoreLoraError: there is none.
    """
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    names = None if targets is None or "all-linear" in targets else list(targets)
    layers = {plain_name(key): layer for key, layer in _adaptable(model)}
    layers = {n: m for n, m in layers.items() if names is None or any(n == t or n.endswith(f".{t}") for t in names)}
    if not layers:
        raise CoreLoraError(f"{who}: target_modules {target_modules!r} match no layer of a supported kind")
    return layers


def plain_name(key: str) -> str:
    """A module's name without what PEFT puts around it: "base_model.model.x.base_layer" is "x"."""
    return key.removeprefix("base_model.model.").replace(".base_layer", "")


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: list[str] = []
    for key, module in model.named_modules():
        if any(key.startswith(p) for p in inside):
            continue
        base = wrapped_layer(module)
        if base is not None:
            inside.append(key + ".")
            module = base
        if view_of(module) is not None:
            yield key, module


def weight_sample(layer: nn.Module) -> Tensor:
    """A few entries of a layer's weight."""
    view = view_of(layer)
    assert view is not None
    with gathered(layer):
        return BaseWeight(layer, view, backend_of(layer)).sample()


def given_to(stats: Stats | None, key: str, spec: AdapterSpec) -> Any:
    """What the start of the layer `key` reads; None where it reads nothing, or the weight's own numbers serve."""
    if stats is None or not OUTERS[spec.choices.outer].needs_stats:
        return None
    return stats.given(key, spec)


def stats_problems(config: Any, stats: Stats | None, layers: Mapping[str, nn.Module]) -> list[str]:
    """Every reason why these statistics can't serve these layers, one sentence each.

    Args:
        config: the CoreLoraConfig, of an outer start that reads statistics.
        stats: the statistics; None where there are none or the weight's own serve.
        layers: the targeted layers by name.
    """
    outer = config.choices().outer
    wanted = STATS[OUTERS[outer].stats]
    how_to, reads = wanted.how_to, f"method {config.method!r} (outer {outer!r}) needs {wanted.kind} statistics"
    if stats is None:
        return [] if config.stats == "weight" else [f"{reads}: {how_to}."]
    if not isinstance(stats, wanted):
        return [f"{reads}, not {stats.kind} statistics: {how_to}."]
    missing = [k for k in layers if k not in stats.names]
    if missing:
        return [
            f"the statistics are of another model or other layers: nothing for {', '.join(missing[:4])}"
            f"{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}. {how_to[0].upper()}{how_to[1:]}."
        ]
    problems = [
        _layer_problem(k, layer, stats, OUTERS[outer].reach * config.rank_for(k)) for k, layer in layers.items()
    ]
    found = [p for p in problems if p]
    return found[:8] + ([f"{len(found) - 8} more layers have the like."] if len(found) > 8 else [])


def _layer_problem(key: str, layer: nn.Module, stats: Stats, count: int) -> str | None:
    base = wrapped_layer(layer) or layer
    view = view_of(base)
    assert view is not None
    misfit = stats.misfit(key, view.shape, min(count, *view.shape))
    if misfit:
        return f"{key}: the statistics are of another model: {misfit}."
    if not all(bool(torch.isfinite(values[key]).all()) for values in stats.parts().values()):
        return f"{key}: the statistics hold NaN or infinite values: collect them again."
    saved = stats.samples.get(key)
    if saved is None or any(p.is_meta for p in base.parameters()):
        return None
    error = float((weight_sample(base) - saved).norm() / saved.norm().clamp(min=1e-12))
    return f"{key}: the statistics were collected on another model (its weights differ)." if error > 0.35 else None
