"""LoRA-SB: a trained r x r core between singular vectors of the first gradients. Ponkshe et al. 2024, arXiv 2411.19557.

    delta W = B core A       A = V^T, B = U, top r of the mean gradient G = U S V^T over a few batches, frozen

What was read: the abstract, and of the authors' code how gradients are gathered. There the gradients of single rows are
added up and replaced by their signs, times minus the learning rate, as AdamW's first step would; that step is what is
decomposed, and the core begins at its singular values, so that training begins one step away from the pretrained model.

What was chosen: the gradient itself is decomposed, which a sketch can hold for a large model where its signs need all
of it; batches are averaged, each as a loss of its own; and the core begins at zero, so that training begins at the
pretrained model and no learning rate is part of the start. A dense core reaches the same products from either.
"""

from corelora.spec import Choices, register_method

LORA_SB = register_method(
    "lora_sb",
    title="LoRA-SB",
    paper="Ponkshe et al. 2024, arXiv 2411.19557",
    default=Choices(outer="gradient", core="dense", train=("core",), start="zero", core_start="zeros"),
    departures="gradients are decomposed without taking signs, and the core begins at zero instead of a first step",
)
