"""PiSSA: Principal Singular values and Singular vectors Adaptation. Meng et al. 2024, arXiv 2404.02948, Eq. 2 to 4.

    delta W = B A - B0 A0       A0 = sqrt(S) V^T, B0 = U sqrt(S), top r of W = U S V^T       both trained

The paper replaces W by the residual W - B0 A0. Here W is never changed: the start is subtracted inside the adapter,
which is the same function, and disabling the adapter gives the pretrained model back.
"""

from corelora.spec import Choices, register_method

_choices = Choices(outer="svd", core="none", train=("A", "B"), start="subtract", singular_values="split")

PISSA = register_method(
    "pissa",
    title="PiSSA",
    paper="Meng et al. 2024, arXiv 2404.02948",
    default=_choices,
    departures="the residual is kept inside the adapter instead of in the base weight",
    settings={"r": 128, "lr": 2e-05},
)
