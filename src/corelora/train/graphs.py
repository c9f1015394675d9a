"""A training step as one CUDA graph: recorded once for each shape of batch, then launched as a whole.

A small model's step is thousands of short kernels, and a host that launches them one by one is slower than the GPU that
runs them. Forward and backward pass are recorded together; the optimizer and what watches the run stay outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from corelora.errors import CoreLoraError
from corelora.recipe import Recipe
from corelora.train.out_of_memory import is_out_of_memory
from corelora.train.processes import launched

# Rows of tokens are padded to a multiple: few shapes, few graphs. Eight or so are few enough.
WIDTH, SHAPES = 64, 8

Passes = Callable[[dict[str, Tensor], Tensor | None], Tensor]  # (batch, items) to the loss; leaves gradients


class Recorder(Protocol):
    """How passes are recorded."""

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Run once, unrecorded, as recording needs it to have been."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What runs the function again on the same tensors."""


class CudaRecorder:
    """Records CUDA graphs, which share their memory: only one of them is in use at a time."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """On the stream of the recordings: libraries set themselves up for each stream, which can't be recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.empty_cache()  # recordings have memory of their own: what this pass leaves would lie idle beside it
        return loss

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Launches the whole graph."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (TensorBoard's, a study's) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            loss = function()

        def launch() -> Tensor:
            graph.replay()
            return loss

        return launch


@dataclass(frozen=True)
class Recorded:
    """The passes for batches of one shape, with the tensors that they read and, where none were there, the gradients
    that they make."""

    inputs: dict[str, Tensor]
    items: Tensor | None
    run: Callable[[], Tensor]
    gradients: list[Tensor | None] | None


class StepGraphs:
    """Runs a step's passes; from the second batch of a shape on as one graph.

    Graphs know addresses. Where no gradients are there, a graph makes its own, in tensors that stay; where there are
    some, as after the first of several passes of a step, it adds to them, in tensors that are the same for all graphs.

    Args:
        model: its trained parameters get the gradients.
        recorder: records.
    """

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients: list[Tensor] = []
        self.recorder = recorder
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, Recorded] = {}

    def __call__(self, passes: Passes, batch: Mapping[str, Any], items: Tensor | int | None, also: Hashable) -> Tensor:
        """The loss of a batch; gradients are in the parameters.

        Args:
            passes: forward and backward pass, without waiting for the device.
            batch: tensors on the device.
            items: what the loss is divided by, if not by the rows.
            also: what else the passes depend on.

        Raises:
            CoreLoraError: the passes can't be recorded.
        """
        tensors = {name: _tensor(name, value) for name, value in batch.items()}
        if items is not None:
            items = torch.as_tensor(items, device=next(iter(tensors.values())).device)
        shape = (also, *((name, value.shape, value.dtype) for name, value in tensors.items()))
        if shape not in self._seen:
            self._seen.add(shape)
            return self.recorder.run(lambda: passes(tensors, items))
        makes = all(p.grad is None for p in self.parameters)
        if not makes:
            self._hold_gradients()
        if (makes, shape) not in self._recorded:
            self._recorded[makes, shape] = self._record(passes, tensors, items, makes)
        recorded = self._recorded[makes, shape]
        for name, value in tensors.items():
            recorded.inputs[name].copy_(value, non_blocking=True)
        if recorded.items is not None and items is not None:
            recorded.items.copy_(items, non_blocking=True)
        loss = recorded.run().clone()
        if recorded.gradients is not None:
            for parameter, gradient in zip(self.parameters, recorded.gradients, strict=True):
                parameter.grad = gradient
        return loss

    def forget(self) -> None:
        """Give back what recordings hold: passes that follow need the memory."""
        self._recorded, self._seen, self.gradients = {}, set(), []

    def _record(self, passes: Passes, batch: dict[str, Tensor], items: Tensor | None, makes: bool) -> Recorded:
        inputs = {name: value.clone() for name, value in batch.items()}
        own_items = None if items is None else items.clone()
        try:
            run = self.recorder.record(lambda: passes(inputs, own_items))
        except RuntimeError as error:
            cause = _first_of(error)
            if is_out_of_memory(cause):
                raise cause  # noqa: B904 (it came first)
            raise CoreLoraError(
                f"loop.graphs: a step of this model can't be recorded ({str(cause).splitlines()[0]}). "
                "Leave it out: --set loop.graphs=off"
            ) from error
        return Recorded(inputs, own_items, run, [p.grad for p in self.parameters] if makes else None)

    def _hold_gradients(self) -> None:
        """Put the tensors that stay in place of the gradients, with what those hold; zeros where there are none."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(p) for p in self.parameters]
        new = [g for p, g in zip(self.parameters, self.gradients, strict=True) if p.grad is None]
        if new:
            torch._foreach_zero_(new)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient


def make_graphs(recipe: Recipe, model: nn.Module) -> StepGraphs | None:
    """Graphs for a run's steps; None where the recipe or the machine is without them."""
    return StepGraphs(model, CudaRecorder()) if has_graphs(recipe) else None


def row_multiple(recipe: Recipe) -> int | None:
    """What the lengths of batches are a multiple of, up to data.max_length; None where any length will do."""
    if not has_graphs(recipe):
        return None
    longest = recipe.data.max_length
    width = math.gcd(WIDTH, longest)
    while width % 2 == 0 and width * SHAPES > longest:
        width //= 2
    return width


def has_graphs(recipe: Recipe) -> bool:
    """Whether steps run as graphs, here."""
    return recipe.loop.graphs != "off" and not graph_problems(recipe)


def graph_problems(recipe: Recipe) -> list[str]:
    """What stands against graphs."""
    loop = recipe.loop
    found = {
        "it needs an NVIDIA GPU": not torch.cuda.is_available(),
        "it takes one process": launched() > 1,
        "not with loop.compile": loop.compile,
        "not with loop.checkpointing, which looks at the random state": loop.checkpointing,
        "not with loop.precision float16, whose scaler waits for the device": loop.precision == "float16",
        "not with model.quantize": recipe.model.quantize is not None,
    }
    return [f"loop.graphs: {text}; leave it out." for text, stands in found.items() if stands]


def _first_of(error: BaseException) -> BaseException:
    """What failed before a recording that it broke off could not be ended, either."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CoreLoraError(f"loop.graphs: batches of this task hold more than tensors ({name}): --set loop.graphs=off")
    return value
