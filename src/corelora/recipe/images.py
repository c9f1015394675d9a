"""What a recipe says about pictures."""

from __future__ import annotations

from dataclasses import dataclass

from corelora.recipe.tree import setting

AUGMENTS = ("none", "light", "strong")


@dataclass(kw_only=True)
class ImagesPart:
    """Which pictures of a set, and how they become tensors."""

    classes: list[str] | None = setting("Only these classes, as the set names them; all if not given.", None)
    split_file: str | None = setting("CoOp's split file of the set (split_zhou_*.json): which picture is where.", None)
    shots: int | None = setting("Pictures a class to train on, drawn with the run's seed; all if not given.", None)
    augment: str = setting(
        "While training: `light` crops at least half of a picture and flips it, `strong` crops at least 8 % (as "
        "CLIP-LoRA does), `none` does nothing.",
        "light",
        choices=AUGMENTS,
    )
    templates: list[str] | None = setting(
        "Prompts of a class name, `a photo of a {}.`; the set's own if not given.", None
    )

    def problems(self) -> list[str]:
        """Numbers out of range, templates without a place for the name."""
        found = [f"shots must be at least 1, got {self.shots}"] if self.shots is not None and self.shots < 1 else []
        return found + [
            f"templates: {t!r} must have one {{}}, for the class name, and no other brace"
            for t in self.templates or ()
            if t.count("{}") != 1 or set("{}") & set(t.replace("{}", ""))
        ]
