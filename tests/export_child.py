"""Run in a process of its own: load plain LoRA folders with plain PEFT and report their outputs.

    python export_child.py FOLDER

FOLDER/<base>/ are base models, FOLDER/<base>.<case>/ exports, FOLDER/ids.safetensors the input. The outputs go to
FOLDER/outputs.safetensors, one tensor an export. corelora must not be imported, here or by whatever PEFT imports.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, LlamaForCausalLM

CLASSES = {"llama": LlamaForCausalLM, "bert": BertForMaskedLM}


def main(folder: Path) -> None:
    """Load each export on its base and save the logits."""
    torch.set_num_threads(1)
    ids = load_file(folder / "ids.safetensors")["ids"]
    outputs = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and "." in p.name):
        name = path.name.split(".")[0]
        base = CLASSES[name].from_pretrained(folder / name)
        model = PeftModel.from_pretrained(base, path).eval()
        with torch.no_grad():
            outputs[path.name] = model(input_ids=ids).logits.contiguous()
    assert "corelora" not in sys.modules
    save_file(outputs, folder / "outputs.safetensors")


main(Path(sys.argv[1]))
