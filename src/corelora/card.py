"""The model card of an adapter folder: what to import before loading it, and how to get a plain LoRA from it.

PEFT writes its own card first. Ours is one marked section under the card's metadata, replaced at each save; everything
else in the file, PEFT's or the user's, stays as it is. Without corelora imported, PEFT answers `KeyError: 'CORELORA'`
to such a folder, and the card is where that is explained.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

BEGIN, END = "<!-- corelora: begin -->", "<!-- corelora: end -->"
TAG = "corelora"

_SECTION = """{begin}
## How to load this adapter

This is a **{method}** adapter (variant `{variant}`, r = {r}) made with `corelora`, a plug-in of PEFT. Import it once
before loading; without it PEFT stops with `KeyError: 'CORELORA'`.

```python
import corelora  # pip install corelora
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

`AutoPeftModelForCausalLM`, transformers' `load_adapter` and `from_pretrained("path/to/this/folder")` work too, after
the same import. For software that knows LoRA only (vLLM, SGLang, llama.cpp, plain PEFT), export a LoRA with equal
outputs:

```
corelora export path/to/this/folder path/to/plain-lora
```
{end}"""


def section(method: str, variant: str, r: int) -> str:
    """The text that goes into a card, between its markers."""
    return _SECTION.format(begin=BEGIN, end=END, method=method, variant=variant, r=r)


def write_card(folder: str | Path, method: str, variant: str, r: int, base_model: str | None = None) -> Path:
    """Write corelora's section into the folder's README.md, which is made where there is none.

    Args:
        folder: an adapter folder.
        method, variant, r: what the adapter is.
        base_model: name of the base model, for a new card's metadata.

    Returns:
        The card's path.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else _new_card(base_model)
    text, ours = card.text, section(method, variant, r)
    if BEGIN in text and END in text:
        before, rest = text.split(BEGIN, 1)
        card.text = before + ours + rest.split(END, 1)[1]
    else:
        card.text = f"\n{ours}\n\n{text.lstrip()}"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), TAG})
    card.save(path)
    return path


def _new_card(base_model: str | None) -> ModelCard:
    card = ModelCard("---\nlibrary_name: peft\n---\n")
    if base_model:
        card.data["base_model"] = base_model
    return card
