"""Layer views: what each kind of layer *is*, asked once, in one place.

A view turns a layer into a matrix W[o,i] and knows how to apply an A[r,i] to the layer's own input (giving features
with r last), how features become the layer's output, and how a matrix is written back in the layer's layout.

    kind        weight in the layer            W[o,i]                          input           features
    Linear      [o,i]                          itself                          [..., i]        [..., r]
    Conv1D      [i,o] (GPT-2)                  transposed                      [..., i]        [..., r]
    ConvNd      [o, c/groups, *kernel]         i = c/groups * kernel sizes     [n, c, *sizes]  [n, *sizes', r]
    Embedding   [tokens, width]                transposed: i tokens, o width   ids [...]       [..., r]

No weights are held here: a view is made of a layer's settings alone and can be copied and pickled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class View(ABC):
    """One kind of layer. `shape` is (o, i); `factored` tells whether A and B can be applied one after the other."""

    kind: str
    shape: tuple[int, int]
    factored: bool = True
    takes_ids: bool = False

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """The layer's weight as W[o,i], without a copy."""

    @abstractmethod
    def weight(self, W: Tensor) -> Tensor:
        """W[o,i] in the layer's own layout (the inverse of `matrix`)."""

    @abstractmethod
    def apply(self, x: Tensor, A: Tensor) -> Tensor:
        """A[r,i] on the layer's input: features [..., r]."""

    def output(self, features: Tensor) -> Tensor:
        """Features [..., o] in the layer's output layout."""
        return features

    def dense(self, x: Tensor, delta: Tensor) -> Tensor:
        """delta[o,i] applied whole to the layer's input, in its output layout; for views that are not factored."""
        return self.output(self.apply(x, delta))


@dataclass(frozen=True)
class LinearView(View):
    """nn.Linear and whatever has its in_features and out_features (quantised linear layers too)."""

    shape: tuple[int, int]
    kind: str = "linear"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def weight(self, W: Tensor) -> Tensor:
        return W

    def apply(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)


@dataclass(frozen=True)
class Conv1DView(LinearView):
    """transformers' Conv1D, a linear layer with a transposed weight."""

    kind: str = "conv1d"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def weight(self, W: Tensor) -> Tensor:
        return W.T.contiguous()


@dataclass(frozen=True)
class EmbeddingView(View):
    """nn.Embedding: a linear layer on one-hot tokens, so W[o,i] is the table transposed."""

    shape: tuple[int, int]
    padding_idx: int | None = None
    kind: str = "embedding"
    takes_ids: bool = True

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def weight(self, W: Tensor) -> Tensor:
        return W.T.contiguous()

    def apply(self, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.T, padding_idx=self.padding_idx)


@dataclass(frozen=True)
class ConvView(View):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d; the kernel is unrolled into W's columns."""

    shape: tuple[int, int]
    weight_shape: tuple[int, ...]  # [o, channels / groups, *kernel]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    border: tuple[int, ...]  # what a non-zero padding mode adds, last dimension first
    kind: str = "conv"

    @property
    def factored(self) -> bool:  # type: ignore[override]
        """A grouped convolution sees another slice of the input for each group: only the dense delta applies."""
        return self.groups == 1

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.shape)

    def weight(self, W: Tensor) -> Tensor:
        return W.reshape(self.weight_shape)

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The layer's own convolution with another kernel [r, channels / groups, *kernel], without bias."""
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.border, mode=self.padding_mode), 0
        return conv(x, kernel, None, self.stride, padding, self.dilation, self.groups)

    def apply(self, x: Tensor, A: Tensor) -> Tensor:
        return self.convolve(x, A.reshape(A.shape[0], *self.weight_shape[1:])).movedim(1, -1)

    def output(self, features: Tensor) -> Tensor:
        return features.movedim(-1, 1)

    def dense(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.convolve(x, self.weight(delta))


def view_of(layer: nn.Module) -> View | None:
    """The view of a layer, or None where no view fits.

    Args:
        layer: the layer itself, not an adapter around it.
    """
    if isinstance(layer, Conv1D):
        return Conv1DView((layer.nf, layer.nx))
    if isinstance(layer, nn.Embedding):
        return EmbeddingView((layer.embedding_dim, layer.num_embeddings), layer.padding_idx)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _conv_view(layer)
    if isinstance(layer, nn.Linear) or _is_linear_like(layer):
        return LinearView((int(layer.out_features), int(layer.in_features)))  # type: ignore[arg-type]
    return None


def _is_linear_like(layer: nn.Module) -> bool:
    """Quantised linear classes derive from nn.Module in some libraries; all name their sizes as nn.Linear does."""
    sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    return all(isinstance(s, int) for s in sizes)


def _conv_view(layer: Any) -> ConvView:
    kernel = tuple(layer.weight.shape[2:]) if layer.weight.ndim > 1 else tuple(layer.kernel_size)
    weight_shape = (layer.out_channels, layer.in_channels // layer.groups, *kernel)
    i = weight_shape[1]
    for size in kernel:
        i *= size
    return ConvView(
        shape=(layer.out_channels, i),
        weight_shape=weight_shape,
        stride=tuple(layer.stride),
        padding=layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
        dilation=tuple(layer.dilation),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        border=tuple(layer._reversed_padding_repeated_twice),
    )
