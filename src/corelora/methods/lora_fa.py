"""LoRA-FA: LoRA with A frozen. Zhang et al. 2023, arXiv 2308.03303, section 3.

    delta W = B A       A Kaiming (the paper: random normal), frozen; B zero, trained

With A frozen the layer's input is not needed for the backward pass.
"""

from corelora.spec import Choices, register_method

_choices = Choices(outer="kaiming", core="none", train=("B",), start="zero")

LORA_FA = register_method(
    "lora_fa",
    title="LoRA-FA",
    paper="Zhang et al. 2023, arXiv 2308.03303",
    default=_choices,
    departures="A is Kaiming uniform, as LoRA's",
    settings={},
)
