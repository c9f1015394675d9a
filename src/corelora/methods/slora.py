"""SLoRA: StructuredLoRA, LoRA with a trained r x r core. NLoRA paper (anonymous ACL submission), section 3, Eq. 7.

    delta W = B core A       A Kaiming, core dense, B zero       all three trained

The core's first value: the paper's Table 7 says Gaussian and gives no standard deviation, the authors' code has 1/r.
Published: Gaussian with standard deviation 1/r. Default: Kaiming uniform, whose entries have
the same size at every rank relative to 1/sqrt(r), so that `core A x` keeps the size of `A x`.
"""

from corelora.spec import Choices, register_method

_choices = Choices(outer="kaiming", core="dense", train=("A", "core", "B"), start="zero", core_start="kaiming")

SLORA = register_method(
    "slora",
    title="SLoRA",
    paper="NLoRA: Nystrom-Initiated Low-Rank Adaptation for Large Language Models, section 3, Eq. 7",
    default=_choices,
    published=_choices.changed(core_start="gaussian", core_std="1/r"),
    departures="the core is Kaiming uniform; the paper says Gaussian without a standard deviation",
    settings={"r": 128, "lr": 0.0002, "batch_size": 4, "schedule": "cosine", "warmup_ratio": 0.03, "epochs": 1},
)
