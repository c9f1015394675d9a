"""IntTune: IntermediateTune, NLoRA with only the core trained. NLoRA paper, section 4.3.

    delta W = B (core - core0) A       A = W[I, :], B = W[:, J] frozen, core trained

Published: no scaling of the slices and the starting product added as it stands (`as_is`), core0 = W[I, J]. On
SmolLM2-135M that diverges (NaN at the paper's learning rate of 2e-3): the slices' rows are as large as the weight's.
Default: rows of A and columns of B made orthonormal (`slice_scale: orthonormal`), and the start subtracted. The trained
core then begins at zero, and core0 has no effect at all: nothing is stored but the core. With slices scaled to norm 1
(`unit`) it ends at higher losses and takes two small products a pass less (docs/defaults.md).
"""

from corelora.spec import Choices, register_method

_choices = Choices(
    outer="nystrom", core="dense", train=("core",), start="subtract", core_start="nystrom", slice_scale="orthonormal"
)

INTTUNE = register_method(
    "inttune",
    title="IntTune",
    paper="NLoRA: Nystrom-Initiated Low-Rank Adaptation for Large Language Models, section 4.3",
    default=_choices,
    published=_choices.changed(start="as_is", slice_scale="none", pinv_rtol=0.0),
    departures="slices are made orthonormal and the starting product is subtracted; the raw start diverges",
    settings={"r": 128, "lr": 0.002, "batch_size": 4, "schedule": "cosine", "warmup_ratio": 0.03, "epochs": 1},
)
