"""From adapters to what others load: plain LoRA pairs, plain LoRA folders, merged weights.

The pair of a trained adapter is exact and needs no SVD:

- nothing is subtracted: `left[o,q] right[q,i]`, q = r, or k for a nested core;
- A (or B) never moves: the difference is `(B core - B0 core0) A0` (or `B0 (core A - core0 A0)`), rank r;
- otherwise `dL R + L0 dR` of the chain's two halves L and R: rank 2q, as `[dL, L0]` beside `[R; dR]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corelora.adapter import CoreAdapter, Factors
from corelora.registry import CORES


def lora_pair(
    core: CoreAdapter, factors: Factors, W: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(lora_A[q,i], lora_B[o,q]) with `lora_B @ lora_A` equal to the adapter's delta, scale folded into lora_B.

    Args:
        core: what the adapter is.
        factors: its factors.
        W: the base weight W[o,i], where the adapter reads slices of it.
        dtype: computed in this type; float32 or wider.
    """
    left, right = _shortest(core, factors, W, dtype)
    return right, core.spec.scale * left


def _shortest(core: CoreAdapter, factors: Factors, W: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    stages = core.stages
    structure = CORES[core.spec.choices.core]
    if not core.has_offsets:
        return _halves(core, factors, W, dtype, structure.cut)[:2]
    candidates = []
    for cut in sorted({1, structure.cut, len(stages) - 1}):
        L, R, dL, dR = _halves(core, factors, W, dtype, cut)
        if dR is None:
            assert dL is not None
            candidates.append((dL, R))
        elif dL is None:
            candidates.append((L, dR))
        else:
            # dL R + L0 dR, with L0 = L - dL
            candidates.append((torch.cat([dL, L - dL], dim=1), torch.cat([R, dR], dim=0)))
    return min(candidates, key=lambda pair: pair[1].shape[0])


def _halves(
    core: CoreAdapter, factors: Factors, W: Tensor | None, dtype: torch.dtype, cut: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(L, R, dL, dR) of the chain cut after `cut` stages; a difference of None is zero."""
    R, dR = core.chain_matrices(factors, W, core.stages[:cut], dtype)
    L, dL = core.chain_matrices(factors, W, core.stages[cut:], dtype)
    return L, R, dL, dR


def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-`rank` factors of B A (Eckart and Young), by QR of both and an SVD of the small product.

    Args:
        A: [q,i].
        B: [o,q].
        rank: the new rank; more than there is gives what there is.

    Returns:
        A'[rank,i] and B'[o,rank] with the singular values split evenly, and all singular values of B A.
    """
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * (Vh[:rank] @ Qa.T), (Qb @ U[:, :rank]) * root, S
