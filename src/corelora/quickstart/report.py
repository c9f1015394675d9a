"""What the quick start prints at its end: the table before and after, replies side by side, what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corelora.tasks.word_problems import TEMPLATES


def report(results: dict[str, Any], shown: int = 4) -> str:
    """The table before and after by template, and a few replies side by side.

    Args:
        results: what `quickstart.run` returns.
        shown: number of problems whose replies are shown.
    """
    lines = [*_table(results), "", "a few of the replies:"]
    for sample in _chosen(results["samples"], shown):
        lines += ["", f"  question: {sample['question']}", f"  answer:   {sample['answer']}"]
        lines += [f"  {side + ':':9s} {_short(sample[side])}" for side in ("before", "after")]
    before, after = (results[side]["all"] for side in ("before", "after"))
    cut = results["cut_replies"]
    seconds = results["seconds"]
    lines += [
        "",
        f"exact match on {before['count']} held-out problems: {before['percent']:.1f} % before, "
        f"{after['percent']:.1f} % after ({results['gain']:+.1f} points)",
        f"replies cut at {results['settings']['max_new_tokens']} tokens: {cut['before']} before, {cut['after']} after",
        f"seconds: {seconds['all']:.0f} in all; "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "all"),
    ]
    return "\n".join(lines)


def _table(results: dict[str, Any]) -> list[str]:
    before, after = results["before"], results["after"]
    lines = ["", f"{'template':32s} {'kind':15s} {'n':>4s} {'before':>8s} {'after':>8s}"]
    rows = [(t.name + (" (never trained)" if t.held_out else ""), t.kind, t.name) for t in TEMPLATES if t.name in after]
    for label, kind, name in [*sorted(rows, key=lambda row: row[1]), ("all", "", "all")]:
        b, a = before[name], after[name]
        lines.append(f"{label:32s} {kind:15s} {b['count']:4d} {b['percent']:7.1f}% {a['percent']:7.1f}%")
    return lines


def _chosen(samples: list[dict[str, Any]], shown: int) -> list[dict[str, Any]]:
    """Problems spread over the templates, whatever came out of them."""
    return samples[:: max(1, min(len(samples), len(TEMPLATES)) // shown)][:shown]


def _short(side: dict[str, Any], width: int = 150) -> str:
    line = " ".join(side["reply"].split())
    line = line if len(line) <= width else line[: width - 3] + "..."
    return f"[{'right' if side['right'] else 'wrong'}] {line}"


def next_steps(out: Path, folder: Path) -> str:
    """What to do with what the run left.

    Args:
        out: the run's folder.
        folder: the base model's.
    """
    return f"""
What there is now:
  {out / "adapter"}       the adapter, with the tokenizer
  {out / "lora"}          the same as a plain LoRA, for any server that loads PEFT's LoRA
  {out / "quickstart.json"}  every figure and every reply, before and after

Load the adapter:
  import corelora
  from peft import AutoPeftModelForCausalLM
  model = AutoPeftModelForCausalLM.from_pretrained("{out / "adapter"}")

Next:
  .venv/bin/corelora methods           the other methods
  .venv/bin/corelora plan {folder}     what each costs on a model
  your own model: get_peft_model(model, CoreLoraConfig(method="nlora", r=128, target_modules="all-linear"))"""
