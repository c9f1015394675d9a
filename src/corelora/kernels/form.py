"""The one form that serial adapters take: y = W x + b + Lf G Rf x.

    Rf[p,i] = [R ; W[rows, :]]     what reads the input: trained factors, frozen ones, a slice of W
    Lf[o,q] = [L | W[:, cols]]     what writes the output, likewise
    G[q,p]                         a small matrix, made from the core (differentiable); None is the identity

Offsets fit as well. With A = A0 + dA, M = M0 + dM (the core as one matrix), B = B0 + dB,

    B M A - B0 M0 A0 = [dB | B0] [[M, M], [M, dM]] [dA ; A0]

so a difference of products costs one wider product and no cancellation, and the scalings of slices go into G.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from corelora.adapter import CoreAdapter, Factors
from corelora.factor import Factor
from corelora.kernels.narrow import typed

Chain = tuple[Tensor, ...]  # G as matrices that are applied to features in turn; none: the identity

_device: str | None = None


def set_device(kind: str | None) -> str | None:
    """Work as on "cuda" or "cpu" wherever the tensors are; None asks them. For estimates and their tests.

    Returns:
        What was set before.
    """
    global _device
    before, _device = _device, kind
    return before


def on_cpu(x: Tensor) -> bool:
    """Whether products are arranged for a CPU: it has the memory to keep features and waits for every small one."""
    return not x.is_cuda if _device is None else _device == "cpu"


@dataclass(frozen=True)
class Layout:
    """What of a form is fixed: how many rows and columns of W take part, which, and the scale of an identity G.

    Attributes:
        rows: rows of W that follow R in Rf; 0 for none. `row_index` says which; None for the leading ones.
        cols: columns of W that follow L in Lf; 0 for none. `col_index` says which; None for the leading ones.
        scale: multiplies everything where G is None; 1 elsewhere (it is in G).
    """

    rows: int = 0
    row_index: Tensor | None = None
    cols: int = 0
    col_index: Tensor | None = None
    scale: float = 1.0


class Form(NamedTuple):
    """R[p1,i], L[o,q1] and the core, from which `maker` makes G: one adapter at one moment.

    Where G follows from trained cores by numbers and one product, C is the dense core, or C = A' and D = B' of a nested
    one: `FormMaker.expand` and `collapse` then do it inside the operation, without nodes of their own in autograd's
    graph. Elsewhere C is G itself, or None for a G that does not learn.
    """

    R: Tensor | None
    L: Tensor | None
    C: Tensor | None
    D: Tensor | None
    maker: FormMaker


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b in one operation."""
    return a @ b if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """scale * a @ b in a type.

    A GPU adds up products of narrow numbers in float32 and rounds the sums as it writes them; asked for float32, torch
    from 2.8 on writes them as they are: nothing is rounded, and nothing cast afterwards.
    """
    wide = scale == 1 and dtype == torch.float32 and a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)
    if wide and _writes_wide(a.dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return typed(scaled_product(a, b, scale), dtype)


@cache
def _writes_wide(dtype: torch.dtype) -> bool:
    """Whether this torch and GPU can."""
    one = torch.ones(8, 8, dtype=dtype, device="cuda")
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # another signature; not written for this device
        return False
    return True


def between(left: Tensor, right: Tensor, G: Tensor, transposed: bool = False) -> Tensor:
    """left G right, or the transpose of that map; of one G, or of several along the first of three dimensions."""
    return left.mT @ G @ right.mT if transposed else left @ G @ right


def is_serial(core: CoreAdapter) -> bool:
    """Whether the adapter is one chain of factors: parallel cores have no such form here."""
    return all(isinstance(stage, str) for stage in core.stages)


class FormMaker:
    """Makes the form of one adapter, again and again; keeps what does not change between forward passes.

    Args:
        core: what the adapter is; serial.
        factors: its factors.
        scale: the adapter's scale.
    """

    def __init__(self, core: CoreAdapter, factors: Factors, scale: float) -> None:
        self.core, self.factors, self.scale = core, factors, scale
        self.drops = core.spec.dropout > 0
        self.A, self.B = factors["A"], factors["B"]
        self.middle = [factors[str(name)] for name in core.stages[1:-1]]
        self.a_parts, self.b_parts = _parts(self.A), _parts(self.B)
        a_live, b_live = self.A.is_live, self.B.is_live
        self.layout = Layout(
            rows=core.spec.r if a_live else 0,
            row_index=_whole(self.A.index) if a_live else None,
            cols=core.spec.r if b_live else 0,
            col_index=_whole(self.B.index) if b_live else None,
            scale=1.0 if self.middle or core.has_offsets or a_live or b_live else scale,
        )
        self.blocks = (len(self.b_parts), len(self.a_parts))
        self.is_unscaled = scale == 1 and self._plain_slices()
        self.mixes = any(t is not None and t.ndim == 2 for t in (self.A.transform, self.B.transform))
        self.is_direct = self._follows_from_cores()
        self.stacks = any(f.plan.offset and f.start is not None for f in (self.A, self.B))
        # On a CPU the scale stays out of G where it can: it is a number of the last product.
        self.scales_last = self.is_direct and (
            len(self.middle) == 2 or (self.blocks == (1, 1) and self._plain_slices())
        )
        self.cpu_layout = replace(self.layout, scale=scale) if self.scales_last else self.layout
        self._weights: Tensor | None = None
        self._sides: tuple[Tensor | None, Tensor | None] | None = None
        self.mixers: tuple[Tensor, Tensor] | None = None  # as `mixing` has them
        self.stacked_mixers: tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]] | None = None  # mixed.py
        self._constant: Tensor | None = None

    def make(self) -> Form:
        """The form at this moment."""
        # The factors are read past nn.Module.__getattr__, which costs the host as much as starting a small kernel.
        R, L = self._stack(self.A, 0), self._stack(self.B, 1)
        if not self.is_direct:
            return Form(R, L, self._small(), None, self)
        C = self.middle[0]._parameters["weight"]
        return Form(R, L, C, self.middle[1]._parameters["weight"] if len(self.middle) == 2 else None, self)

    @torch.no_grad()
    def prepare(self) -> None:
        """Make what is kept between forward passes."""
        form = self.make()
        self.expand(form.C, form.D)

    def expand(self, C: Tensor | None, D: Tensor | None) -> Tensor | None:
        """G[q,p] from the cores of a form."""
        if not self.is_direct or C is None:
            return C
        M = C if D is None else D @ C
        if self.blocks == (1, 1):
            return M if self.is_unscaled else self._weighed(M)
        r, (q, p) = self.core.spec.r, self.blocks
        constant, spread = self._constant_part(C), M.view(1, r, 1, r)
        if self.is_unscaled:
            return (constant + spread).view(q * r, p * r)
        return torch.addcmul(constant, self._scaling(M).view(q, r, p, r), spread).view(q * r, p * r)

    def chain(self, C: Tensor | None, D: Tensor | None) -> Chain:
        """G on a CPU: the two of a nested core, which are smaller than their product, or one matrix.

        The scale is in it, or in `cpu_layout`.
        """
        if C is None:
            return ()
        if D is None or not self.is_direct:
            G = C if self.scales_last else self.expand(C, D)
            return () if G is None else (G,)
        left, right = self._transforms(C)
        return C if right is None else C * right, D if left is None else left[:, None] * D

    def core_gradients(
        self, V: list[Tensor], U: list[Tensor], C: Tensor, D: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of C and D on a CPU, from the thin features on both sides of each matrix of `chain`.

        Every block of G moves as M does, so the blocks of the features are added up before their product: it is then
        [r,r]. Adding up the blocks of a finished [q,p] takes longer there than all the rest of the backward pass.

        Args:
            V: [V[T,q], ...], from the output's gradient on.
            U: [U[T,p], ...], from the input on.
            C, D: as in the form.
        """
        if self.mixes or not self.is_direct:
            return self.collapse(product(V[0].t(), U[0], C.dtype), C, None)
        left, right = self._transforms(U[0])
        if D is None:
            V0, U0 = self._added_up(V[0], left), self._added_up(U[0], right)
            return product(V0.t(), U0, C.dtype, self.scale), None
        first, last = U[0] if right is None else U[0] * right, V[0] if left is None else V[0] * left
        return product(V[1].t(), first, C.dtype, self.scale), product(last.t(), U[1], D.dtype, self.scale)

    def collapse(self, dG: Tensor, C: Tensor | None, D: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradients of C and D from that of G: the transpose of `expand`."""
        if self.is_direct:
            dG = dG if self.is_unscaled else self._weighed(dG, transposed=True)
            if self.blocks != (1, 1):
                r, (q, p) = self.core.spec.r, self.blocks
                dG = dG.view(q, r, p, r).sum(dim=(0, 2))
        if C is None or D is None:
            return dG, None
        return D.T @ dG, dG @ C.T

    def _stack(self, factor: Factor, dim: int) -> Tensor | None:
        """Stored parts of an outer factor, its trained part first."""
        start = factor._buffers["start"]
        if not factor.plan.trained:
            return start
        weight = factor._parameters["weight"]
        if not factor.plan.offset or start is None:
            return weight
        assert weight is not None
        return torch.cat([weight, start.to(weight.dtype)], dim=dim)

    def _small(self) -> Tensor | None:
        """G: the blocks of the core, times the scalings."""
        M, dM = self._middle_matrices()
        if not self.core.has_offsets:
            return None if M is None and self.layout.scale == self.scale else self._scaled(M)
        like = next(t for t in (M, dM, self.A.weight, self.B.weight) if t is not None)
        r = self.core.spec.r
        M = torch.eye(r, device=like.device, dtype=like.dtype) if M is None else M
        dM = torch.zeros_like(M) if dM is None else dM
        return self._scaled(self._in_blocks(M, dM))

    def _in_blocks(self, M: Tensor, dM: Tensor) -> Tensor:
        """[[M, M], [M, dM]], or the part of it that this adapter's factors have."""
        rows = [torch.cat([_block(b, a, M, dM) for a in self.a_parts], dim=1) for b in self.b_parts]
        return torch.cat(rows)

    def _constant_part(self, C: Tensor) -> Tensor:
        """G at the start as [q/r, r, p/r, r]: [[core0, core0], [core0, 0]] times the scalings."""
        constant = self._constant
        if constant is None or constant.device != C.device or constant.dtype != C.dtype:
            start = self.middle[0].start
            assert start is not None
            start, r = start.to(C), self.core.spec.r
            G = self._in_blocks(start, torch.zeros_like(start)) * self._scaling(C)
            constant = G.detach().view(self.blocks[0], r, self.blocks[1], r)
            self._constant = constant
        return constant

    def _middle_matrices(self) -> tuple[Tensor | None, Tensor | None]:
        """(M, dM) of the middle chain as [r,r]; M None is the identity, dM None is zero."""
        pair = None
        for factor in self.middle:
            like = factor.weight if factor.weight is not None else factor.start
            assert like is not None
            pair = factor.on_matrices(pair, None, like.dtype)
        return (None, None) if pair is None else pair

    def _follows_from_cores(self) -> bool:
        """One dense core, or a nested one without offsets; a slice with an [r,r] transform only where the dense core is
        all of G."""
        dense = len(self.middle) == 1 and len(self.middle[0].plan.shape) == 2
        nested = len(self.middle) == 2 and not self.core.has_offsets
        learns = all(f.plan.trained for f in self.middle)
        return (dense or nested) and learns and (not self.mixes or (dense and self.blocks == (1, 1)))

    def _plain_slices(self) -> bool:
        return self.A.transform is None and self.B.transform is None

    def _scaled(self, G: Tensor | None) -> Tensor:
        """G with the slices' transforms and the scale in it; None is the identity."""
        if G is None:
            like = next(t for t in (self.A.weight, self.B.weight) if t is not None)
            G = torch.eye(self.core.spec.r, device=like.device, dtype=like.dtype)
        if self.is_unscaled:
            return G
        return G * self.scale if self._plain_slices() else self._weighed(G)

    def _weighed(self, G: Tensor, transposed: bool = False) -> Tensor:
        """G with the slices' transforms and the scale in it; or the transpose of that map."""
        if not self.mixes:
            return G * self._scaling(G)
        return between(*self.mixing(G), G, transposed)

    def _scaling(self, like: Tensor | None) -> Tensor:
        """[q,p]: what each entry of G is multiplied by; ones where nothing is."""
        assert like is not None
        weights = self._weights
        if weights is None or weights.device != like.device or weights.dtype != like.dtype:
            left = torch.cat([self._side_scaling(self.B, part, like) for part in self.b_parts])
            right = torch.cat([self._side_scaling(self.A, part, like) for part in self.a_parts])
            weights = (self.scale * left[:, None] * right).to(like.dtype)
            self._weights = weights
        return weights

    def _transforms(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """[r] each: the scalings of the slices that write and read; None where there is none."""
        kept = self._sides
        if kept is None or any(t is not None and (t.device != like.device or t.dtype != like.dtype) for t in kept):
            left, right = (f.transform if f.is_live else None for f in (self.B, self.A))
            left, right = (None if t is None else t.to(like) for t in (left, right))
            kept = self._sides = left, right
        return kept

    def _added_up(self, features: Tensor, transform: Tensor | None) -> Tensor:
        """[T,r]: the parts of features [T,p] added up, the slice's, which is the last, through its transform."""
        r = self.core.spec.r
        last = features[:, -r:]
        if features.shape[1] == r:
            return last if transform is None else last * transform
        return features[:, :r] + last if transform is None else torch.addcmul(features[:, :r], last, transform)

    def _side_scaling(self, factor: Factor, part: str, like: Tensor) -> Tensor:
        transform = factor.transform
        if part == "start" and factor.is_live and transform is not None and transform.ndim == 1:
            return transform.double()
        return torch.ones(self.core.spec.r, device=like.device, dtype=torch.float64)

    def mixing(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """[q,q], with the scale in it, and [p,p]: the transforms [r,r] of orthonormal slices, as blocks on a diagonal.

        What stands between the plain slices is `between` these.
        """
        kept = self.mixers
        if kept is None or any(t.device != like.device or t.dtype != like.dtype for t in kept):
            with torch.inference_mode(False):  # a later pass may train with them
                left = torch.block_diag(*[self._side_matrix(self.B, part, like) for part in self.b_parts])
                right = torch.block_diag(*[self._side_matrix(self.A, part, like) for part in self.a_parts])
                kept = self.mixers = self.scale * left, right
        return kept

    def _side_matrix(self, factor: Factor, part: str, like: Tensor) -> Tensor:
        if part == "start" and factor.is_live and factor.transform is not None:
            return factor.transform.to(like)
        return torch.eye(self.core.spec.r, device=like.device, dtype=like.dtype)


def _whole(index: Tensor | None) -> Tensor | None:
    """int64, the only type that copying by index takes; files hold int32."""
    return None if index is None else index.long()


def _parts(factor: Factor) -> list[str]:
    """The parts of an outer factor in the order of Rf and Lf: the trained one first."""
    parts = ["weight"] if factor.plan.trained else []
    return parts + (["start"] if factor.plan.needs_start else [])


def _block(b: str, a: str, M: Tensor, dM: Tensor) -> Tensor:
    """One block of [[M, M], [M, dM]]: only start to start is a difference."""
    return dM if (b, a) == ("start", "start") else M
