"""transformers' Trainer with what a run adds: groups of rates, a stop before a broken update, test loss a token.

TRL's SFTTrainer was tried and left: docs/training.md says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corelora.data.collate import IGNORED
from corelora.errors import CoreLoraError
from corelora.recipe import Recipe
from corelora.train.adalora import adalora_of, all_ranks, save_budget
from corelora.train.checkpoints import ResumableTrainer, newest_checkpoint
from corelora.train.finite import advice, all_finite, first_bad_gradient, first_bad_output, gradient_norm
from corelora.train.graphs import make_graphs
from corelora.train.lengths import LengthSampler, row_lengths
from corelora.train.optim import make_optimizer
from corelora.train.processes import shares_weights


class RunTrainer(ResumableTrainer):
    """The Trainer of a run.

    Args:
        recipe: the run's.
        **options: ResumableTrainer's.
    """

    def __init__(self, recipe: Recipe, **options: Any) -> None:
        super().__init__(**options)
        self.recipe = recipe
        assert self.model is not None
        self._graphs = make_graphs(recipe, self.model)
        self._losses: list[Tensor] = []  # of this step so far, with the batches that gave them
        self._batches: list[Mapping[str, Any]] = []
        self._norm: Tensor | None = None  # of this step's gradients
        self._parameters: list[nn.Parameter] | None = None
        self._ops: int | None = None  # of one of its input's numbers

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer; transformers' own way where it needs no groups."""
        if self.optimizer is None:
            where: Any = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(where))
            self.optimizer = make_optimizer(self.recipe.optim, self.args, where, decayed)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows of like length together, where the recipe asks for it."""
        if not self.recipe.data.group_by_length:
            return super()._get_train_sampler(train_dataset)
        step_rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthSampler(row_lengths(self.train_dataset), step_rows, self.recipe.loop.seed)

    def _save(self, *args: Any, **options: Any) -> None:
        """With all of AdaLoRA's ranks: the run may go on from here."""
        with all_ranks(self._trained):
            super()._save(*args, **options)

    def _save_running(self, folder: Path) -> None:
        super()._save_running(folder)
        if adalora_of(self._trained) is not None and self.is_world_process_zero():
            save_budget(self._trained, folder)

    @property
    def _trained(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward; before the step's update, stop where something is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        self._batches.append(inputs)
        if self.accelerator.sync_gradients:
            self._stop_unless_finite(model)
            self._losses, self._batches = [], []
        return loss

    def passes(self, model: nn.Module, inputs: Any, items: Any) -> Tensor:
        """As ever, or from a graph: then no Python runs."""
        step = super().passes
        if self._graphs is None:
            return step(model, inputs, items)
        batch = self._prepare_inputs(inputs)
        share = self.current_gradient_accumulation_steps
        return self._graphs(lambda batch, items: step(model, batch, items), batch, items, share)

    def _finalize_training(self, *args: Any, **options: Any) -> Any:
        """As Trainer's; the test that follows needs the memory that recorded steps hold."""
        if self._graphs is not None:
            self._graphs.forget()
        return super()._finalize_training(*args, **options)

    def floating_point_ops(self, inputs: Any) -> int:
        """As Trainer's, which counts the model's parameters anew for each batch."""
        name = getattr(self.model, "main_input_name", "input_ids")
        numbers = inputs[name].numel() if name in inputs else 0
        if self._ops is None and numbers:
            self._ops = super().floating_point_ops(inputs) // numbers
        return numbers * (self._ops or 0)

    def _learning(self, model: nn.Module) -> list[nn.Parameter]:
        """What trains. Looked up once: a walk through all modules takes the host as long as a small model's kernels."""
        if shares_weights():  # their wrappers may put others in place
            return [p for p in model.parameters() if p.requires_grad]
        if self._parameters is None:
            self._parameters = [p for p in model.parameters() if p.requires_grad]
        return self._parameters

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As Trainer's, with the norm that is known already."""
        norm, self._norm = self._norm, None
        if norm is None or shares_weights():
            return super()._clip_grad_norm(model)
        torch.nn.utils.clip_grads_with_norm_(self._learning(model), self.args.max_grad_norm, norm)
        return norm

    def _stop_unless_finite(self, model: nn.Module) -> None:
        scales = self.accelerator.scaler is not None  # float16: the scaler looks, and leaves such an update out
        self._norm = None if scales else gradient_norm(self._learning(model))
        if all_finite(self._losses, self._norm):
            return
        is_loss = not all_finite(self._losses)
        module = first_bad_output(model, self._batches) if is_loss else first_bad_gradient(model)
        what = f"the loss is {float(torch.stack(self._losses).sum())}" if is_loss else "a gradient is not finite"
        where = f", first in {module}" if module else ""
        kept = newest_checkpoint(self.checkpoints)
        state = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
        changes = "\n".join(f"  - {a}" for a in advice(self.recipe))
        raise CoreLoraError(
            f"step {self.state.global_step + 1}: {what}{where}. The update was not made; {state}. "
            f"Give the next try another --output, and change, likeliest first:\n{changes}"
        )


class ReplyTrainer(RunTrainer):
    """Language models: the test loss is a mean over all trained tokens, whatever batch they were in."""

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Longest rows first: sums don't depend on the order, and padding takes time."""
        lengths = row_lengths(eval_dataset)
        return sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """(None, sum of the losses [b], number of trained tokens [b]) of a batch."""
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits[:, -labels.shape[1] :]  # in front, prompt tuning has tokens of its own
        sums = [_loss_sum(row, wanted) for row, wanted in zip(logits, labels, strict=True)]
        return None, torch.stack(sums), (labels[:, 1:] != IGNORED).sum(dim=1)


class LabelTrainer(RunTrainer):
    """Classifiers: predictions of all rows are measured at once, so no mean of batch means is reported.

    Their loss is a mean over the rows of one batch, whatever arguments their forward takes. Trainer believes otherwise
    of some (transformers 5.23: BERT), and then neither divides by accumulated batches nor leaves out the factor for
    several devices.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Any, Any]:
        """(None, logits [b, labels], labels [b]) of a batch."""
        _, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        return None, logits, labels


def _loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the next-token losses of one row, in float32.

    Args:
        logits: [tokens, vocabulary].
        labels: [tokens], IGNORED where not trained.
    """
    kept = labels[1:] != IGNORED
    return F.cross_entropy(logits[:-1][kept].float(), labels[1:][kept], reduction="sum")
