"""One factor of an adapter, a linear map M = start + weight, as a module.

With `start: subtract` an adapter's output is the difference of two products, B core A x - B0 core0 A0 x. Computed as
such it drowns in rounding, so each factor keeps its trained part as an offset dM from its start M0 and passes on a
pair: the features v of the whole product so far, and d, what they differ by from the starting product's.

    v' = (M0 + dM) v        d' = dM v + M0 d        (the product rule; d of the last factor is the adapter's output)

A plain factor is a trained M (no start, no d), a frozen one an M0 (no dM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corelora.errors import CoreLoraError
from corelora.layers import View
from corelora.outer import transformed_cols, transformed_rows

Pair = tuple[Tensor | None, Tensor | None]
PROBE_TOLERANCE = 0.05  # of numbers of size 1; a bfloat16 start rounds to about 0.005


@dataclass(frozen=True, kw_only=True)
class FactorPlan:
    """What a factor is, decided once when the adapter is made.

    Attributes:
        shape: [rows, cols], or [r] for a diagonal.
        trained: has a parameter.
        offset: that parameter is dM, on top of a start.
        source: "rows" or "cols" where the start is a slice of the base weight, else None.
        needs_start: the start takes part in the path (IntTune's core0 does not).
        needs_value: a later factor asks for v'.
        view: the layer's view where this factor reads the layer's own input, else None.
    """

    shape: tuple[int, ...]
    trained: bool
    offset: bool = False
    source: str | None = None
    needs_start: bool = False
    needs_value: bool = True
    view: View | None = None


class Factor(nn.Module):
    """A factor M[rows, cols]. Called as a module, so that wrappers that shard by module (FSDP1) see it.

    Attributes:
        weight: the trained part: M, or dM where `plan.offset`; None where frozen. float32 under PEFT's default, and
            cast to the type of the features where it is applied.
        start: M0 as a buffer; None where there is none or it is read live from the base weight.
        index: which rows or columns of W make the start; None for the leading ones.
        transform: scaling of the slice: [r] or [r,r], or None (outer.OuterStart).
        probe: [r], what a start that the file leaves out gave for a fixed vector; a load that computes it again
            compares.
        channel_scale: d[i], what AwSVD scaled the weight with, kept beside the probe.
    """

    weight: Tensor | None
    start: Tensor | None
    index: Tensor | None
    transform: Tensor | None
    probe: Tensor | None
    channel_scale: Tensor | None

    def __init__(self, plan: FactorPlan) -> None:
        super().__init__()
        self.plan = plan
        self.register_parameter("weight", None)
        for name in ("start", "index", "transform", "probe", "channel_scale"):
            self.register_buffer(name, None, persistent=False)

    def extra_repr(self) -> str:
        state = "offset" if self.plan.offset else "trained" if self.plan.trained else "frozen"
        live = f", live {self.plan.source} of the base weight" if self.is_live else ""
        return f"{' x '.join(map(str, self.plan.shape))}, {state}{live}"

    @property
    def is_live(self) -> bool:
        """The start is read from the base weight in each forward pass."""
        return self.plan.source is not None and self.plan.needs_start and self.start is None

    @property
    def has_start(self) -> bool:
        """The start is held and has values."""
        return self.start is not None and not self.start.is_meta and not bool(self.start.flatten()[:1].isnan().any())

    @property
    def start_is_saved(self) -> bool:
        """The start belongs to the adapter's file."""
        return "start" not in self._non_persistent_buffers_set

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """A file from a quantised base holds slices that a float base would read live: take them."""
        saved = state_dict.get(f"{prefix}start")
        if saved is not None and self.start is None and self.plan.needs_start:
            like = self.weight if self.weight is not None else saved
            self.set_start(torch.empty_like(saved, device=like.device), persistent=True)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_trained(self, value: Tensor) -> None:
        """Take `value` as the trained part."""
        self.weight = nn.Parameter(value.contiguous().clone())

    def set_start(self, value: Tensor | None, persistent: bool) -> None:
        """Take `value` as M0, saved with the adapter where `persistent`."""
        self.register_buffer("start", value, persistent=persistent)

    def set_slice(self, index: Tensor | None, transform: Tensor | None) -> None:
        """Remember which slice of W the start is; the indices are saved, the transform is made again at load."""
        self.register_buffer("index", None if index is None else index.to(torch.int32), persistent=index is not None)
        self.register_buffer("transform", transform, persistent=False)

    def set_probe(self, probe: Tensor, channel_scale: Tensor | None) -> None:
        """Remember what a start that is made again at load must agree with; both are saved."""
        self.register_buffer("probe", probe)
        self.register_buffer("channel_scale", channel_scale, persistent=channel_scale is not None)

    def probe_now(self) -> Tensor:
        """[r], float32: the start on a fixed vector of its long side, each number relative to its row's norm."""
        assert self.start is not None
        rows = self.start.float() if self.plan.view is not None else self.start.float().T  # [r, i] or [r, o]
        signs = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
        return rows @ signs / rows.norm(dim=1).clamp(min=1e-30)

    def check_probe(self, name: str) -> None:
        """Raise CoreLoraError where the start is not the one that the file was trained with.

        Tiny perturbations of a weight flip signs and mix close singular vectors, which changes numbers of size 1 here.
        """
        assert self.probe is not None
        error = float((self.probe_now() - self.probe.to(self.probe_now())).abs().max())
        if not error <= PROBE_TOLERANCE:  # NaN, where the file had no probe, is refused too
            raise CoreLoraError(
                f"{name} was left out of the file (store_outer: false) and came out differently when it was computed "
                f"again (probe off by {error:.2g}, {PROBE_TOLERANCE} is allowed): another weight, device or library. "
                "Load it where it was trained, and save it with store_outer: true."
            )

    def slice_of(self, W: Tensor) -> Tensor:
        """The slice of W[o,i] without its transform: [r,i] or [o,r]; leading rows and columns are views."""
        r = self.plan.shape[0] if self.plan.source == "rows" else self.plan.shape[1]
        if self.plan.source == "rows":
            return W[:r] if self.index is None else W.index_select(0, self.index)
        return W[:, :r] if self.index is None else W.index_select(1, self.index)

    def start_matrix(self, W: Tensor | None) -> Tensor:
        """M0, from the buffer or from W[o,i]."""
        if self.start is not None:
            return self.start
        if W is None:
            raise RuntimeError("a live factor needs the base weight")
        transformed = transformed_rows if self.plan.source == "rows" else transformed_cols
        return transformed(self.slice_of(W), self.transform)

    def forward(self, value: Tensor | None, diff: Tensor | None, W: Tensor | None = None) -> Pair:
        """(v, d) to (v', d') on features [..., cols] to [..., rows].

        Args:
            value: v; the layer's own input where `plan.view` is set; None where nobody needs it.
            diff: d, None where it is zero so far.
            W: the base weight W[o,i], for live starts.
        """
        return self._propagate(value, diff, W, matrices=False)

    def on_matrices(self, pair: Pair | None, W: Tensor | None, dtype: torch.dtype) -> Pair:
        """The same on matrices [cols, n] to [rows, n] of type `dtype`; a pair of None is (identity, nothing)."""
        if pair is not None:
            return self._propagate(*pair, W, matrices=True)
        start = self.start_matrix(W).to(dtype) if self.plan.needs_start else None
        weight = None if self.weight is None else self.weight.to(dtype)
        if len(self.plan.shape) == 1:
            start, weight = (None if t is None else torch.diag(t) for t in (start, weight))
        return add(start, weight), weight if self.plan.offset else None

    def _propagate(self, value: Tensor | None, diff: Tensor | None, W: Tensor | None, matrices: bool) -> Pair:
        plan, apply = self.plan, self._on_matrix if matrices else self._on_features
        started = moved = carried = None
        needs_value = plan.needs_value or matrices
        if value is not None and plan.trained:
            moved = apply(value, self.weight)
        if plan.needs_start:
            start = self._start(W, matrices)
            if value is not None and needs_value:
                started = start(value)
            if diff is not None:
                carried = start(diff)
        if not plan.trained or plan.offset:
            return (add(started, moved) if needs_value else None), add(carried, moved)
        # A plain trained factor: no start; a difference that came before it passes through the same matrix.
        return moved, None if diff is None else apply(diff, self.weight)

    def _start(self, W: Tensor | None, matrices: bool):
        """The start as a function of features or of matrices. Live slices put their transform on the r side."""
        if self.start is not None or matrices:
            M, apply = self.start_matrix(W), self._on_matrix if matrices else self._on_features
            return lambda x: apply(x, M)
        if W is None:
            raise RuntimeError("a live factor needs the base weight")
        M = self.slice_of(W)
        if self.plan.source == "rows":
            return lambda x: _scaled(self._on_features(x, M), self.transform)
        return lambda x: self._on_features(_scaled(x, self.transform), M)

    def _on_features(self, x: Tensor, M: Tensor | None) -> Tensor:
        assert M is not None
        if x.is_floating_point():
            M = M.to(x.dtype)
        if self.plan.view is not None:
            return self.plan.view.apply(x, M)
        return x * M if len(self.plan.shape) == 1 else F.linear(x, M)

    def _on_matrix(self, x: Tensor, M: Tensor | None) -> Tensor:
        assert M is not None
        M = M.to(x.dtype)
        return M[:, None] * x if len(self.plan.shape) == 1 else M @ x


def _scaled(features: Tensor, transform: Tensor | None) -> Tensor:
    """T h: a transform T, [r] or [r,r], on features h [..., r]."""
    if transform is None:
        return features
    T = transform.to(features.dtype)
    return features * T if T.ndim == 1 else F.linear(features, T)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is zero."""
    if a is None:
        return b
    return a if b is None else a + b
