"""What a run shows and keeps as it goes: one progress bar, and metrics.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

NAMES = {"learning_rate": "lr", "num_input_tokens_seen": "tokens"}
LEFT_OUT = {"total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
RATES = ("_runtime", "_per_second", "_model_preparation_time")


def memory_bytes() -> int | None:
    """Peak bytes of the GPU so far; on a CPU those of the process, None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # Unix only
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def forget_memory() -> None:
    """Let the GPU's peak begin anew, so that a second run in one process does not report the first one's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class ProgressBar(TrainerCallback):
    """A bar over the steps with loss, tokens a second and memory (tqdm adds the time left); one more while testing."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.test_bar: Any = None
        self.began, self.tokens_before = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the bar where the run begins, or goes on."""
        self.began, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        shown = state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=not shown
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss, the mean since it was last shown, and the speed so far."""
        if self.bar is None or not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self.began
        rate = (state.num_input_tokens_seen - self.tokens_before) / max(seconds, 1e-9)
        used = memory_bytes()
        shown = {"loss": f"{float(logs['loss']):.4f}"}
        if rate > 0:  # 0: the rows are no tokens
            shown["tokens/s"] = f"{rate:,.0f}"
        if used is not None:
            shown["GiB"] = f"{used / 2**30:.1f}"
        self.bar.set_postfix(shown)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """One test batch further."""
        if self.test_bar is None:
            total = len(eval_dataloader)
            shown = state.is_world_process_zero
            self.test_bar = tqdm(total=total, desc="testing", unit="batch", leave=False, delay=2, disable=not shown)
        self.test_bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The test is over."""
        if self.test_bar is not None:
            self.test_bar.close()
            self.test_bar = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The training is over."""
        self.close()

    def close(self) -> None:
        """End the bars, whatever happened."""
        for bar in (self.test_bar, self.bar):
            if bar is not None:
                bar.close()
        self.bar = self.test_bar = None


class MetricsFile(TrainerCallback):
    """Appends each log to metrics.jsonl: step, loss, lr, grad_norm, tokens, seconds, memory; test figures as test_*.

    Args:
        path: the file.
        seconds: of training before this process, where a run goes on.
    """

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        self.path, self.seconds_before = path, seconds
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is logged, also where a run is shorter than `log_every`."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line, flushed, so that a run that dies has all lines up to there."""
        if not state.is_world_process_zero or not logs:
            return
        row = metrics_row(logs)
        if not row:
            return
        seconds = round(self.seconds_before + time.perf_counter() - self.began, 3)
        whole = {"step": state.global_step, **row, "seconds": seconds, "memory": memory_bytes()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")


def metrics_row(logs: dict[str, Any]) -> dict[str, Any]:
    """A log of Trainer's in our names; empty where it holds no figure of the run."""
    row = {}
    for key, value in logs.items():
        if key in LEFT_OUT or key.endswith(RATES):
            continue
        row[NAMES.get(key, key.replace("eval_", "test_", 1))] = value
    return row if {"loss", "test_loss"} & set(row) else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
