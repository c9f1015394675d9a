"""How the outer factors A[r,i] and B[o,r] begin: pure functions of a weight W[o,i] and of what was measured on it.

Every start answers with an `OuterStart`. Slices of W (Nyström) are answered by their indices and transforms, not
copied: `A0 = a_transform W[rows, :]` and `B0 = W[:, cols] b_transform`, so that a float base needs no storage for them.
Statistics (stats.py, gradients.py) come in as what one layer's start reads: d[i] for AwSVD, `Triplets` for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from corelora.errors import CoreLoraError
from corelora.registry import OUTERS, SAMPLINGS
from corelora.spec import AdapterSpec

STATS_FLOOR = 1e-3  # of the mean: a channel that never fired must not be divided by zero
ENERGY_TOLERANCE, POWER_ITERATIONS = 1e-3, 16  # of the randomised SVD: stop when an iteration gains less, or then


class Weight(Protocol):
    """What a start may ask of a base weight; storage.py implements it for plain and quantised layers."""

    shape: tuple[int, int]

    def full(self) -> Tensor:
        """W[o,i] in float32."""

    def rows(self, index: Tensor) -> Tensor:
        """W[index, :] in float32."""

    def cols(self, index: Tensor) -> Tensor:
        """W[:, index] in float32."""


@dataclass(kw_only=True)
class OuterStart:
    """What an outer start gives.

    Attributes:
        A: [r,i], or None where A is a slice of W.
        B: [o,r], or None where B is a slice of W.
        core: [r,r], the first core that comes with the outer factors (Nyström), before any scaling by `scale`.
        singular: [r], the singular values (SVD and AwSVD).
        rows: [r], indices into the rows of W, for A.
        cols: [r], indices into the columns of W, for B.
        a_transform: [r] (a factor a row) or [r,r], applied to W[rows, :] from the left.
        b_transform: [r] (a factor a column) or [r,r], applied to W[:, cols] from the right.
        channel_scale: [i], the d that was used (AwSVD), for whoever must make the same start again.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    core: Tensor | None = None
    singular: Tensor | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None
    a_transform: Tensor | None = None
    b_transform: Tensor | None = None
    channel_scale: Tensor | None = None


class Triplets(NamedTuple):
    """The top singular triplets of a matrix[o,i], largest first: U[o,n], S[n], Vh[n,i]."""

    U: Tensor
    S: Tensor
    Vh: Tensor


OuterFunction = Callable[[Weight, AdapterSpec, Any, torch.Generator], OuterStart]


@dataclass(frozen=True, kw_only=True)
class Outer:
    """An entry of the OUTERS table.

    Attributes:
        make: the function (weight, spec, what was measured or None, generator) -> OuterStart.
        zero_b: B starts at zero.
        needs_rank: r must not exceed the weight's smaller side.
        stats: the kind of statistics that it reads: "input" (the channel scale d[i]), "gradient" (Triplets), or None.
        reach: how many times r triplets of a gradient it reads.
        decomposes: costly to make again and sensitive to rounding, so its factors are stored.
        repeatable: a load could make it again; if not, the file must have its factors.
    """

    make: OuterFunction
    zero_b: bool = False
    needs_rank: bool = False
    stats: str | None = None
    reach: int = 1
    decomposes: bool = False
    repeatable: bool = True

    @property
    def needs_stats(self) -> bool:
        """Whether it reads statistics."""
        return self.stats is not None


def outer_start(name: str, **properties: Any) -> Callable[[OuterFunction], OuterFunction]:
    """Decorator that adds a function to the OUTERS table under `name`.

    A factor that may be frozen must be drawn from the function's generator: `store_outer: false` draws it again.
    """

    def add(make: OuterFunction) -> OuterFunction:
        OUTERS.add(name, Outer(make=make, **properties))
        return make

    return add


def kaiming_uniform(shape: tuple[int, int], generator: torch.Generator | None = None) -> Tensor:
    """Kaiming uniform with a = sqrt(5), as nn.Linear's own: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Drawn on the CPU from `generator` (the global one where None), so that a seed gives the same factors everywhere.
    """
    bound = 1 / math.sqrt(shape[1]) if shape[1] else 0.0
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@outer_start("kaiming", zero_b=True)
def kaiming(weight: Weight, spec: AdapterSpec, d: Tensor | None, generator: torch.Generator) -> OuterStart:
    """LoRA's start: A Kaiming, B zero. Hu 2021, section 4.1."""
    o, i = weight.shape
    source = None if spec.trains("A") else generator  # a frozen A must be repeatable, a trained one follows the run
    return OuterStart(A=kaiming_uniform((spec.r, i), source), B=torch.zeros(o, spec.r))


@outer_start("random")
def random(weight: Weight, spec: AdapterSpec, d: Tensor | None, generator: torch.Generator) -> OuterStart:
    """Both outer factors Kaiming uniform, for methods that freeze them."""
    o, i = weight.shape
    return OuterStart(A=kaiming_uniform((spec.r, i), generator), B=kaiming_uniform((o, spec.r), generator))


def truncated_svd(W: Tensor, r: int, solver: str, generator: torch.Generator) -> Triplets:
    """The top r singular triplets of W[o,i]: U[o,r], S[r], Vh[r,i].

    Args:
        W: float32 matrix.
        r: number of triplets, at most min(o, i).
        solver: "exact"; "randomized" (range finder with power iterations, Halko 2011, seeded; on weights of language
            models it keeps at least 99.9 % of the energy that the exact one keeps); or "auto", which takes the
            randomised one where it saves work (r at most a quarter of a side of at least 1,024).
        generator: for the randomised solver's test matrix.

    The sign of each triplet is set so that the largest entry of each row of Vh is positive: decompositions on two
    machines then agree wherever the singular values are apart.
    """
    small = min(W.shape)
    randomized = solver == "randomized" or (solver == "auto" and small >= 1024 and 4 * r <= small)
    if randomized:
        U, S, Vh = _randomized_svd(W, r, generator)
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    return signed(U, S, Vh)


def signed(U: Tensor, S: Tensor, Vh: Tensor) -> Triplets:
    """Triplets U[o,n], S[n], Vh[n,i] with the largest entry of each row of Vh positive."""
    sign = torch.sign(Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)))
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return Triplets(U * sign.T, S, Vh * sign)


def _randomized_svd(W: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Power iterations on a random subspace of 1.5 r directions until it captures no more of W's energy.

    Weights of language models have flat spectra (the 300th singular value of a SmolLM2 layer is two thirds of the
    128th): four iterations keep 98.6 to 99.98 % of the exact energy there, these on average nine at least 99.97 %.
    """
    width = min(r + max(16, r // 2), min(W.shape))
    Q = orthonormal(W @ random_signs((W.shape[1], width), generator, W.device).to(W), passes=1)
    before = 0.0
    for n in range(POWER_ITERATIONS + 1):
        Y = W.T @ Q
        kept = float(Y.square().sum())
        if n == POWER_ITERATIONS or kept - before <= ENERGY_TOLERANCE * kept:
            break
        before = kept
        if n < 2:  # steep spectra, whose small directions drown without it on each side, are done by then
            Y = orthonormal(Y, passes=1)
        Q = orthonormal(W @ Y, passes=1)
    right = orthonormal(Y)
    # W ~ Q Y^T = Q R^T right^T: only a small matrix is decomposed, and so small a one sooner on the CPU
    U, S, Vh = (t.to(W) for t in torch.linalg.svd((Y.T @ right).double().cpu()))
    return (Q @ U)[:, :r], S[:r], Vh[:r] @ right.T


def orthonormal(Y: Tensor, passes: int = 2) -> Tensor:
    """An orthonormal basis of the columns of Y[n,l], l at most n: Cholesky's QR, twice, in float64.

    Householder's QR, column after column, keeps a GPU waiting; it is taken where columns depend on each other.
    Yamamoto 2015, "Roundoff error analysis of the Cholesky QR2 algorithm".

    Args:
        Y: the columns.
        passes: one leaves an error of 1e-16 times the square of Y's condition, enough between two power iterations.
    """
    Q = Y.double()
    for _ in range(passes):
        L, failed = torch.linalg.cholesky_ex(Q.T @ Q)
        if failed:
            return torch.linalg.qr(Y).Q
        Q = torch.linalg.solve_triangular(L.T, Q, upper=True, left=False)
    return Q.to(Y)


def random_signs(shape: tuple[int, int], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """An int8 matrix of -1 and 1, as good as a Gaussian one for a range finder, of one random bit each.

    The bits are drawn on the CPU, the same for every device, and become numbers on theirs.
    """
    entries = shape[0] * shape[1]
    octets = torch.empty(-(-entries // 8), dtype=torch.uint8).random_(0, 256, generator=generator).to(device)
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    return bits.to(torch.int8).mul_(2).sub_(1).flatten()[:entries].view(shape)


def _place_singular_values(U: Tensor, S: Tensor, Vh: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """(A, B) with S in B (`left`), in A (`right`) or half in each (`split`). NoRA paper, Table 8."""
    if where == "left":
        return Vh, U * S
    if where == "right":
        return S[:, None] * Vh, U
    root = S.sqrt()
    return root[:, None] * Vh, U * root


@outer_start("svd", needs_rank=True, decomposes=True)
def svd(weight: Weight, spec: AdapterSpec, d: Tensor | None, generator: torch.Generator) -> OuterStart:
    """Top r of W = U S V^T; with `split` and everything trained it is PiSSA (Meng 2024, Eq. 2 to 4)."""
    W = weight.full()
    check_finite(W)
    U, S, Vh = truncated_svd(W, spec.r, spec.svd_solver, generator)
    A, B = _place_singular_values(U, S, Vh, spec.choices.singular_values)
    return OuterStart(A=A, B=B, singular=S)


@outer_start("awsvd", needs_rank=True, stats="input", decomposes=True)
def awsvd(weight: Weight, spec: AdapterSpec, d: Tensor | None, generator: torch.Generator) -> OuterStart:
    """Activation-aware SVD: W D = U S V^T, B = U S, A = V^T D^-1, so that B A approximates W where inputs are large.

    NoRA paper, section 3.3 and Algorithm 1. `d` None takes Algorithm 1's own numbers, the mean of |W| over rows.
    """
    W = weight.full()
    check_finite(W)
    d = W.abs().mean(dim=0) if d is None else d.to(W)
    d = floored(d)
    U, S, Vh = truncated_svd(W * d, spec.r, spec.svd_solver, generator)
    A, B = _place_singular_values(U, S, Vh, spec.choices.singular_values)
    return OuterStart(A=A / d, B=B, singular=S, channel_scale=d)


def floored(d: Tensor) -> Tensor:
    """The channel scale d[i] with dead channels lifted to a small part of the mean.

    Raises:
        CoreLoraError: d has NaN or infinite entries, is negative somewhere, or zero everywhere.
    """
    if not torch.isfinite(d).all():
        raise CoreLoraError("input statistics hold NaN or infinite values")
    if (d < 0).any() or not (d > 0).any():
        raise CoreLoraError("input statistics must be non-negative and not all zero")
    return d.clamp(min=STATS_FLOOR * float(d.mean()))


@outer_start("gradient", needs_rank=True, stats="gradient", repeatable=False)
def gradient(weight: Weight, spec: AdapterSpec, found: Triplets | None, generator: torch.Generator) -> OuterStart:
    """A[r,i] the top right, B[o,r] the top left singular vectors of the mean gradient of W; LoRA-SB's directions."""
    U, _, Vh = triplets_for(weight, spec, found, generator)
    return OuterStart(A=Vh, B=U)


def triplets_for(weight: Weight, spec: AdapterSpec, found: Triplets | None, generator: torch.Generator) -> Triplets:
    """As many of a gradient's triplets as the start reaches for; those of W itself where none were measured.

    W stands in for its gradient under `stats: weight`, where only shapes matter.
    """
    n = min(OUTERS[spec.choices.outer].reach * spec.r, *weight.shape)
    if found is None:
        W = weight.full()
        check_finite(W)
        return truncated_svd(W, n, spec.svd_solver, generator)
    return Triplets(found.U[:, :n], found.S[:n], found.Vh[:n])


@outer_start("nystrom", needs_rank=True)
def nystrom(weight: Weight, spec: AdapterSpec, d: Tensor | None, generator: torch.Generator) -> OuterStart:
    """A = W[rows, :], B = W[:, cols], core = W[rows, cols] or its pseudo-inverse. NLoRA paper, section 3 and Eq. 6.

    The core is what `B core A` needs for the starting product after scaling: the inverse transforms go into it.
    """
    sample = SAMPLINGS[spec.choices.sampling]
    rows = sample(weight, 0, spec.r, generator)
    cols = sample(weight, 1, spec.r, generator)
    return nystrom_at(weight, spec, rows, cols)


def nystrom_at(weight: Weight, spec: AdapterSpec, rows: Tensor, cols: Tensor) -> OuterStart:
    """The Nyström start at known indices rows[r], cols[r]: what a load runs again on the base weight."""
    row_slice, col_slice = weight.rows(rows), weight.cols(cols)
    check_finite(row_slice, col_slice)
    core = row_slice[:, cols.to(row_slice.device)]
    if spec.choices.core_start == "pinv":
        core = pseudo_inverse(core, spec.choices.pinv_rtol)
    a_transform, a_inverse = slice_transform(row_slice, spec.choices.slice_scale)
    b_transform, b_inverse = slice_transform(col_slice.T, spec.choices.slice_scale)
    if a_inverse is not None and b_inverse is not None:
        core = _left(b_inverse, _right(core, a_inverse))
    return OuterStart(rows=rows, cols=cols, core=core, a_transform=a_transform, b_transform=b_transform)


def check_finite(*tensors: Tensor) -> None:
    """Raise CoreLoraError where a weight holds NaN or infinity: a start made of it would poison the run."""
    # NaN wins in aminmax: one pass, no mask of the tensor's size, and one wait for the device for all tensors.
    ends = [end for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor)]
    if ends and not bool(torch.isfinite(torch.stack(ends)).all()):
        raise CoreLoraError("the base weight holds NaN or infinite values")


def pseudo_inverse(core: Tensor, rtol: float | None) -> Tensor:
    """Moore-Penrose inverse of core[r,r] in float64; singular values under rtol times the largest count as zero.

    `rtol=None` cuts nothing but exact zeros, which is Eq. 6 as printed: with leading rows and columns of a real weight
    the result has entries of 1 over the smallest singular value.
    """
    U, S, Vh = torch.linalg.svd(core.double())
    keep = (0.0 if rtol is None else rtol) * S[0] < S
    inverse = torch.where(keep, 1 / S.where(keep, torch.ones_like(S)), torch.zeros_like(S))
    return ((Vh.T * inverse) @ U.T).to(core.dtype)


# Of a slice's largest singular value. A transform in bfloat16, whose numbers are 2^-8 apart, can't make weaker ones
# orthonormal: what rounding leaves of the strong directions would be as large.
_WEAKEST = 2.0**-8


def slice_transform(rows: Tensor, scale: str) -> tuple[Tensor | None, Tensor | None]:
    """What makes the rows of a slice[r,i] unit or orthonormal, and its inverse: ([r] or [r,r], the same) or Nones.

    `orthonormal` is the symmetric inverse root (Y Y^T)^(-1/2): unlike QR or SVD it is continuous in the slice and has
    no sign to choose, so that it can be made again from the base weight at load. Directions weaker than `_WEAKEST` of
    the strongest are made stronger only as much as that one is: a square slice of a real weight is nearly singular.
    """
    if scale == "none":
        return None, None
    if scale == "unit":
        norm = rows.norm(dim=1)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        return 1 / norm, norm
    values, vectors = torch.linalg.eigh(rows.double() @ rows.double().T)
    root = values.clamp(min=_WEAKEST**2 * float(values[-1].clamp(min=1e-30))).sqrt()
    transform = (vectors / root) @ vectors.T
    inverse = (vectors * root) @ vectors.T
    return transform.to(rows.dtype), inverse.to(rows.dtype)


def _left(t: Tensor, M: Tensor) -> Tensor:
    return t[:, None] * M if t.ndim == 1 else t @ M


def _right(M: Tensor, t: Tensor) -> Tensor:
    return M * t if t.ndim == 1 else M @ t


def transformed_rows(slice_: Tensor, transform: Tensor | None) -> Tensor:
    """transform W[rows, :]: [r,i] from a slice [r,i] and a transform [r], [r,r] or None."""
    return slice_ if transform is None else _left(transform.to(slice_), slice_)


def transformed_cols(slice_: Tensor, transform: Tensor | None) -> Tensor:
    """W[:, cols] transform: [o,r] from a slice [o,r] and a transform [r], [r,r] or None."""
    return slice_ if transform is None else _right(slice_, transform.to(slice_))
