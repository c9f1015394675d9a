"""The gradients of factors beside the input's: whatever the moment at which they are computed, they are the same."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from corelora.kernels import branches, core_linear, groups, products, siblings
from fused.test_core_linear import CASES, _close
from fused.test_siblings import adapted, as_on_a_gpu, grouped, groups_of, outcome, plain


@pytest.fixture(params=[0, products.EDIT_FROM], ids=["edits", "wide"])
def _as_on_a_gpu(request, monkeypatch):
    groups._seen.__dict__.clear()
    with as_on_a_gpu(monkeypatch, request.param):
        yield


@pytest.fixture
def forks(monkeypatch):
    """As while a graph is recorded: the other calls run when the first has changed most, before it puts that back."""
    made = []

    def in_between(calls, like, *, alone=False):
        if alone:
            return [call() for call in calls]
        rest = []
        with monkeypatch.context() as patch:
            for module in (siblings, products):
                put_back = module.put_back

                def after_the_rest(*given, put_back=put_back):
                    if not rest:
                        rest.extend(call() for call in calls[1:])
                    put_back(*given)

                patch.setattr(module, "put_back", after_the_rest)
            main = calls[0]()
        made.append(bool(rest))
        return [main, *(rest or [call() for call in calls[1:]])]

    monkeypatch.setattr(core_linear, "branches", lambda like: True)
    monkeypatch.setattr(siblings, "branches", lambda like: True)
    monkeypatch.setattr(core_linear, "at_once", in_between)
    monkeypatch.setattr(siblings, "at_once", in_between)
    return made


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(("method", "variant", "extra"), CASES, ids=str)
def test_beside_as_before(method, variant, extra, forks):
    """Every serial method, layers apart and together."""
    model, x = adapted(method, variant, **extra), torch.randn(3, 5, 37)
    expected = plain(model, x)
    for a, b in zip(outcome(model, x), expected, strict=True):  # the first pass: apart
        _close(a, b, torch.float32)
    before = len(forks)
    outcome(model, x)
    assert len(groups_of(model)) == 1
    for a, b in zip(outcome(model, x), expected, strict=True):
        _close(a, b, torch.float32)
    assert len(forks) > before > 0


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_work_between_an_edit_and_its_end(forks):
    """The test above would see it: IntTune's core learns while the gradient of an output is edited."""
    model, x = adapted("inttune"), torch.randn(4, 37)
    grouped(model, x)
    outcome(model, x)
    assert any(forks)


def test_nothing_branches_where_nothing_is_recorded():
    calls = []
    found = branches.at_once([lambda: calls.append(1) or 1, lambda: calls.append(2) or 2], torch.ones(1))
    assert (found, calls) == ([1, 2], [1, 2])


def test_only_what_is_recorded_branches_and_without_streams_nothing(monkeypatch):
    on_a_gpu = SimpleNamespace(is_cuda=True)
    for recording in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda recording=recording: recording)
        assert branches.branches(on_a_gpu) == recording
        assert not branches.branches(torch.ones(1))
    monkeypatch.setattr(branches, "STREAMS", 0)
    assert not branches.branches(on_a_gpu)


class Recorder:
    """Streams that write down who waits for whom, and which call was launched where."""

    def __init__(self, name: str, log: list[tuple[str, ...]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Recorder) -> None:
        self.log.append((self.name, "waits for", other.name))


@pytest.fixture
def side(monkeypatch):
    """(log, streams beside the current one, which one work is launched on now)."""
    log: list[tuple[str, ...]] = []
    streams = [Recorder(f"side {n}", log) for n in range(branches.STREAMS)]
    now = [Recorder("here", log)]

    @contextmanager
    def on(stream):
        now.append(stream)
        try:
            yield
        finally:
            now.pop()

    monkeypatch.setattr(branches, "branches", lambda like: True)
    monkeypatch.setattr(branches, "_stream", lambda device, n: streams[n])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "stream", on)
    return log, streams, now


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_streams_wait_before_and_after(count, side):
    """Results in the order of the calls; no stream begins before what came earlier, none is left behind."""
    log, streams, now = side
    calls = [lambda n=n: log.append((now[-1].name, "runs", str(n))) or n for n in range(count)]
    assert branches.at_once(calls, torch.ones(1)) == list(range(count))
    used = [s.name for s in streams[: count - 1]]
    ran = [entry for entry in log if entry[1] == "runs"]
    assert ran[0] == ("here", "runs", "0")
    assert {name for name, *_ in ran[1:]} == set(used)
    assert log[: len(used)] == [(name, "waits for", "here") for name in used]
    assert log[-len(used) :] == [("here", "waits for", name) for name in used]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_streams_are_joined_where_a_call_fails(bad, side):
    """What failed is what is told: a recording could not be ended with work on another stream."""
    log, streams, _ = side

    def fail():
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        branches.at_once([fail if n == bad else branches.nothing for n in range(3)], torch.ones(1))
    assert log[-2:] == [("here", "waits for", stream.name) for stream in streams[:2]]
