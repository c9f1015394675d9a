"""Peak memory of one training step, from shapes alone.

The step is really run, forward and backward, on tensors that have a shape, a type and a lifetime but no values
(PyTorch's fake tensors), and the bytes of all storages alive are counted. So the figure knows what each method's path
saves for the backward pass without a formula for it, and follows the code when that changes.

Counted: weights, trained factors, frozen factors, gradients, optimiser states, logits and the loss, activations saved
for the backward pass, and temporaries that PyTorch's dispatcher sees. Not counted: what lies inside one kernel
(workspaces), the allocator's rounding and fragmentation, the GPU's context (`RESERVE` stands for these), and the data
loader.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corelora.errors import CoreLoraError, unknown_name
from corelora.factor import Factor
from corelora.kernels.fast import fast_path
from corelora.kernels.form import set_device
from corelora.tuner_layer import CoreLoraLayer

GIB = 2**30
IMAGE_SIDE = 224  # of images for a model whose config names no size
RESERVE = GIB  # of a GPU, for its context, library workspaces, rounding and fragmentation


@dataclass(frozen=True, kw_only=True)
class OptimizerCost:
    """What an optimiser holds for each trained number.

    Attributes:
        copies: states of the factor's own type.
        fixed: bytes of other states.
        temporary: copies made while it steps.
    """

    copies: int = 0
    fixed: float = 0.0
    temporary: int = 0


OPTIMIZERS: dict[str, OptimizerCost] = {
    "adamw": OptimizerCost(copies=2),  # fused, transformers' default on a GPU
    "adamw_foreach": OptimizerCost(copies=2, temporary=1),  # torch.optim.AdamW's own default: square roots on the side
    "adamw_8bit": OptimizerCost(fixed=2 * (1 + 4 / 256)),  # bitsandbytes: a byte, and a float32 scale a block of 256
    "rmsprop": OptimizerCost(copies=1, temporary=1),
    "sgd": OptimizerCost(),
    "momentum": OptimizerCost(copies=1),
}


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes alive at the peak of one training step after the first (optimiser states exist), by what they are for."""

    weights: int
    trained: int
    outer: int  # frozen factors and whatever else the adapter keeps in buffers
    optimizer: int
    gradients: int
    logits: int  # everything as wide as the vocabulary, the loss's copies and gradients included
    activations: int

    @property
    def peak(self) -> int:
        """All of it, in bytes."""
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step.

    Attributes:
        batch: sequences (or images) in a batch.
        length: tokens in a sequence; cut to what the model has positions for.
        optimizer: a name in `OPTIMIZERS`.
        checkpointing: gradient checkpointing.
        device: "cuda" or "cpu": whose path through plain linear layers is counted.
        fast: as `set_fast` takes it; "auto" counts as "on" for a GPU.
    """

    batch: int = 4
    length: int = 512
    optimizer: str = "adamw"
    checkpointing: bool = False
    device: str = "cuda"
    fast: str = "auto"

    def problems(self) -> list[str]:
        """Every mistake, one sentence each."""
        found = [
            f"{n} must be at least 1, got {v}." for n, v in (("batch", self.batch), ("length", self.length)) if v < 1
        ]
        if self.optimizer not in OPTIMIZERS:
            found.append(unknown_name("optimizer", self.optimizer, OPTIMIZERS))
        if self.device not in ("cuda", "cpu"):
            found.append(unknown_name("device", self.device, ("cuda", "cpu")))
        return found


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages alive, by category, while it is active; remembers the largest sum.

    Args:
        vocabulary: size of the last dimension that makes a tensor count as logits; None for none.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.peak = 0
        self._known: dict[int, list[Any]] = {}  # storage -> [category, bytes]

    def hold(self, tensor: Tensor, category: str) -> None:
        """Count a tensor's storage under `category`; one that is counted already moves there."""
        storage = tensor.untyped_storage()
        entry = self._known.get(storage._cdata)
        if entry is None:
            entry = self._known[storage._cdata] = [category, storage.nbytes()]
            weakref.finalize(storage, self._gone, storage._cdata)
        else:
            self.live[entry[0]] -= entry[1]
            entry[0] = category
        self.live[category] += entry[1]
        total = sum(self.live.values())
        if total > self.peak:
            self.peak, self.at_peak = total, self.live.copy()

    def _gone(self, key: int) -> None:
        category, size = self._known.pop(key)
        self.live[category] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self.hold(tensor, "logits" if self._is_wide(tensor) else "activations")
        return out

    def _is_wide(self, tensor: Tensor) -> bool:
        return self.vocabulary is not None and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary


class StepSimulator:
    """Training steps of one model on fake tensors.

    Args:
        model: a model with adapters (or without) on the meta device; its tensors are replaced by fake ones.
        device: see `Step.device`.
        fast: see `Step.fast`.
    """

    def __init__(self, model: nn.Module, device: str = "cuda", fast: str = "auto") -> None:
        self.model, self.device, self.fast = model, device, fast
        self._mode = FakeTensorMode()
        with self._mode:
            _make_fake(model)

    def measure(self, step: Step) -> StepMemory:
        """The peak of `step`.

        Raises:
            CoreLoraError: the model's code can't run without values; the message has its reason.
        """
        try:
            with self._mode, self._path():
                return self._run(step)
        except Exception as error:  # the model is not ours: whatever it raises only means that there is no estimate
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise CoreLoraError(
                f"memory can't be estimated, the model fails on a made-up batch without values: {reason[0]}"
            ) from error

    @contextmanager
    def _path(self) -> Iterator[None]:
        before = set_device(self.device)
        try:
            with fast_path("on" if self.device == "cuda" and self.fast == "auto" else self.fast):
                yield
        finally:
            set_device(before)

    def _run(self, step: Step) -> StepMemory:
        model = self.model.train()
        if step.checkpointing:
            # The random state of a fake run has no values to keep.
            kwargs = {"use_reentrant": False, "preserve_rng_state": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]
        model.zero_grad(set_to_none=True)
        inputs = training_inputs(model, step.batch, step.length)
        live = LiveBytes(getattr(model.config.get_text_config(), "vocab_size", None))  # type: ignore[union-attr,operator]
        trained = [p for p in model.parameters() if p.requires_grad]
        count, size = (sum(n(p) for p in trained) for n in (Tensor.numel, _bytes))
        cost = OPTIMIZERS[step.optimizer]
        with live:
            for parameter in model.parameters():
                live.hold(parameter, "trained" if parameter.requires_grad else "weights")
            for name, buffer in model.named_buffers():
                live.hold(buffer, "outer" if "corelora_" in name else "weights")
            live.live["optimizer"] = int(cost.copies * size + cost.fixed * count)
            handles = [p.register_post_accumulate_grad_hook(lambda q: live.hold(q.grad, "gradients")) for p in trained]
            loss_of(model(**inputs)).backward()
            live.live["optimizer"] += cost.temporary * size
            for parameter in trained:
                live.hold(parameter, "trained")
            for handle in handles:
                handle.remove()
        return StepMemory(**{part: live.at_peak[part] for part in StepMemory.__dataclass_fields__})


def largest_batch(small: tuple[int, int], large: tuple[int, int], room: int) -> int:
    """The largest batch whose peak stays within `room` bytes, 0 where not even one fits.

    Args:
        small, large: (batch, peak in bytes) of two batches; between and beyond them the peak is taken as a line.
        room: bytes that the peak may take.
    """
    (b0, p0), (b1, p1) = small, large
    slope = (p1 - p0) / (b1 - b0)
    if slope <= 0:
        return 0 if p1 > room else b1
    return max(0, int(b0 + (room - p0) // slope))


def training_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor | bool]:
    """Inputs of one training step with a loss: token ids, pixels, labels, as the model's forward names them.

    Args:
        model: a transformers model, with or without PEFT around it.
        batch, length: as in `Step`.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = inner.config
    names = inspect.signature(inner.forward).parameters
    inputs: dict[str, Tensor | bool] = {}
    if "input_ids" in names:
        length = min(length, getattr(config.get_text_config(), "max_position_embeddings", None) or length)
        inputs["input_ids"] = torch.zeros(batch, length, dtype=torch.long)
        if "decoder_input_ids" in names:
            inputs["decoder_input_ids"] = inputs["input_ids"]
    vision = getattr(config, "vision_config", config)
    needs_pixels = "input_ids" not in names or "return_loss" in names
    if "pixel_values" in names and needs_pixels:
        size = getattr(vision, "image_size", None) or IMAGE_SIDE
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.zeros(batch, vision.num_channels, height, width, dtype=inner.dtype)
    if "return_loss" in names:
        inputs["return_loss"] = True
    if "labels" in names and "input_ids" in inputs:
        per_token = type(inner).__name__.endswith(
            ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "LMHeadModel")
        )
        ids = inputs["input_ids"]
        assert isinstance(ids, Tensor)
        inputs["labels"] = ids if per_token else torch.zeros(batch, dtype=torch.long)
    return inputs


def loss_of(output: Any) -> Tensor:
    """The output's own loss, or a sum of all that it holds where it has none."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    parts = [t.float().sum() for t in tree_leaves(tuple(output.values())) if isinstance(t, Tensor) and t.requires_grad]
    if not parts:
        raise CoreLoraError("the model's output does not depend on any trained factor")
    return torch.stack(parts).sum()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _make_fake(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU, shared ones once, and give factors the starts that a run has."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _fake_parameter(parameter, made)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for layer in [m for m in model.modules() if isinstance(m, CoreLoraLayer)]:
        for adapter, core in layer.cores.items():
            for factor in layer.factors(adapter).values():
                _fake_start(factor, core.spec.choices.slice_scale, layer.weight_access.float_dtype)
        layer.unchecked.clear()


def _fake_parameter(parameter: nn.Parameter, made: dict[int, nn.Parameter]) -> nn.Parameter:
    if id(parameter) not in made:
        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
        made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return made[id(parameter)]


def _fake_start(factor: Factor, slice_scale: str, dtype: torch.dtype) -> None:
    """What `CoreAdapter.derive` would make: a slice's transform, a start that the file leaves out."""
    plan = factor.plan
    if not plan.needs_start:
        return
    if plan.source is None:
        if factor.start is None:
            factor.set_start(torch.empty(plan.shape, dtype=dtype), persistent=False)
        return
    r = plan.shape[0] if plan.source == "rows" else plan.shape[1]
    shapes = {"none": None, "unit": (r,), "orthonormal": (r, r)}
    shape = shapes[slice_scale]
    factor.transform = None if shape is None else torch.empty(shape)
