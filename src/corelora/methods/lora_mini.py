"""LoRA-Mini: a trained pair between two frozen random factors. Singh et al. 2024, arXiv 2411.15804, section 3.

    delta W = B B' A' A       A, B Kaiming uniform, frozen; A' Kaiming, B' zero, trained

The frozen factors are random, so `store_outer: False` makes them again from the seed and keeps the file small.
"""

from corelora.spec import Choices, register_method

_choices = Choices(outer="random", core="nested", train=("core",), start="zero", core_start="zero_b")

LORA_MINI = register_method(
    "lora_mini",
    title="LoRA-Mini",
    paper="Singh et al. 2024, arXiv 2411.15804",
    default=_choices,
    departures="none",
    settings={},
)
