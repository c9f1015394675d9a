"""FLoRA: Low-Rank Core Space for N-dimension. Si et al. 2024, arXiv 2405.14739: a Tucker core, for a linear layer.

    delta W = B core A       A, B Kaiming normal, core zero       all three trained

The authors' code draws each outer factor as Kaiming normal with a = sqrt 3 over a tensor [side, r], so its entries have
standard deviation sqrt(1/2) / sqrt(r), and starts the core at zero. That start is used by this method alone.
"""

import math

import torch
from torch import Tensor

from corelora.outer import OuterStart, Weight, outer_start
from corelora.spec import AdapterSpec, Choices, register_method


@outer_start("tucker")
def tucker(weight: Weight, spec: AdapterSpec, d: Tensor | None, generator: torch.Generator) -> OuterStart:
    """A[r,i] and B[o,r] normal with standard deviation sqrt(1/2) / sqrt(r)."""
    o, i = weight.shape
    std = math.sqrt(0.5 / spec.r)
    a_source, b_source = (None if spec.trains(part) else generator for part in "AB")  # frozen: repeatable
    A = torch.randn(spec.r, i, generator=a_source)
    return OuterStart(A=std * A, B=std * torch.randn(o, spec.r, generator=b_source))


FLORA = register_method(
    "flora",
    title="FLoRA",
    paper="Si et al. 2024, arXiv 2405.14739",
    default=Choices(outer="tucker", core="dense", train=("A", "core", "B"), start="zero", core_start="zeros"),
)
