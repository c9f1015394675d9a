"""Greedy replies written in batches against replies written one by one: where they part, and how close the call was.

    python benchmarks/batched_replies.py gsm8k_test.jsonl --out docs/results/batched-replies.json

In float32 both should be the same text. In bfloat16 a step where two tokens are nearly level can fall either way: for
each reply that differs, the gap between the two highest logits at the first differing token is written down (a logit of
size 20 has steps of 0.125 in bfloat16).
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from corelora.evaluate.subject import find_subject, load_subject
from corelora.run.generate import Writing, chat_prompt, write_batch


def replies(model: Any, tokenizer: Any, prompts: list[str], size: int, writing: Writing) -> list[str]:
    """The texts of all replies, in the prompts' order, written `size` at a time by length."""
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    out = [""] * len(prompts)
    for start in tqdm(range(0, len(order), size), desc=f"{size} at a time", unit="batch"):
        chosen = order[start : start + size]
        made = write_batch(model, tokenizer, [prompts[n] for n in chosen], writing)
        for n, reply in zip(chosen, made, strict=True):
            out[n] = reply.text
    return out


@torch.no_grad()
def gap(model: Any, tokenizer: Any, prompt: str, one: str, other: str) -> float:
    """Between the two highest logits where the replies part."""
    a, b = (tokenizer(prompt + text, add_special_tokens=False)["input_ids"] for text in (one, other))
    at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    logits = model(torch.tensor([a[:at]], device=model.device)).logits[0, -1].float()
    high = logits.topk(2).values
    return float(high[0] - high[1])


def compare(name: str, dtype: str, questions: list[str], size: int, writing: Writing) -> dict[str, Any]:
    """One type's figures."""
    model, tokenizer = load_subject(find_subject(name, None, dtype))
    prompts = [chat_prompt(tokenizer, q) for q in questions]
    single = replies(model, tokenizer, prompts, 1, writing)
    batched = replies(model, tokenizer, prompts, size, writing)
    parted = [n for n in range(len(prompts)) if single[n] != batched[n]]
    gaps = [round(gap(model, tokenizer, prompts[n], single[n], batched[n]), 4) for n in parted]
    return {"dtype": dtype, "replies": len(prompts), "equal": len(prompts) - len(parted), "gaps where not": gaps}


def main() -> None:
    """Compare in float32 and bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines with a `question`")
    parser.add_argument("--model", default="package:smollm2")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()[: arguments.limit]
    questions = [json.loads(line)["question"] for line in lines]
    writing = Writing(arguments.new_tokens)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    found: dict[str, Any] = {"model": arguments.model, "device": device, "torch": torch.__version__}
    found |= {"batch_size": arguments.batch_size, "new_tokens": arguments.new_tokens, "types": []}
    for dtype in ("float32", "bfloat16"):
        found["types"].append(compare(arguments.model, dtype, questions, arguments.batch_size, writing))
        print(json.dumps(found["types"][-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
