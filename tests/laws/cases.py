"""The table of cases that the laws run on, and the plain formulas that they compare with.

Shapes: W[o,i] A[r,i] core[r,r] B[o,r]; i in, o out, r outer rank, k inner rank.

The reference never calls the adapter's path or delta. It reads the factors' stored numbers, multiplies them out as the
papers' formulas are written, and gives `W + delta` to plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corelora import CoreLoraConfig, GradientStats, InputStats
from corelora.registry import METHODS, OUTERS
from corelora.spec import Choices

R, K = 4, 2

# Relative to the largest number compared. float32: a few dozen products in another order. bfloat16: 8 bits of mantissa,
# one rounding of the layer's output, and of the features between two factors.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
# What storage may lose: one rounding each way of merge and unmerge, relative to the numbers that were added.
ROUNDING = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-8}

KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(10, 12), lambda: torch.randn(2, 5, 10)),
    "linear_no_bias": (lambda: nn.Linear(10, 12, bias=False), lambda: torch.randn(6, 10)),
    "conv1d_gpt2": (lambda: Conv1D(12, 10), lambda: torch.randn(2, 5, 10)),
    "conv2d_strided": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 3, 6, 5)),
    "conv2d_1x1": (lambda: nn.Conv2d(7, 6, 1), lambda: torch.randn(2, 7, 3, 4)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), lambda: torch.randn(2, 4, 5, 4)),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: torch.randn(2, 6, 4, 5)),
    "embedding": (lambda: nn.Embedding(11, 8, padding_idx=1), lambda: torch.randint(0, 11, (3, 6))),
}
# Once each, with one method that trains everything: settings of a convolution that only the view knows.
ODD_KINDS = {
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, dilation=2, padding="same"), lambda: torch.randn(2, 3, 9)),
    "conv2d_reflect": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 3, 5, 6),
    ),
}


class OneLayer(nn.Module):
    """A model of one layer called `layer`; an untouched `other` shows what must not change."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def base_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> OneLayer:
    """A fresh model whose layer is of this kind; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return OneLayer((KINDS | ODD_KINDS)[kind][0]()).to(dtype).eval()


def batch(kind: str, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """An input of the layer; ids stay integers."""
    torch.manual_seed(seed)
    x = (KINDS | ODD_KINDS)[kind][1]()
    return x.to(dtype) if x.is_floating_point() else x


def sides(kind: str) -> tuple[int, int]:
    """(o, i) of W[o,i]; leaves the random state alone."""
    with torch.random.fork_rng():
        o, i = matrix_of(base_model(kind).layer).shape
    return o, i


def variants() -> list[tuple[str, str]]:
    """(method, variant) of the whole registry; a published variant that is the default is not run twice."""
    found = []
    for name in sorted(METHODS):
        found.append((name, "default"))
        if METHODS[name].published != METHODS[name].default:
            found.append((name, "published"))
    return found


def some_stats(i: int, key: str = "layer") -> InputStats:
    """Made-up input statistics for the layer of `OneLayer`."""
    return InputStats({key: torch.rand(i, generator=torch.Generator().manual_seed(7)) + 0.1})


def some_gradients(o: int, i: int, key: str = "layer") -> GradientStats:
    """Made-up gradient statistics for the layer of `OneLayer`: all triplets of a random matrix."""
    U, S, Vh = torch.linalg.svd(torch.randn(o, i, generator=torch.Generator().manual_seed(8)), full_matrices=False)
    return GradientStats({key: U}, {key: S}, {key: Vh})


def stats_for(outer: str, o: int, i: int) -> InputStats | GradientStats | None:
    """What an outer start reads of a layer W[o,i], made up; None where it reads nothing."""
    kind = OUTERS[outer].stats
    return None if kind is None else some_stats(i) if kind == "input" else some_gradients(o, i)


def config(kind: str, choices: Choices, **settings) -> CoreLoraConfig:
    """A config for the layer of `OneLayer`; starts that need statistics get some."""
    given = {"target_modules": ["layer"], "r": R, "inner_r": K, "alpha": 6.0} | settings
    if OUTERS[choices.outer].needs_stats and "stats" not in given:
        given["stats"] = stats_for(choices.outer, *sides(kind))
    return CoreLoraConfig(**given)


def adapted(kind: str, conf: CoreLoraConfig, dtype: torch.dtype = torch.float32, base: nn.Module | None = None):
    """A fresh model with the adapter on its layer."""
    model = base_model(kind, dtype) if base is None else base
    torch.manual_seed(3)
    return get_peft_model(model, conf).eval()


def stir(model: nn.Module, size: float = 0.1, seed: int = 4) -> None:
    """Move every trained number at random, as training would, so that no law holds by a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator).to(p))


def layer_of(model: nn.Module):
    """The tuner layer."""
    return model.base_model.model.layer


def matrix_of(layer: nn.Module) -> Tensor:
    """W[o,i] by plain reshaping."""
    W = layer.weight.detach()
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return W.T
    return W.reshape(W.shape[0], -1)


def run_plain(layer: nn.Module, W: Tensor, x: Tensor) -> Tensor:
    """The layer's output with the matrix W[o,i] in place of its weight, by plain PyTorch in W's type."""
    bias = getattr(layer, "bias", None)
    bias = None if bias is None else bias.detach().to(W.dtype)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, W.T, padding_idx=layer.padding_idx)
    x = x.to(W.dtype)
    if isinstance(layer, (nn.Linear, Conv1D)):
        return x @ W.T if bias is None else x @ W.T + bias
    padding = layer.padding
    if layer.padding_mode == "reflect":
        x, padding = F.pad(x, (1, 1, 1, 1), mode="reflect"), 0
    conv = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    return conv(x, W.reshape(layer.weight.shape), bias, layer.stride, padding, layer.dilation, layer.groups)


@dataclass
class Numbers:
    """The matrices of one adapter as leaves: what trains, and the start that it is an offset from."""

    trained: dict[str, Tensor]
    starts: dict[str, Tensor]

    def now(self) -> dict[str, Tensor]:
        """Each factor as it stands: start + trained part."""
        names = self.trained.keys() | self.starts.keys()
        return {n: sum(part[n] for part in (self.trained, self.starts) if n in part) for n in names}  # type: ignore[misc]


def numbers_of(layer, W: Tensor, name: str = "default") -> Numbers:
    """The stored numbers of an adapter on a tuner layer with base weight W[o,i], in float64."""
    return read_numbers(layer.factors(name), W)


def read_numbers(factors, W: Tensor, dtype: torch.dtype = torch.float64) -> Numbers:
    """Read an adapter's stored numbers. Slices are cut from W here; a start that is not kept takes random numbers.

    A start that an adapter does not keep must not matter (IntTune's core0): random ones prove it.
    """
    trained, starts = {}, {}
    for slot, factor in factors.items():
        if factor.weight is not None:
            trained[slot] = factor.weight.detach().to(dtype).clone().requires_grad_()
        if factor.start is not None:
            starts[slot] = factor.start.to(dtype)
        elif factor.is_live:
            starts[slot] = _slice(factor, W).to(dtype)
        elif factor.plan.offset or factor.weight is None:
            starts[slot] = torch.randn(factor.plan.shape, dtype=dtype)
    return Numbers(trained, starts)


def _slice(factor, W: Tensor) -> Tensor:
    """transform W[I,:] or W[:,J] transform, in plain words."""
    r = factor.plan.shape[0] if factor.plan.source == "rows" else factor.plan.shape[1]
    index = torch.arange(r) if factor.index is None else factor.index.long()
    rows = W[index] if factor.plan.source == "rows" else W[:, index]
    T = factor.transform
    if T is None:
        return rows
    T = (torch.diag(T) if T.ndim == 1 else T).to(W.dtype)
    return T @ rows if factor.plan.source == "rows" else rows @ T


def product(core: str, position: str, M: dict[str, Tensor]) -> Tensor:
    """The dense product of an adapter, written out structure by structure (DESIGN 1.2; NoRA paper Eq. 2 and 8)."""
    A, B = M["A"], M["B"]
    if core == "none":
        return B @ A
    if core == "diagonal":
        return B @ torch.diag(M["core"]) @ A
    if core == "dense":
        return B @ M["core"] @ A
    inner = M["core_b"] @ M["core_a"]
    second = M["core2_b"] @ M["core2_a"] if position == "both" else None
    if core == "nested":
        return B @ inner @ A if second is None else B @ second @ inner @ A
    if second is not None:  # parallel at both ends, whichever end the structure is named after
        return (B + second) @ (A + inner)
    return (B + inner) @ A if core == "parallel_b" else B @ (A + inner)


def explicit_delta(layer, numbers: Numbers, name: str = "default") -> Tensor:
    """scale * (B core A), less scale * (B0 core0 A0) under `subtract`: the definition, as a difference."""
    spec = layer.cores[name].spec
    c = spec.choices
    delta = product(c.core, c.position, numbers.now())
    if c.start == "subtract" and layer.cores[name].has_offsets:
        # What is frozen is its own start; what trains as an offset starts at its start.
        delta = delta - product(c.core, c.position, numbers.starts)
    return spec.scale * delta


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, size: float | None = None) -> None:
    """Assert equality within TOLERANCE[dtype] of the largest expected number (or of `size`)."""
    size = float(expected.abs().max()) if size is None else size
    error = float((found.double() - expected.double()).abs().max())
    assert error <= TOLERANCE[dtype] * size, f"error {error:.3g} of {size:.3g}: {error / max(size, 1e-30):.2g} relative"
