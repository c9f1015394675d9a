"""Evaluation by likelihood: which of a question's answers the model finds likeliest.

The log-likelihoods are the harness's own (HFLM). `acc` takes the answer with the largest sum over its tokens,
`acc_norm` the one with the largest sum per byte of its text, as the harness's multiple_choice does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm

from corelora.evaluate.job import KINDS, Job, Kind, Outcome
from corelora.evaluate.scores import mean_score
from corelora.evaluate.session import batches
from corelora.tasks.answers import choices_of

_LABEL = re.compile(r"\b(answer|solution|ending|option)\s?(\d)\s*:", re.IGNORECASE)


def choice_texts(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """(question, texts of the answers, index of the right one) of a row in LLM-Adapters' commonsense form.

    The options are what stands behind "Answer1:", "Solution1:", ... in the instruction; without any (BoolQ), they are
    the words of its answer format.
    """
    body, _, _ = str(row["instruction"]).partition("Answer format:")
    names = choices_of(row)
    marks = list(_LABEL.finditer(body))[: len(names)]
    right = [n.lower() for n in names].index(str(row["answer"]).lower())
    if len(marks) < len(names):
        return body.strip(), names, right
    ends = [m.start() for m in marks[1:]] + [len(body)]
    texts = [body[m.end() : end].strip() for m, end in zip(marks, ends, strict=True)]
    return body[: marks[0].start()].strip(), texts, right


def run_likelihood(job: Job) -> Outcome:
    """Score every answer of every row; outputs are kept in blocks of rows of like length."""
    data = job.data
    parts = [choice_texts(row) for row in data]
    asked = job.prompts([{**row, "question": part[0]} for row, part in zip(data, parts, strict=True)])
    # Without a blank at its end: the harness would count one as the answer's.
    ids, prompts = job.ids(len(data)), [prompt.rstrip() for prompt in asked]
    size = job.batch_size
    lm = HFLM(pretrained=job.model, tokenizer=job.tokenizer, batch_size=size)
    lengths = [len(p) for p in prompts]
    with tqdm(total=len(ids), initial=sum(n in job.partial.outputs for n in ids), desc=job.name, unit="row") as bar:
        for block in batches(ids, lengths, 8 * size, job.partial):
            new = sum(ids[n] not in job.partial.outputs for n in block)
            job.partial.add(_likelihoods(lm, {ids[n]: (prompts[n], parts[n][1]) for n in block}))
            bar.update(new)
    return _judged(job, ids, prompts, parts)


def _likelihoods(lm: Any, asked: Mapping[str, tuple[str, list[str]]]) -> dict[str, list[float]]:
    """The sum of log-probabilities of each answer's tokens, by sample."""
    flat = [(name, prompt, " " + text) for name, (prompt, texts) in asked.items() for text in texts]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(prompt, text), idx=n)
        for n, (_, prompt, text) in enumerate(flat)
    ]
    found: dict[str, list[float]] = {name: [] for name in asked}
    for (name, _, _), (value, _) in zip(flat, lm.loglikelihood(requests, disable_tqdm=True), strict=True):
        found[name].append(float(value))
    return found


def _judged(job: Job, ids: list[str], prompts: list[str], parts: list[tuple[str, list[str], int]]) -> Outcome:
    samples, plain, per_byte = [], [], []
    for name, prompt, (_, texts, right) in zip(ids, prompts, parts, strict=True):
        sums = job.partial.outputs[name]
        normed = [s / max(1, len(t.encode())) for s, t in zip(sums, texts, strict=True)]
        best, best_normed = sums.index(max(sums)), normed.index(max(normed))
        plain.append(float(best == right))
        per_byte.append(float(best_normed == right))
        samples.append(
            {
                "id": name,
                "prompt": prompt,
                "output": dict(zip(texts, sums, strict=False)),
                "read": texts[best_normed],
                "gold": texts[right],
                "right": best_normed == right,
            }
        )
    scores = {f"{job.name} acc_norm": mean_score(per_byte), f"{job.name} acc": mean_score(plain)}
    return Outcome(samples, scores)


KINDS.add("likelihood", Kind(run=run_likelihood))
