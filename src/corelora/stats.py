"""Input statistics for activation-aware starts: one streaming pass over given batches.

For each targeted layer the mean over tokens of |x_j|, one number for each column j of W[o,i]: an input channel of a
linear layer, a kernel column of a convolution, a token of an embedding (there |x_j| is one-hot, so its frequency).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from corelora.errors import CoreLoraError
from corelora.layers import ConvView, View, view_of
from corelora.measured import Batch, Stats, measured_layers, moved, weight_sample
from corelora.registry import STATS
from corelora.spec import AdapterSpec


@dataclass
class InputStats(Stats):
    """Mean absolute inputs by layer name.

    Attributes:
        mean_abs: layer name -> [i], mean over tokens of |x_j|, float32 on the CPU.
        tokens: layer name -> how many tokens (positions, for images) were seen.
        samples: layer name -> a few entries of its weight, which tell whether a model is the same.
    """

    kind = "input"
    format = "corelora-input-stats-1"
    how_to = (
        "collect them with `stats = corelora.collect_stats(model, batches)` and pass `stats=stats` (or a path to saved "
        "ones), or pass `stats='weight'` to use the weight's own column means"
    )

    mean_abs: dict[str, Tensor]
    tokens: dict[str, int] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The means."""
        return {"mean_abs": self.mean_abs}

    def notes(self) -> dict[str, Any]:
        """The counts."""
        return {"tokens": self.tokens}

    @classmethod
    def of(cls, parts: dict[str, dict[str, Tensor]], notes: dict[str, Any], samples: dict[str, Tensor]) -> Self:
        """As a file has them."""
        return cls(parts.get("mean_abs", {}), notes["tokens"], samples)

    def given(self, key: str, spec: AdapterSpec) -> Tensor:
        """d[i] = mean |x_j| ^ power.

        With the power 0.5 this is the NoRA paper's Eq. 3, read as one number for each input channel; ASVD has the
        power as a setting (Yuan 2023).
        """
        return self.mean_abs[key] ** spec.stats_power

    def misfit(self, key: str, shape: tuple[int, int], count: int) -> str | None:
        """One number a channel."""
        found = tuple(self.mean_abs[key].shape)
        return None if found == (shape[1],) else f"{found} numbers for {shape[1]} channels"


STATS.add(InputStats.kind, InputStats)


class _Running:
    """A sum of |x_j| in float64 and a count, on the layer's own device."""

    def __init__(self, view: View) -> None:
        self.view, self.count = view, 0
        self.total: Tensor | None = None

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        if self.view.takes_ids and x.is_floating_point():
            return  # a position table that looks at the features' shape: it has no ids to count
        sums, count = _column_sums(x.detach(), mask, self.view)
        sums = sums.double()
        self.total = sums if self.total is None else self.total + sums
        self.count += count


def _column_sums(x: Tensor, mask: Tensor | None, view: View) -> tuple[Tensor, int]:
    """(sum over tokens of |x_j| [i], number of tokens); masked tokens count for nothing."""
    if view.takes_ids:
        ids = x if mask is None else x[mask]
        return torch.bincount(ids.flatten(), minlength=view.shape[1]), ids.numel()
    if isinstance(view, ConvView):
        return _conv_column_sums(x.abs().float(), view)
    rows = x[mask] if mask is not None else x.reshape(-1, x.shape[-1])
    # A float32 sum over one batch is enough; the running sum over batches is float64.
    return rows.abs().float().sum(dim=0), rows.shape[0]


def _conv_column_sums(x: Tensor, view: ConvView) -> tuple[Tensor, int]:
    """The same for a kernel's columns [channels / groups * kernel]: what each kernel entry is multiplied with."""
    channels = view.weight_shape[1]
    one_hot = torch.eye(view.shape[1], device=x.device).reshape(view.shape[1], *view.weight_shape[1:])
    groups = x.shape[1] // channels
    total, positions = torch.zeros(view.shape[1], device=x.device), 0
    single = ConvView(**{**view.__dict__, "groups": 1})
    for part in x.split(channels, dim=1):
        out = single.convolve(part, one_hot)
        total += out.transpose(0, 1).flatten(1).sum(dim=1)
        positions = out[:, 0].numel()
    return total / groups, positions


@torch.no_grad()
def collect_stats(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    target_modules: str | Iterable[str] | None = None,
    *,
    progress: bool = True,
) -> InputStats:
    """Run the model over batches and record the mean absolute input of each layer that can be adapted.

    One pass; memory does not grow with the number of batches. Tokens whose `attention_mask` is 0 don't count. Works
    on a model that is spread over devices: each layer's sum stays on that layer's device. Adapters are switched off
    where the model has them only by the caller; the inputs are those that the layers see.

    Args:
        model: the model, in whatever mode; dropout is switched off meanwhile.
        batches: mappings of model inputs, or single tensors.
        target_modules: names (suffixes) to record; all layers of a supported kind where None.
        progress: show a progress bar once two seconds have passed.

    Returns:
        The statistics, ready for `CoreLoraConfig(stats=...)`.

    Raises:
        CoreLoraError: no layer matches, there is no batch, or a layer saw no token.
    """
    layers = measured_layers(model, target_modules, "collect_stats")
    running = {name: _Running(view_of(layer)) for name, layer in layers.items()}  # type: ignore[arg-type]
    with _recording(model, layers, running) as set_mask:
        seen = 0
        for batch in tqdm(batches, desc="input statistics", unit="batch", disable=not progress, delay=2):
            set_mask(batch)
            _run(model, batch)
            seen += 1
    if not seen:
        raise CoreLoraError("collect_stats: no batch was given")
    return _result(layers, running)


def _result(layers: dict[str, nn.Module], running: dict[str, _Running]) -> InputStats:
    silent = [name for name, r in running.items() if r.count == 0]
    if len(silent) == len(running):
        raise CoreLoraError("collect_stats: no layer saw a token; are all tokens masked?")
    mean_abs, samples = {}, {}
    for name, r in running.items():
        if r.total is not None and r.count:
            mean_abs[name] = (r.total / r.count).float().cpu()
            samples[name] = weight_sample(layers[name])
    return InputStats(mean_abs, {n: running[n].count for n in mean_abs}, samples)


@contextmanager
def _recording(
    model: nn.Module, layers: dict[str, nn.Module], running: dict[str, _Running]
) -> Iterator[Callable[[Any], None]]:
    """Hooks on the layers for the time of the pass; yields a function that takes the batch's masks."""
    masks: dict[str, Tensor] = {}
    encoded: list[Tensor] = []  # the encoder's output of this batch, which cross-attention keys read

    def keep_encoded(module: nn.Module, args: Any, output: Any) -> None:
        encoded[:] = [output if isinstance(output, Tensor) else output[0]]

    def set_mask(batch: Any) -> None:
        masks.clear()
        if isinstance(batch, Mapping):
            masks.update({k: v for k, v in batch.items() if k.endswith("attention_mask") and v is not None})

    def hook(name: str) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            decodes = "decoder" in name and not any(x is e for e in encoded)
            running[name].add(x, _mask_for(x, masks, decodes))

        return record

    handles = [layer.register_forward_pre_hook(hook(n), with_kwargs=True) for n, layer in layers.items()]
    handles += [encoder.register_forward_hook(keep_encoded) for encoder in _encoders(model)]
    training = model.training
    model.eval()
    try:
        yield set_mask
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def _encoders(model: nn.Module) -> list[nn.Module]:
    """The encoders of encoder-decoder models; a decoder's cross-attention reads their padding."""
    whole = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config.is_encoder_decoder]
    return list(dict.fromkeys(m.get_encoder() for m in whole))


def _mask_for(x: Tensor, masks: dict[str, Tensor], decodes: bool) -> Tensor | None:
    """The padding mask [batch, tokens] that fits a layer's input, as booleans; None where none does (images).

    Args:
        x: the input.
        masks: the batch's masks by name.
        decodes: the input belongs to the decoder, so its mask comes first where several fit.
    """
    order = sorted(masks, key=lambda key: ("decoder" in key) != decodes)
    for key in order:
        mask = masks[key].to(x.device).bool()
        if mask.ndim != 2:
            continue
        if x.shape[:2] == mask.shape:
            return mask
        if x.ndim == 2 and x.shape[0] == mask.numel():  # tokens flattened into one axis
            return mask.flatten()
    return None


def _run(model: nn.Module, batch: Batch) -> None:
    inputs = moved(batch, next(model.parameters()).device)
    if isinstance(inputs, Tensor):
        model(inputs)
    else:
        model(**{k: v for k, v in inputs.items() if k != "labels"})
