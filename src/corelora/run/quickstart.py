"""The quick start: fine-tune a real language model with NLoRA on arithmetic word problems, and see what changed.

    python -m corelora.run.quickstart [--steps 100] [--out runs/quickstart]

Stages: model, data, answers before, training, answers after, adapter, plain LoRA, report.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import corelora
from corelora import CoreLoraConfig
from corelora.run.generate import chat_prompt, replies
from corelora.run.models import load_causal_lm, smollm2_folder
from corelora.tasks.word_problems import TEMPLATES, Problem, held_out_problems, scores, training_problems


@dataclass
class Settings:
    """Everything that the run depends on; written into its results."""

    steps: int = 100
    batch_size: int = 8
    lr: float = 2e-4
    r: int = 32
    method: str = "nlora"
    held_out: int = 210
    seed: int = 0
    out: str = "runs/quickstart"


def encode(tokenizer: Any, problem: Problem) -> dict[str, list[int]]:
    """Token ids and labels of one training example: the loss is on the reply and its end, not on the prompt."""
    prompt = tokenizer(chat_prompt(tokenizer, problem.question), add_special_tokens=False)["input_ids"]
    reply = tokenizer(problem.solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}


class Collator:
    """Pads a batch on the right; padding has no label and no attention."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(r["input_ids"]) for r in rows)
        pads = [width - len(r["input_ids"]) for r in rows]
        ids = [r["input_ids"] + [self.pad_token_id] * n for r, n in zip(rows, pads, strict=True)]
        labels = [r["labels"] + [-100] * n for r, n in zip(rows, pads, strict=True)]
        mask = [[1] * len(r["input_ids"]) + [0] * n for r, n in zip(rows, pads, strict=True)]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
        }


def train(model: Any, tokenizer: Any, settings: Settings) -> list[dict[str, float]]:
    """Train the adapter with transformers' Trainer; returns its log of losses."""
    rows = [encode(tokenizer, p) for p in training_problems(settings.steps * settings.batch_size, settings.seed)]
    arguments = TrainingArguments(
        output_dir=str(Path(settings.out) / "trainer"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=model.dtype == torch.bfloat16,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=Collator(tokenizer.pad_token_id))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def adapt(model: Any, settings: Settings) -> PeftModel:
    """Put the adapter on all linear layers."""
    config = CoreLoraConfig(
        method=settings.method,
        r=settings.r,
        target_modules="all-linear",
        on_small_layer="clip",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """All stages on the model in `folder`; returns the results that are also saved.

    Args:
        settings: what to do.
        folder: a folder with a chat model and its tokenizer.
    """
    began = time.time()
    torch.manual_seed(settings.seed)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_causal_lm(folder)
    problems = held_out_problems(settings.held_out)
    questions = [p.question for p in problems]
    print(f"\n{len(problems)} held-out problems; the base model answers first\n", flush=True)
    before = replies(model, tokenizer, questions, desc="before")
    tuned = adapt(model, settings)
    trainable, total = tuned.get_nb_trainable_parameters()
    print(f"\n{settings.method}, r = {settings.r}: {trainable:,} of {total:,} parameters train\n", flush=True)
    losses = train(tuned, tokenizer, settings)
    tuned.save_pretrained(str(out / "adapter"))
    tokenizer.save_pretrained(out / "adapter")
    tuned.merge_adapter()  # one matrix a layer while answering
    after = replies(tuned, tokenizer, questions, desc="after")
    tuned.unmerge_adapter()
    exported = corelora.export_lora(tuned, out / "lora", overwrite=True)
    results = {
        "settings": asdict(settings),
        "before": scores(problems, before),
        "after": scores(problems, after),
        "losses": losses,
        "trained_parameters": trainable,
        "seconds": round(time.time() - began, 1),
        "versions": versions(),
        "samples": [
            {"question": p.question, "answer": p.answer, "template": p.template, "before": b, "after": a}
            for p, b, a in zip(problems, before, after, strict=True)
        ],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(report(results, problems))
    print(f"\n{exported}")
    print(next_steps(out, folder))
    return results


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "corelora": corelora.__version__,
        "peft": peft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def report(results: dict[str, Any], problems: list[Problem], shown: int = 4) -> str:
    """The table before and after by template, and a few generations side by side."""
    kinds = {p.template: p.kind for p in problems}
    unseen = {t.name for t in TEMPLATES if t.held_out}
    lines = ["", f"{'template':28s} {'kind':15s} {'n':>4s} {'before':>8s} {'after':>8s}"]
    for name in [*sorted(kinds, key=lambda n: (kinds[n], n)), "all"]:
        b, a = results["before"][name], results["after"][name]
        label = f"{name} (never trained)" if name in unseen else name
        row = f"{label:28s} {kinds.get(name, ''):15s} {b['count']:4d} {b['percent']:7.1f}% {a['percent']:7.1f}%"
        lines.append(row)
    for sample in results["samples"][:shown]:
        lines += ["", f"question: {sample['question']}", f"  right answer: {sample['answer']}"]
        lines += [f"  before: {_short(sample['before'])}", f"  after:  {_short(sample['after'])}"]
    gain = results["after"]["all"]["percent"] - results["before"]["all"]["percent"]
    lines += ["", f"exact match: {results['before']['all']['percent']:.1f} % before, "]
    lines[-1] += (
        f"{results['after']['all']['percent']:.1f} % after ({gain:+.1f} points), {results['seconds']:.0f} s in all"
    )
    return "\n".join(lines)


def _short(text: str, width: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def next_steps(out: Path, folder: Path) -> str:
    """What to do with what the run left."""
    return f"""
What there is now:
  {out / "adapter"}       the NLoRA adapter
  {out / "lora"}          the same as a plain LoRA, for any server that loads PEFT's LoRA
  {out / "results.json"}  every answer before and after

Load the adapter:
  import corelora
  from peft import AutoPeftModelForCausalLM
  model = AutoPeftModelForCausalLM.from_pretrained("{out / "adapter"}")

Next: `corelora methods` lists the methods, `corelora plan {folder}` what each costs on a model;
for your own model: get_peft_model(model, CoreLoraConfig(method="nlora", r=128, target_modules="all-linear"))."""


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run on SmolLM2-135M-Instruct."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    defaults = Settings()
    for name in ("steps", "batch_size", "lr", "r", "method", "held_out", "seed", "out"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    settings = Settings(**vars(parser.parse_args(argv)))
    run(settings, smollm2_folder())


if __name__ == "__main__":
    main()
