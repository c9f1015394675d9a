"""LoRA: Low-Rank Adaptation. Hu et al. 2021, arXiv 2106.09685, section 4.1.

    delta W = B A       A Kaiming uniform (a = sqrt 5), B zero       both trained

The paper says Gaussian for A; the authors' code and PEFT draw Kaiming uniform, as here.
"""

from corelora.spec import Choices, register_method

_choices = Choices(outer="kaiming", core="none", train=("A", "B"), start="zero")

LORA = register_method(
    "lora",
    title="LoRA",
    paper="Hu et al. 2021, arXiv 2106.09685",
    default=_choices,
    departures="A is Kaiming uniform, as in the authors' code (the paper says Gaussian)",
    settings={"r": 16, "lr": 0.0002},
)
