"""The quick start: fine-tune a real language model with NLoRA on arithmetic word problems, and see what changed.

    python -m corelora.run.quickstart [--steps 110] [--out runs/quickstart]

Stages: model, answers before, training, answers after, files (the adapter, a plain LoRA, results.json), report.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import corelora
from corelora import CoreLoraConfig
from corelora.run.generate import Reply, chat_prompt, replies
from corelora.run.models import load_causal_lm, smollm2_folder
from corelora.run.quickstart_report import next_steps, report
from corelora.tasks.word_problems import Problem, held_out_problems, is_right, read_answer, scores, training_problems


@dataclass
class Settings:
    """Everything that the run depends on; written into its results."""

    steps: int = 110
    batch_size: int = 8
    lr: float = 2e-4
    r: int = 32
    method: str = "nlora"
    held_out: int = 210
    max_new_tokens: int = 64
    seed: int = 0
    out: str = "runs/quickstart"


@dataclass
class Stages:
    """Announces each stage and keeps its seconds."""

    count: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """Run a block as the next stage."""
        print(f"\n[{len(self.seconds) + 1}/{self.count}] {text}", flush=True)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)


class LossBar(TrainerCallback):
    """A progress bar over the steps, with the loss; nothing else is printed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the bar."""
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss, the mean since it was last shown."""
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the bar."""
        self.bar.close()


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


def train(model: Any, tokenizer: Any, settings: Settings) -> list[dict[str, float]]:
    """Train the adapter with transformers' Trainer.

    Returns:
        One row a logged step: `step` and `loss`, the mean since the row before.
    """
    rows = [encode(tokenizer, p) for p in training_problems(settings.steps * settings.batch_size, settings.seed)]
    arguments = TrainingArguments(
        output_dir=str(Path(settings.out) / "trainer"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,  # LossBar shows the loss in the bar; Trainer's own prints it below
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[LossBar()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [{"step": e["step"], "loss": float(e["loss"])} for e in trainer.state.log_history if "loss" in e]


def answer(model: Any, tokenizer: Any, problems: list[Problem], settings: Settings, desc: str) -> list[Reply]:
    """The model's replies to the problems, by the same prompt and limit before and after training."""
    questions = [p.question for p in problems]
    batch_size = 16 if model.device.type == "cpu" else 128
    limit = settings.max_new_tokens
    return replies(model, tokenizer, questions, max_new_tokens=limit, batch_size=batch_size, desc=desc)


def answer_merged(model: PeftModel, tokenizer: Any, problems: list[Problem], settings: Settings) -> list[Reply]:
    """The same with the adapter merged meanwhile, one matrix a layer: half the time on a CPU, equal in float32."""
    model.merge_adapter()
    try:
        return answer(model, tokenizer, problems, settings, "after")
    finally:
        model.unmerge_adapter()


def run(settings: Settings, folder: str | Path | None = None) -> dict[str, Any]:
    """All stages.

    Args:
        settings: what to do, and where its files go.
        folder: a folder with a chat model and its tokenizer; SmolLM2-135M-Instruct from its package, if None.

    Returns:
        The results, as they are saved in results.json.
    """
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(5)
    torch.manual_seed(settings.seed)
    problems = held_out_problems(settings.held_out)
    with stages.stage("model", "the model"):
        folder = Path(folder or smollm2_folder())
        model, tokenizer = load_causal_lm(folder, dtype=torch.float32)  # small enough for float32 everywhere
        print(f"{folder.name}, {model.num_parameters():,} parameters, on {device_name(model)}")
    with stages.stage("before", f"the model answers {len(problems)} held-out problems before training"):
        before = answer(model, tokenizer, problems, settings, "before")
    with stages.stage("train", f"training {settings.method}, r = {settings.r}, on all linear layers"):
        tuned = adapt(model, settings)
        trained, total = tuned.get_nb_trainable_parameters()
        print(f"{trained:,} of {total:,} parameters train, {100 * trained / total:.1f} %")
        losses = train(tuned, tokenizer, settings)
    with stages.stage("after", "the same problems after training"):
        after = answer_merged(tuned, tokenizer, problems, settings)
    with stages.stage("files", f"saving the adapter and a plain LoRA in {out}"):
        tuned.save_pretrained(str(out / "adapter"))
        tokenizer.save_pretrained(str(out / "adapter"))
        print(corelora.export_lora(tuned, out / "lora", overwrite=True))
    results = {
        "settings": asdict(settings),
        "model": folder.name,
        **compare(problems, before, after),
        "losses": losses,
        "trained_parameters": trained,
        "all_parameters": total,
        "seconds": {**stages.seconds, "all": round(sum(stages.seconds.values()), 1)},
        "versions": versions(),
        "device": device_name(model),
        "threads": torch.get_num_threads(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(report(results))
    print(next_steps(out, folder))
    return results


def compare(problems: list[Problem], before: list[Reply], after: list[Reply]) -> dict[str, Any]:
    """Scores by template, replies that were cut, and every reply, before and after."""
    sides = {"before": before, "after": after}
    found: dict[str, Any] = {name: scores(problems, [r.text for r in side]) for name, side in sides.items()}
    found["gain"] = round(found["after"]["all"]["percent"] - found["before"]["all"]["percent"], 2)
    found["cut_replies"] = {name: sum(not r.finished for r in side) for name, side in sides.items()}
    found["samples"] = [
        {"template": p.template, "question": p.question, "answer": p.answer}
        | {name: _sample(side[n], p) for name, side in sides.items()}
        for n, p in enumerate(problems)
    ]
    return found


def _sample(reply: Reply, problem: Problem) -> dict[str, Any]:
    return {"reply": reply.text, "read": read_answer(reply.text), "right": is_right(reply.text, problem)}


def device_name(model: Any) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type


def versions() -> dict[str, str]:
    """What the figures depend on."""
    modules = (corelora, peft, torch, transformers)
    return {m.__name__: str(m.__version__) for m in modules} | {"python": platform.python_version()}


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run on SmolLM2-135M-Instruct."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    settings = Settings(**vars(parser.parse_args(argv)))
    logging.captureWarnings(True)  # libraries' warnings would tear the bars
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run(settings)


if __name__ == "__main__":
    main()
