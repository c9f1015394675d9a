"""Gradient statistics: the top singular triplets of each layer's mean gradient, from a few batches run both ways.

All weights are frozen meanwhile and none gets a gradient: the gradient of W[o,i] is made of a layer's input x and its
output's gradient dy, which hooks see (dy^T x for a linear layer, the view's own product for others). Small gradients
are added up as they are. Of a larger one two sketches are kept, G Omega[o,k] and Psi G[l,i], which are linear in G and
so add up over batches; G itself lives for one layer and batch at a time.

Tropp et al. 2017, "Practical sketching algorithms for low-rank matrix approximation", has the sketch. Sizes for n
triplets: k = 2n + 16, l = 2k + 1. Gradients of a language model have flat spectra behind their first directions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from corelora.errors import CoreLoraError
from corelora.layers import LinearView, View, view_of
from corelora.measured import Batch, Stats, measured_layers, moved, weight_sample
from corelora.outer import Triplets, orthonormal, random_signs, signed, truncated_svd
from corelora.registry import STATS
from corelora.spec import AdapterSpec

EXACT = 2**20  # numbers: gradients up to this size are kept whole
MORE = 16  # directions of a sketch beside twice those asked for, which matter where those are few

Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass
class GradientStats(Stats):
    """The top singular triplets of mean gradients by layer name; float32, on the CPU.

    Attributes:
        left: layer name -> U[o,n].
        singular: layer name -> S[n], largest first.
        right: layer name -> Vh[n,i].
        batches: how many batches were averaged.
        samples: layer name -> a few entries of its weight, which tell whether a model is the same.
    """

    kind = "gradient"
    format = "corelora-gradient-stats-1"
    how_to = (
        "collect them with `stats = corelora.collect_gradients(model, batches, rank)` and pass `stats=stats` (or a "
        "path to saved ones), or pass `stats='weight'` to use the weight in its gradient's place"
    )

    left: dict[str, Tensor]
    singular: dict[str, Tensor]
    right: dict[str, Tensor]
    batches: int = 0
    samples: dict[str, Tensor] = field(default_factory=dict)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """U, S and Vh."""
        return {"left": self.left, "singular": self.singular, "right": self.right}

    def notes(self) -> dict[str, Any]:
        """The count."""
        return {"batches": self.batches}

    @classmethod
    def of(cls, parts: dict[str, dict[str, Tensor]], notes: dict[str, Any], samples: dict[str, Tensor]) -> Self:
        """As a file has them."""
        left, singular, right = (parts.get(part, {}) for part in ("left", "singular", "right"))
        return cls(left, singular, right, notes["batches"], samples)

    def given(self, key: str, spec: AdapterSpec) -> Triplets:
        """The layer's triplets."""
        return Triplets(self.left[key], self.singular[key], self.right[key])

    def misfit(self, key: str, shape: tuple[int, int], count: int) -> str | None:
        """The weight's sides, and as many triplets as the start reaches for."""
        found = (self.left[key].shape[0], self.right[key].shape[1])
        if found != shape:
            return f"a gradient {list(found)} for a weight {list(shape)}"
        n = len(self.singular[key])
        return f"{n} triplets of its gradient for {count}, collect them with rank={count}" if n < count else None


STATS.add(GradientStats.kind, GradientStats)


class _Sum:
    """The sum of one layer's gradients G[o,i] over batches, whole or as two sketches, on the layer's own device.

    Attributes:
        n: how many triplets it will be asked for.
        whole: the sum itself, [o,i], where that is kept.
        Y, Z: the sketches G Omega[o,k] and Psi G[l,i], where it is not.
    """

    def __init__(self, view: View, rank: int, seed: int) -> None:
        o, i = view.shape
        self.view, self.n = view, min(rank, o, i)
        k = min(2 * self.n + MORE, o, i)
        l = min(2 * k + 1, o)  # noqa: E741  (the paper's letter)
        self.is_whole = o * i <= max(EXACT, o * k + l * i)
        self.generator = torch.Generator().manual_seed(seed)
        self.whole = self.Y = self.Z = torch.zeros(())
        if not self.is_whole:
            self.omega = random_signs((i, k), self.generator)
            self.psi = random_signs((l, o), self.generator)

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add the gradient of one batch.

        Args:
            x: the layer's input.
            dy: the gradient of the loss to its output.
        """
        G = weight_gradient(self.view, x, dy)
        if self.is_whole:
            self.whole = self.whole.to(G) + G
            return
        self.omega, self.psi = self.omega.to(G.device), self.psi.to(G.device)
        self.Y = self.Y.to(G) + G @ self.omega.to(G)
        self.Z = self.Z.to(G) + self.psi.to(G) @ G

    @property
    def is_zero(self) -> bool:
        """No gradient came, or only zeros: there are no directions."""
        return not bool((self.whole if self.is_whole else self.Y).any())

    @property
    def is_finite(self) -> bool:
        """Whether no gradient had NaN or infinity in it."""
        return bool(torch.isfinite(self.whole if self.is_whole else self.Y).all())

    def triplets(self) -> Triplets:
        """The top n triplets of the sum."""
        if self.is_whole:
            return truncated_svd(self.whole, self.n, "auto", self.generator)
        Q = orthonormal(self.Y)
        basis, corner = torch.linalg.qr((self.psi.to(Q) @ Q).double())
        X = torch.linalg.solve_triangular(corner, basis.T @ self.Z.double(), upper=True)  # G ~ Q X[k,i]
        right = orthonormal(X.T)
        U, S, Vh = torch.linalg.svd(X @ right)
        U, S, Vh = Q.double() @ U[:, : self.n], S[: self.n], Vh[: self.n] @ right.T
        return signed(U.float(), S.float(), Vh.float())


def weight_gradient(view: View, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient[o,i] of a layer's weight in float32, from its input and its output's gradient."""
    if isinstance(view, LinearView):
        return dy.reshape(-1, view.shape[0]).float().T @ x.reshape(-1, view.shape[1]).float()
    with torch.enable_grad():
        delta = torch.zeros(view.shape, device=dy.device, requires_grad=True)
        out = view.dense(x if view.takes_ids else x.float(), delta)
    return torch.autograd.grad(out, delta, dy.float())[0]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model gives for a batch with labels.

    Raises:
        CoreLoraError: its output has none.
    """
    outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
    found = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if found is None:
        raise CoreLoraError("collect_gradients: the model gives no loss: put `labels` into the batches, or pass `loss`")
    return found


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    rank: int,
    target_modules: str | Iterable[str] | None = None,
    *,
    loss: Loss = model_loss,
    seed: int = 0,
    progress: bool = True,
) -> GradientStats:
    """Run the model over batches forward and backward and keep the top triplets of each layer's mean gradient.

    Each batch counts the same. No weight gets a gradient, and nothing in the model is changed. Held for each layer of
    W[o,i] are at most (o + i) l numbers, l = 4 rank + 33, or the gradient itself where it has up to 2^20 numbers.

    Args:
        model: the model, in whatever mode, not in float16; dropout is switched off meanwhile.
        batches: mappings of model inputs with labels, or what `loss` takes.
        rank: triplets to keep: the adapter's r (LoRA-GA: 2 r), or a layer's smaller side where that is less.
        target_modules: names (suffixes) to record. Where None or "all-linear", all layers of a supported kind but
            embeddings and the output layer.
        loss: (model, batch on the model's device) -> the loss; the model's own where not given.
        seed: of the sketches.
        progress: show progress bars once two seconds have passed.

    Returns:
        The statistics, ready for `CoreLoraConfig(stats=...)`. Layers whose gradient is zero are not in them.

    Raises:
        CoreLoraError: no layer matches, there is no batch, no layer got a gradient, a loss or gradient is not finite,
            or weights are in float16.
    """
    if rank < 1:
        raise CoreLoraError(f"collect_gradients: rank must be at least 1, got {rank}")
    if any(p.dtype == torch.float16 for p in model.parameters()):
        raise CoreLoraError("collect_gradients: small gradients are lost in float16: load the model in another type")
    layers = measured_layers(model, target_modules, "collect_gradients")
    if target_modules is None or "all-linear" in target_modules:
        layers = _inner(model, layers)
    sums = {n: _Sum(view_of(layer), rank, zlib.crc32(f"{seed} {n}".encode())) for n, layer in layers.items()}  # type: ignore[arg-type]
    device = next(model.parameters()).device
    seen = 0
    with _recording(model, layers, sums):
        for batch in tqdm(batches, desc="gradient statistics", unit="batch", disable=not progress, delay=2):
            seen += 1
            value = loss(model, moved(batch, device))
            if not bool(torch.isfinite(value)):
                raise CoreLoraError(f"collect_gradients: the loss of batch {seen} is {value.item()}")
            if value.requires_grad:  # else it depends on no layer that is recorded
                value.backward()
            del value  # with it go the batch's activations, before the next one's are made
    if not seen:
        raise CoreLoraError("collect_gradients: no batch was given")
    return _result(layers, sums, seen, progress)


def _inner(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Without embeddings and the output layer, whose gradients are as large as the vocabulary."""
    heads = [m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)]
    return {
        name: layer
        for name, layer in layers.items()
        if not isinstance(layer, nn.Embedding) and not any(layer is head for head in heads)
    }


@torch.no_grad()
def _result(layers: dict[str, nn.Module], sums: dict[str, _Sum], batches: int, progress: bool) -> GradientStats:
    found = GradientStats({}, {}, {}, batches)
    for name, total in tqdm(sums.items(), desc="their directions", unit="layer", disable=not progress, delay=2):
        if total.is_zero:
            continue
        if not total.is_finite:
            raise CoreLoraError(f"collect_gradients: the gradient of {name} is not finite")
        U, S, Vh = total.triplets()
        found.left[name], found.right[name] = U.cpu().contiguous(), Vh.cpu().contiguous()
        found.singular[name] = S.cpu() / batches
        found.samples[name] = weight_sample(layers[name])
    if not found.names:
        raise CoreLoraError("collect_gradients: no layer got a gradient; are all labels masked?")
    return found


@contextmanager
def _recording(model: nn.Module, layers: dict[str, nn.Module], sums: dict[str, _Sum]) -> Iterator[None]:
    """Hooks on the layers, and all weights frozen, for the time of the passes."""

    def hook(total: _Sum) -> Callable:
        def after(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # a pass that is made again for the gradients
                return output
            x = args[0] if args else next(iter(kwargs.values()))
            if not output.requires_grad:  # nothing before it learns; a copy, for what comes may change it in place
                output = output.detach().requires_grad_().clone()
            output.register_hook(lambda dy: total.add(x.detach(), dy.detach()))
            return output

        return after

    learning = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    handles = [layer.register_forward_hook(hook(sums[n]), with_kwargs=True) for n, layer in layers.items()]
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(training)
        for handle in handles:
            handle.remove()
