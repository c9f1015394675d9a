"""NoRA: Nested Low-Rank Adaptation. NoRA paper, section 3.2, Eq. 2, and Algorithm 1.

    delta W = B B' A' A       A, B from activation-aware SVD, frozen; A'[k,r], B'[r,k] trained

Where the paper is silent or contradicts itself:
- S of Eq. 3 sums over the index that it should keep, and the text once says standard deviations; Algorithm 1 takes the
  mean of |W| over rows. We read Eq. 3 as one number an input channel, the square root of the mean |x_j| over tokens
  (ASVD's scaling with power 0.5; `stats_power` sets another); `stats="weight"` gives Algorithm 1's.
- Eq. 6 leaves S^-1 out of A, section 3.2 and Algorithm 1 have it: A = V^T S^-1, as here.
- The singular values stand in B (section 3.2: `left`); Table 8 names its pair the other way round.
- Inner start: "Gaussian N(0, sigma^2)" with no sigma. Published: both inner factors Gaussian, sigma 1e-3, `as_is`.
  Default: A' Kaiming and B' zero, so that training begins at the pretrained model; it reaches a lower loss (0.860
  against 0.892 on GSM8K with SmolLM2).
"""

from corelora.spec import Choices, register_method

_choices = Choices(
    outer="awsvd", core="nested", train=("core",), start="zero", core_start="zero_b", singular_values="left"
)

NORA = register_method(
    "nora",
    title="NoRA",
    paper="NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models, section 3",
    default=_choices,
    published=_choices.changed(start="as_is", core_start="gaussian", core_std=1e-3),
    departures="B' starts at zero instead of a Gaussian, so that training begins at the pretrained model",
    settings={"r": 64, "inner_r": 32, "batch_size": 128, "epochs": 2, "schedule": "cosine", "warmup_ratio": 0.02},
)
