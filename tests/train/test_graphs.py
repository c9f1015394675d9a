"""Steps as graphs: with a recorder that runs on a CPU, a run is the same run."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from corelora.errors import CoreLoraError
from corelora.train import dry_run, graphs
from corelora.train.graphs import StepGraphs, graph_problems, row_multiple
from corelora.train.run import train
from train.helpers import make_recipe


class Replayed:
    """What a graph does, without a GPU: the same function again on the same tensors; it counts, and can fail.

    As a graph, it writes gradients where they were when it was recorded, and touches no parameter's `grad` itself.
    """

    def __init__(self, error: str | None = None) -> None:
        self.runs, self.records, self.replays, self.error = 0, 0, 0, error
        self.parameters = []

    def run(self, function):
        self.runs += 1
        return function()

    def record(self, function):
        self.records += 1
        if self.error:
            raise RuntimeError(self.error)

        before = [p.grad for p in self.parameters]
        kept = [None if g is None else g.clone() for g in before]
        function()  # a recording runs nothing on the device: what it adds to gradients is taken back
        static = [p.grad for p in self.parameters]
        for gradient, old in zip(before, kept, strict=True):
            if gradient is not None:
                gradient.copy_(old)

        def again():
            self.replays += 1
            now = [p.grad for p in self.parameters]
            for p, was, place in zip(self.parameters, before, static, strict=True):
                p.grad = None if was is None else place
            loss = function()
            for p, place, own in zip(self.parameters, static, now, strict=True):
                if p.grad is not None and p.grad is not place:
                    place.copy_(p.grad)
                p.grad = own
            return loss

        return again


@pytest.fixture
def recorder(monkeypatch):
    """Runs believe that there is a GPU to record on."""
    made = Replayed()
    monkeypatch.setattr(graphs, "CudaRecorder", lambda: made)
    begin = StepGraphs.__init__

    def knowing(self, model, recorder):
        begin(self, model, recorder)
        made.parameters = self.parameters

    monkeypatch.setattr(StepGraphs, "__init__", knowing)
    for module in (graphs, dry_run):
        monkeypatch.setattr(module, "graph_problems", lambda recipe: [])
    return made


def passes_of(model):
    def passes(batch, items):
        loss = ((model(batch["x"]) - batch["y"]) ** 2).sum() / (1 if items is None else items)
        loss.backward()
        return loss.detach()

    return passes


def batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, 3, generator=generator) for name in "xy"}


def test_gradients_add_up_whatever_was_recorded():
    """Several shapes within one update, first, second and third time each: gradients equal the plain ones."""
    torch.manual_seed(0)
    model, recorder = nn.Linear(3, 3), Replayed()
    frozen = nn.Linear(3, 3).requires_grad_(False)
    run = StepGraphs(nn.ModuleList([model, frozen]), recorder)
    recorder.parameters = run.parameters
    for update in range(4):
        batches = [batch(rows, 10 * update + n) for n, rows in enumerate((2, 5, 2, 1 + update))]
        items = torch.tensor(7 + update)
        model.zero_grad()
        wanted_losses = [float(passes_of(model)(b, items)) for b in batches]
        wanted = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        losses = [float(run(passes_of(model), b, items, 4)) for b in batches]
        assert losses == pytest.approx(wanted_losses, rel=1e-6)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.grad is None for p in frozen.parameters())
    # Shape 2: first of an update with no gradients there, third with some; the others follow gradients.
    assert (recorder.runs, recorder.records, recorder.replays) == (5, 3, 11)


def test_a_graph_makes_gradients_where_none_are():
    """They are its own tensors, the same in every step, and hold the step's gradients and no older ones."""
    torch.manual_seed(0)
    model, recorder = nn.Linear(3, 3), Replayed()
    run = StepGraphs(model, recorder)
    recorder.parameters = run.parameters
    places = set()
    for step in range(4):
        given = batch(2, step)
        model.zero_grad(set_to_none=True)
        passes_of(model)(given, None)
        wanted = [p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        run(passes_of(model), given, None, 1)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        if step:
            places.add(tuple(p.grad.data_ptr() for p in model.parameters()))
    assert (recorder.runs, recorder.records, recorder.replays, len(places)) == (1, 1, 3, 1)
    run.forget()
    assert run._recorded == {}


def test_what_else_a_step_depends_on_gets_a_graph_of_its_own():
    model, recorder = nn.Linear(3, 3), Replayed()
    run = StepGraphs(model, recorder)
    for also in (1, 2, 1, 2):
        run(passes_of(model), batch(2, 0), None, also)
    assert (recorder.runs, recorder.records) == (2, 2)
    run(passes_of(model), batch(2, 0), 3, 1)  # a number in place of a tensor
    assert recorder.runs == 2  # the same shape


@pytest.mark.parametrize("method", [{"name": "nlora", "r": 4}, {"name": "peft:lora", "r": 4}, {"name": "full"}])
def test_a_run_is_the_same_run(folder, tmp_path, recorder, method):
    """Padding, recording and gradients that stay change nothing but the last bits."""
    loop = {"accumulate": 2, "test_every": 3}
    plain = train(make_recipe(folder, method=method, loop=loop), tmp_path / "plain")
    assert recorder.runs == 0
    wide = make_recipe(folder, method=method, loop={**loop, "graphs": "on"})
    graphed = train(wide, tmp_path / "graphs")
    assert recorder.replays >= 10  # of 12 passes: one or two widths
    for key in ("train_loss", "test_loss"):
        assert graphed[key] == pytest.approx(plain[key], abs=1e-5), key
    weights = "model/model.safetensors" if method["name"] == "full" else "adapter/adapter_model.safetensors"
    one, other = (load_file(tmp_path / name / weights) for name in ("plain", "graphs"))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=1e-4, rtol=1e-4)


def test_a_replay_runs_no_python(folder, tmp_path, recorder, monkeypatch):
    """Whatever a step does beside the passes is done outside of them: here the losses that are logged."""
    monkeypatch.setattr(recorder, "record", lambda function: (function(), lambda: torch.tensor(3.0))[1])
    train(make_recipe(folder, loop={"graphs": "on", "log_every": 1}), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row][1:] == [3.0] * 5


def test_what_stands_against_graphs_is_said_beforehand(folder, tmp_path):
    """`on` is refused with the reason; `auto` does without."""
    with pytest.raises(CoreLoraError, match=r"loop\.graphs: it needs an NVIDIA GPU"):
        train(make_recipe(folder, loop={"graphs": "on"}), tmp_path / "no")
    recipe = make_recipe(folder, loop={"graphs": "on", "checkpointing": True, "compile": True})
    assert len(graph_problems(recipe)) == 3
    assert row_multiple(make_recipe(folder, loop={"graphs": "auto"})) is None
    assert train(make_recipe(folder, loop={"graphs": "auto"}), tmp_path / "auto")["steps"] == 6


def test_lengths_have_a_common_multiple_within_the_longest(folder, recorder):
    """So that there are few graphs, and no position beyond those that the model has."""
    lengths = (30, 96, 128, 512, 4096)
    widths = {n: row_multiple(make_recipe(folder, loop={"graphs": "auto"}, data={"max_length": n})) for n in lengths}
    assert widths == {30: 2, 96: 8, 128: 16, 512: 64, 4096: 64}


def test_a_step_that_cannot_be_recorded_names_the_way_out(folder, tmp_path, recorder):
    recorder.error = "operation not permitted when stream is capturing\nmore"
    with pytest.raises(CoreLoraError, match=r"can't be recorded \(operation not permitted when stream is capturing\)"):
        train(make_recipe(folder, loop={"graphs": "on"}), tmp_path)


@pytest.mark.parametrize(
    ("first", "told"),
    [(torch.OutOfMemoryError("no room"), "no room"), (RuntimeError("no such op"), r"can't be recorded \(no such op\)")],
)
def test_what_broke_a_recording_off_is_told(first, told):
    """Ending a recording that was broken off fails with words of its own."""

    class Broken:
        def run(self, function):
            return function()

        def record(self, function):
            try:
                raise first
            finally:
                raise RuntimeError("CUDA error: capturing stream has unjoined work")

    model = nn.Linear(3, 3)
    made = StepGraphs(model, Broken())
    made(passes_of(model), batch(2, 0), None, 1)
    expected = type(first) if isinstance(first, torch.OutOfMemoryError) else CoreLoraError
    with pytest.raises(expected, match=told):
        made(passes_of(model), batch(2, 0), None, 1)


def test_a_batch_with_more_than_tensors_is_refused():
    with pytest.raises(CoreLoraError, match=r"more than tensors \(names\)"):
        StepGraphs(nn.Linear(1, 1), Replayed())(lambda b, i: torch.ones(()), {"names": ["a"]}, None, 1)
