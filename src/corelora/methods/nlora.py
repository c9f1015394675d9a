"""NLoRA: Nystrom-initialised LoRA. Anonymous ACL submission "NLoRA" (papers' notation Y = X(W + A N B)), section 3.

    delta W = B core A       A = W[I, :]   core = W[I, J]   B = W[:, J]       all three trained

The paper writes W[m,n] with m inputs; its A, N, B are our A, core, B, each transposed. Equation 6 derives the core as
the pseudo-inverse of W[I, J]; the paper then takes W[I, J] itself, to be spared an SVD, and so do we
(`core_start: pinv` gives Equation 6, whose singular values below `pinv_rtol` of the largest count as zero: with leading
rows and columns the plain pseudo-inverse of a real weight is 7 to 200 times too large).

Published: raw slices, core W[I, J], and the starting product added as it stands (the authors' code), so that the first
output is not the pretrained model's. On a model with large weights that start diverges. Default: the starting product
is subtracted (`start: subtract`), which keeps the first output; rows of A and columns of B are scaled to norm 1 and the
core begins as the identity (`slice_scale: unit`, `core_start: identity`). A raw slice and a core of the weight's own
numbers differ in size by layer, and one learning rate must suit the largest: rates that train well are low and few.
docs/defaults.md has the figures.
"""

from corelora.spec import Choices, register_method

_choices = Choices(
    outer="nystrom",
    core="dense",
    train=("A", "core", "B"),
    start="subtract",
    core_start="nystrom",
    sampling="first",
)

NLORA = register_method(
    "nlora",
    title="NLoRA",
    paper="NLoRA: Nystrom-Initiated Low-Rank Adaptation for Large Language Models, section 3",
    default=_choices.changed(slice_scale="unit", core_start="identity"),
    published=_choices.changed(start="as_is", pinv_rtol=0.0),
    departures="the starting product is subtracted; slices are scaled to norm 1, and the core begins as the identity",
    settings={"r": 128, "lr": 2e-4, "batch_size": 4, "schedule": "cosine", "warmup_ratio": 0.03, "epochs": 1},
)
