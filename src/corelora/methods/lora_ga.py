"""LoRA-GA: LoRA between singular vectors of the first gradients. Wang et al. 2024, arXiv 2407.05000.

    delta W = B A - B0 A0    A0 = f V[:, :r]^T, B0 = f U[:, r:2r], mean gradient G = U S V^T    both trained

The factor f = o^(1/4) / sqrt(gamma) is their "stable" scale, o the weight's rows, gamma 16 as in PEFT's implementation.
The paper subtracts the start from W; here W is never changed, the start is subtracted inside the adapter.

What was read: the abstract and PEFT's implementation, which multiplies B alone, and that by singular values of the
gradient, too. We scale both alike and leave the singular values out, for they depend on the size of the loss. A weight
with a side shorter than 2r gives B the last r left vectors that there are.
"""

import math

import torch

from corelora.outer import OuterStart, Triplets, Weight, outer_start, triplets_for
from corelora.spec import AdapterSpec, Choices, register_method

GAMMA = 16


@outer_start("gradient_pair", needs_rank=True, stats="gradient", reach=2, repeatable=False)
def gradient_pair(weight: Weight, spec: AdapterSpec, found: Triplets | None, generator: torch.Generator) -> OuterStart:
    """A[r,i] of the first r right singular vectors, B[o,r] of the next r left ones, both scaled."""
    U, _, Vh = triplets_for(weight, spec, found, generator)
    size = weight.shape[0] ** 0.25 / math.sqrt(GAMMA)
    return OuterStart(A=size * Vh[: spec.r], B=size * U[:, -spec.r :])


LORA_GA = register_method(
    "lora_ga",
    title="LoRA-GA",
    paper="Wang et al. 2024, arXiv 2407.05000",
    default=Choices(outer="gradient_pair", core="none", train=("A", "B"), start="subtract"),
    departures="the start is subtracted inside the adapter instead of from the base weight",
)
