"""LoRA-XS: a trained r x r core between frozen singular vectors. Balazy et al. 2024, arXiv 2405.17604, section 3.

delta W = B core A       A = V^T, B = U S, top r of W = U S V^T, frozen; core Gaussian, std 1e-5
"""

from corelora.spec import Choices, register_method

_choices = Choices(
    outer="svd",
    core="dense",
    train=("core",),
    start="as_is",
    core_start="gaussian",
    core_std=1e-5,
    singular_values="left",
)

LORA_XS = register_method(
    "lora_xs",
    title="LoRA-XS",
    paper="Balazy et al. 2024, arXiv 2405.17604",
    default=_choices,
    departures="none",
    settings={"lr": 0.001},
)
