"""MoSLoRA: Mixture-of-Subspaces LoRA. Wu et al. 2024, arXiv 2406.11909, section 3.2.

    delta W = B core A       A Kaiming, core (the mixer) orthogonal, B zero       all three trained

The paper offers an orthogonal and a Kaiming mixer (`core_start: kaiming`) and rejects identity-like fixed ones.
"""

from corelora.spec import Choices, register_method

_choices = Choices(outer="kaiming", core="dense", train=("A", "core", "B"), start="zero", core_start="orthogonal")

MOSLORA = register_method(
    "moslora",
    title="MoSLoRA",
    paper="Wu et al. 2024, arXiv 2406.11909",
    default=_choices,
    departures="none",
    settings={"r": 16, "lr": 0.0003},
)
