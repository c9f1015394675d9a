"""What a recipe says about a subject that a diffusion model learns."""

from __future__ import annotations

from dataclasses import dataclass

from corelora.recipe.tree import setting


@dataclass(kw_only=True)
class SubjectPart:
    """The subject, its prompts, and the loss."""

    prompt: str = setting("What the training pictures show, with a rare word: `a photo of sks dog`.")
    class_prompt: str | None = setting(
        "Prior preservation: what pictures of any such thing show, `a photo of a dog`.", None
    )
    class_images: int = setting(
        "Pictures of the class; those that are missing are made by the model before training.", 100
    )
    prior_weight: float = setting("Weight of the prior's loss.", 1.0)
    size: int | None = setting("Side of a training picture in pixels; the model's own if not given.", None)
    min_snr: float | None = setting("Gamma of the min-SNR weighting of the loss (5 in its paper).", None)
    text_encoder: bool = setting("Adapters on the text encoders, too.", False)
    inference_steps: int = setting("Steps of a picture that is made.", 50)
    validation_prompts: list[str] = setting(
        "Prompts of pictures made as training goes and at its end (`prompt` then).", list
    )
    validate_every: int | None = setting("Steps between them; only at the end if not given.", None)

    def problems(self) -> list[str]:
        """Numbers out of range, keys without effect."""
        counts = {n: getattr(self, n) for n in ("class_images", "size", "inference_steps", "validate_every")}
        found = [f"{n} must be at least 1, got {v}" for n, v in counts.items() if v is not None and v < 1]
        if self.prior_weight < 0:
            found.append(f"prior_weight must not be negative, got {self.prior_weight}")
        if self.min_snr is not None and not self.min_snr > 0:
            found.append(f"min_snr must be above 0, got {self.min_snr}")
        if not self.prompt.strip():
            found.append("prompt must say what the pictures show, `a photo of sks dog`")
        if self.class_prompt == self.prompt:
            found.append("class_prompt must be without the rare word: it is the same as prompt")
        if self.validate_every is not None and not self.validation_prompts:
            found.append("validate_every needs validation_prompts: there is nothing to draw")
        return found
