"""Read and write a base weight, however it is stored. No other file knows about quantisation or sharding.

Plain layers are read in place. Quantised ones go through PEFT's quantisation backends, one layer at a time. Where a
weight lives elsewhere between forward passes (ZeRO-3 shards, accelerate's offloading) it is fetched for the reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.integrations import gather_params_ctx
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn

from corelora.layers import View


def backend_of(layer: nn.Module, **options: Any) -> QuantizationBackend | None:
    """PEFT's quantisation backend for a base layer, None for a plain one."""
    return resolve_quantization_backend(layer, **options)


def wrapped_layer(module: nn.Module) -> nn.Module | None:
    """The base layer inside one of PEFT's tuner layers (any method's); None where the module is no such layer."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else None


class BaseWeight:
    """A base layer's weight as W[o,i]; implements `outer.Weight`.

    Args:
        layer: the base layer itself.
        view: its view.
        backend: its quantisation backend, None where it is plain.
    """

    def __init__(self, layer: nn.Module, view: View, backend: QuantizationBackend | None = None) -> None:
        self.layer, self.view, self.backend = layer, view, backend
        self.shape = view.shape
        self._dequantized: Tensor | None = None

    @property
    def is_meta(self) -> bool:
        """No values yet: starts that read W must wait."""
        return any(p.is_meta for p in self.layer.parameters(recurse=False)) and not _is_offloaded(self.layer)

    @property
    def is_live(self) -> bool:
        """Slices of W can be read at any time in a forward pass, so a Nyström start needs no storage of its own."""
        weight = getattr(self.layer, "weight", None)
        plain = self.backend is None and isinstance(weight, Tensor) and weight.is_floating_point()
        return plain and not hasattr(weight, "ds_id") and not _is_offloaded(self.layer)

    @property
    def is_quantized(self) -> bool:
        """Stored in fewer bits than it computes in."""
        weight = getattr(self.layer, "weight", None)
        return self.backend is not None or (isinstance(weight, Tensor) and weight.element_size() < 2)

    @property
    def float_dtype(self) -> torch.dtype:
        """The type to compute in: the weight's own, or what a quantised layer says, or the default."""
        dtype = getattr(getattr(self.layer, "weight", None), "dtype", torch.float32)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
        compute = getattr(self.layer, "compute_dtype", None)
        return compute if isinstance(compute, torch.dtype) else torch.get_default_dtype()

    def native(self) -> Tensor:
        """W[o,i] in its own float type: a view of a plain weight, the dequantised values of another."""
        if self.backend is None:
            return self.view.matrix(_whole(self.layer.weight.detach()))  # type: ignore[operator]
        if self._dequantized is None:
            settle(self.layer)
            self._dequantized = self.view.matrix(self.backend.get_base_weight(self.layer).detach())
        return self._dequantized

    def full(self) -> Tensor:
        """W[o,i] in float32."""
        return self.native().float()

    def rows(self, index: Tensor) -> Tensor:
        """W[index, :] in float32, without a float copy of the rest."""
        W = self.native()
        return W.index_select(0, index.to(W.device)).float()

    def cols(self, index: Tensor) -> Tensor:
        """W[:, index] in float32, without a float copy of the rest."""
        W = self.native()
        return W.index_select(1, index.to(W.device)).float()

    def sample(self, n: int = 16) -> Tensor:
        """n entries of W spread evenly over it, in float32 on the CPU: a fingerprint that survives a change of type."""
        W = self.native()
        o, i = W.shape
        flat = torch.linspace(0, o * i - 1, n, dtype=torch.float64).round().long().to(W.device)
        return W[flat // i, flat % i].float().cpu()

    def fingerprint(self) -> Tensor:
        """[17]: the sample, and 1 where the weight is quantised, which loosens the comparison."""
        return torch.cat([self.sample(), torch.tensor([float(self.is_quantized)])])


def makes_no_values() -> bool:
    """New parameters are on the meta device: within torch.device("meta"), or where PEFT's low_cpu_mem_usage is set."""
    return nn.LayerNorm(1).weight.is_meta  # a module that draws no random numbers


def settle(layer: nn.Module) -> None:
    """Put a quantised layer's weight back into its storage layout, which its backend reads.

    bitsandbytes packs 4-bit weights into another layout while it infers on a CPU with AVX512-BF16, and back when the
    layer is asked for its state. Where scales are not quantised themselves it then leaves them transposed, as packed
    [blocks of a row, o] (seen in 0.50), so they are put back here.
    """
    state = getattr(layer.weight, "quant_state", None)
    packed = getattr(state, "packing_format_for_cpu", False)
    layer.state_dict()
    if state is not None and packed and state.absmax.ndim == 2:
        state.absmax = state.absmax.T.reshape(-1).float()


def _whole(weight: Tensor) -> Tensor:
    """A sharded tensor's full value; any other tensor as it is."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _is_offloaded(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "_hf_hook", None), "offload", False)


@contextmanager
def readable(tuner_layer: Any) -> Iterator[None]:
    """Make a tuner layer's base weight readable: gathers ZeRO-3 shards, brings offloaded weights in."""
    with onload_layer(tuner_layer), gathered(tuner_layer.get_base_layer()):
        yield


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Make a module's own parameters whole on every process where ZeRO-3 has shared them out; all processes call it."""
    with gather_params_ctx(list(module.parameters(recurse=False)), modifier_rank=None):
        yield
