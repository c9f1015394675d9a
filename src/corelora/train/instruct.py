"""The task `instruct`: a language model learns replies; the loss is on the reply and its stop token only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, EvalPrediction

from corelora.data.check import check_data
from corelora.data.collate import IGNORED, ReplyCollator
from corelora.data.packing import border_problem
from corelora.data.prompts import PROMPTS
from corelora.data.replies import encode_replies
from corelora.errors import CoreLoraError
from corelora.recipe import Recipe
from corelora.train.graphs import row_multiple
from corelora.train.models import stop_tokens
from corelora.train.tasks import TASKS, Rows, Task, as_rows
from corelora.train.trainer import ReplyTrainer

LOOKED_AT = 100  # rows whose stop token is looked for


class Instruct(Task):
    """Replies of a language model."""

    name = "instruct"
    task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM

    def problems(self, recipe: Recipe) -> list[str]:
        """Missing files and columns, unknown forms."""
        return check_data(recipe.data, self.name)

    def encode(self, recipe: Recipe, which: str, processor: Any) -> Rows:
        """Token ids and labels of the rows; cached, once for all processes."""
        return as_rows(encode_replies(recipe.data, which, processor, recipe.loop.seed))

    def collator(self, recipe: Recipe, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads on the right; packed rows for flash attention go as one sequence."""
        flash = (recipe.model.attention or "").startswith("flash")
        return ReplyCollator(
            processor.pad_token_id, flatten=recipe.data.packing and flash, multiple=row_multiple(recipe)
        )

    def measure(self, recipe: Recipe) -> Callable[[Any], dict[str, float]]:
        """The mean loss of a trained token over all rows, and how many tokens that were."""

        def figures(prediction: EvalPrediction) -> dict[str, float]:
            tokens = int(np.sum(prediction.label_ids))
            return {"loss": float(np.sum(prediction.predictions, dtype=np.float64)) / max(tokens, 1), "tokens": tokens}

        return figures

    def trainer_class(self) -> type:
        """Loss sums and token counts a row."""
        return ReplyTrainer

    def sample(self, row: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        """The row's text in stretches that are trained or not."""
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        stretches = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
        return [(processor.decode([token for token, _ in pairs]), trained) for trained, pairs in stretches]

    def model_problems(self, recipe: Recipe, model: Any, collator: Any) -> list[str]:
        """Packed rows that see each other."""
        problem = border_problem(model, collator) if recipe.data.packing else None
        return [problem] if problem else []

    def processor_problems(self, recipe: Recipe) -> list[str]:
        """No tokenizer, or one that the prompt can't be written for: without a chat template, without an end token."""
        try:
            problem = PROMPTS[recipe.data.prompt].tokenizer_problem(self.load_processor(recipe))
        except CoreLoraError as error:
            return [str(error)]
        return [f"data.prompt: {problem}"] if problem else []

    def row_problems(self, rows: Rows, processor: Any, config: Any) -> list[str]:
        """Rows that never train a stop token: the model would not learn to end its replies.

        Rows cut at the longest length have lost theirs, and don't count.
        """
        stop_ids = stop_tokens(config) | ({processor.eos_token_id} - {None})
        first = rows.dataset.select(range(min(LOOKED_AT, len(rows.dataset))))
        longest = max(len(ids) for ids in first["input_ids"])
        whole = [labels for labels in first["labels"] if len(labels) < longest] or list(first["labels"])
        if any(stop_ids & set(labels) for labels in whole):
            return []
        names = ", ".join(repr(processor.decode([n])) for n in sorted(stop_ids))
        return [
            f"none of the first {len(first)} rows trains a stop token ({names or 'the tokenizer has none'}), so "
            "replies would never end. Use another data.prompt, a larger data.max_length, or a tokenizer with a stop "
            "token."
        ]


TASKS.add(Instruct.name, Instruct())
