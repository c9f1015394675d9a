"""A CLIP of ViT-B/16 size with random weights, for the time and memory of few-shot training without a download.

    python benchmarks/clip_b16.py clip-b16 recipes/vision/nora-paper/dtd.yaml
    corelora train recipes/vision/nora-paper/dtd.yaml --set model.name=clip-b16

Time and memory do not depend on what the weights are; accuracies mean nothing. The tokenizer is trained on the recipe's
own prompts, so that a word is about one token, as it is in CLIP's. `--tiny` writes two layers of width 32 a tower.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from corelora.recipe import Recipe, load_recipe
from corelora.train.clip_few_shot import ClipFewShot
from corelora.train.pictures import chosen_of

WORDS = 49408  # CLIP's vocabulary, so that its embedding has the real size
START, STOP = "<|startoftext|>", "<|endoftext|>"
TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_tokenizer(prompts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of some prompts and ends each text as CLIP's does."""
    raw = Tokenizer(models.BPE(unk_token=STOP))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(prompts, trainers.BpeTrainer(vocab_size=4000, special_tokens=[START, STOP]))
    ends = [(token, raw.token_to_id(token)) for token in (START, STOP)]
    raw.post_processor = processors.TemplateProcessing(single=f"{START} $A {STOP}", special_tokens=ends)
    names = {"bos_token": START, "eos_token": STOP, "pad_token": STOP, "unk_token": STOP}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=77, **names)


def make_model(tokenizer: PreTrainedTokenizerFast, tiny: bool) -> CLIPModel:
    """Random weights from a fixed seed."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**(TINY if tiny else TEXT), **ids, "pad_token_id": ids["eos_token_id"], "vocab_size": WORDS}
    vision = {**(TINY if tiny else VISION), "patch_size": 16, "image_size": 224}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32 if tiny else 512))


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipe", type=Path, help="whose prompts are tokenised; its pictures must be there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for `corelora train`")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    recipe = load_recipe(Recipe, arguments.recipe, arguments.set)
    tokenizer = make_tokenizer(ClipFewShot().texts(recipe, chosen_of(recipe)))
    model = make_model(tokenizer, arguments.tiny)
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    CLIPImageProcessor().save_pretrained(arguments.folder)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters in {arguments.folder}. Next:")
    changes = " ".join(f"--set {s}" for s in [*arguments.set, f"model.name={arguments.folder}"])
    print(f"  corelora train {arguments.recipe} {changes}")


if __name__ == "__main__":
    main()
