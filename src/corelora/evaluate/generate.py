"""Evaluation by generation: replies, in batches of like length, and verdicts on what they say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from corelora.errors import CoreLoraError
from corelora.evaluate.code_tasks import HUMANEVAL_STOPS, humaneval_program, mbpp_program, pass_at_k
from corelora.evaluate.job import KINDS, Job, Kind, Outcome, Settings
from corelora.evaluate.sandbox import require_sandbox, run_programs
from corelora.evaluate.scores import mean_score
from corelora.evaluate.session import batches
from corelora.evaluate.suites import Suite
from corelora.evaluate.vllm_backend import VllmWriter
from corelora.run.generate import Reply, Writing, write_batch
from corelora.tasks.answers import READERS

PROGRAMS = {"humaneval": humaneval_program, "mbpp": mbpp_program}
PASS_AT = (1, 10, 100)

# Prompts, how replies are written, the samples' names (each may be asked more than once) -> replies in this order.
Writer = Callable[[Sequence[str], Writing, Sequence[str]], list[Reply]]


def written(job: Job, ids: Sequence[str], prompts: Sequence[str], stops: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The outputs {text, finished} of all samples by id; those that are there already are not made again.

    Args:
        job: model, protocol, what is there.
        ids: of the samples.
        prompts: whole texts before the replies.
        stops: texts that end a reply.
    """
    protocol = job.protocol
    writing = Writing(protocol.max_new_tokens, tuple(stops), protocol.temperature, job.special_tokens)
    write = writer_of(job)
    lengths = [len(p) for p in prompts]
    with tqdm(total=len(ids), initial=sum(n in job.partial.outputs for n in ids), desc=job.name, unit="reply") as bar:
        for batch in batches(ids, lengths, job.batch_size, job.partial):
            made = write([prompts[n] for n in batch], writing, [ids[n] for n in batch])
            new = sum(ids[n] not in job.partial.outputs for n in batch)
            job.partial.add(
                {ids[n]: {"text": r.text, "finished": r.finished} for n, r in zip(batch, made, strict=True)}
            )
            bar.update(new)
    return {name: job.partial.outputs[name] for name in ids}


def writer_of(job: Job) -> Writer:
    """What writes a batch of replies: the loaded model, or vLLM's engine."""
    if job.settings.backend == "vllm":
        return VllmWriter(job.model, job.tokenizer, job.settings)
    return functools.partial(_write, job)


def _write(job: Job, prompts: Sequence[str], writing: Writing, ids: Sequence[str]) -> list[Reply]:
    if writing.temperature:  # what is drawn for a batch depends on the batch alone, not on what came before
        torch.manual_seed(job.settings.seed_of(ids))
    return write_batch(job.model, job.tokenizer, prompts, writing)


def run_generate(job: Job) -> Outcome:
    """Ask, read, judge: one verdict a reader and reply; the first reader's is the sample's."""
    data = job.data
    ids, prompts = job.ids(len(data)), job.prompts(data)
    outputs = written(job, ids, prompts, job.protocol.stops)
    samples: list[dict[str, Any]] = []
    verdicts: dict[str, list[float]] = {name: [] for name in job.protocol.readers}
    for name, prompt, row in zip(ids, prompts, data, strict=True):
        text = outputs[name]["text"]
        sample: dict[str, Any] = {"id": name, "prompt": prompt, "output": text, "finished": outputs[name]["finished"]}
        for reader_name in job.protocol.readers:
            reader = READERS[reader_name]
            read = reader.read(text, row)
            right = bool(reader.is_right(read, row))
            verdicts[reader_name].append(float(right))
            sample.setdefault("readers", {})[reader_name] = {"read": read, "right": right}
        samples.append(sample | sample["readers"][job.protocol.readers[0]])
    return Outcome(samples, {f"{job.name} ({name})": mean_score(values) for name, values in verdicts.items()})


def run_code(job: Job) -> Outcome:
    """Write programs, run each in a sandbox, estimate pass@k without bias."""
    data, n = job.data, job.protocol.samples
    assert job.protocol.program is not None
    kind = require_sandbox(job.settings.unsafe_code)  # before anything is generated
    prompts = job.prompts(data)
    base = job.ids(len(data))
    ids = [f"{name}#{k + 1}" if n > 1 else name for name in base for k in range(n)]
    stops = list(HUMANEVAL_STOPS) if job.protocol.program == "humaneval" and job.protocol.prompt == "plain" else []
    outputs = written(job, ids, [p for p in prompts for _ in range(n)], [*job.protocol.stops, *stops])
    make = PROGRAMS[job.protocol.program]
    programs = [make(row, outputs[ids[m * n + k]]["text"]) for m, row in enumerate(data) for k in range(n)]
    outcomes = run_programs(programs, kind=kind, desc=f"{job.name}: running programs")
    samples = [
        {
            "id": name,
            "prompt": prompts[m // n],
            "output": outputs[name]["text"],
            "finished": outputs[name]["finished"],
            "read": program.code,
            "right": outcome.passed,
            "why": outcome.why,
        }
        for m, (name, program, outcome) in enumerate(zip(ids, programs, outcomes, strict=True))
    ]
    passed = [sum(o.passed for o in outcomes[m * n : (m + 1) * n]) for m in range(len(data))]
    scores = {f"{job.name} pass@{k}": mean_score([pass_at_k(n, c, k) for c in passed]) for k in PASS_AT if k <= n}
    return Outcome(samples, scores, [] if kind != "none" else ["programs ran without a sandbox, as asked"])


def _reader_problems(suite: Suite, settings: Settings) -> list[str]:
    names = [r for p in suite.protocols.values() for r in p.readers]
    return [miss for miss in (READERS.miss(name) for name in names) if miss]


def _sandbox_problems(suite: Suite, settings: Settings) -> list[str]:
    try:
        require_sandbox(settings.unsafe_code)
    except CoreLoraError as error:
        return [str(error)]
    return []


KINDS.add("generate", Kind(run=run_generate, problems=_reader_problems, writes=True))
KINDS.add("code", Kind(run=run_code, problems=_sandbox_problems, writes=True))
