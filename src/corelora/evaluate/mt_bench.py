"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): two turns of 80 questions, judged one by one or in pairs.

Temperatures by category and the two kinds of judging follow FastChat's llm_judge; the judge's prompts and the reference
answers (maths, reasoning, coding) are FastChat's files, read from beside the questions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from corelora.errors import CoreLoraError
from corelora.evaluate.generate import Writer, writer_of
from corelora.evaluate.job import KINDS, Job, Kind, Outcome, Settings
from corelora.evaluate.judge import KEY, MODEL, URL, Judge, endpoint_of, read_choice, read_rating
from corelora.evaluate.scores import mean_score
from corelora.evaluate.session import batches
from corelora.evaluate.suites import Suite
from corelora.run.generate import Writing

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # others are greedy
REFERENCED = ("math", "reasoning", "coding")
PROMPTS_FILE, REFERENCES_FILE = "judge_prompts.jsonl", "reference_answer_gpt-4.jsonl"
TWO_TURNS = "multi-turn"


def answers(job: Job) -> dict[str, list[str]]:
    """Both replies to every question, by sample: the second turn sees the first."""
    data = job.data
    ids = job.ids(len(data))
    lengths = [len(row["turns"][0]) for row in data]
    write = writer_of(job)
    with tqdm(
        total=len(ids), initial=sum(n in job.partial.outputs for n in ids), desc="answers", unit="question"
    ) as bar:
        for category in sorted({row["category"] for row in data}):
            mine = [n for n, row in enumerate(data) if row["category"] == category]
            parts = [ids[n] for n in mine], [lengths[n] for n in mine]
            for batch in batches(*parts, job.batch_size, job.partial):
                rows = [data[mine[n]] for n in batch]
                new = sum(ids[mine[n]] not in job.partial.outputs for n in batch)
                made = _two_turns(job, write, rows, TEMPERATURES.get(category, 0.0))
                job.partial.add({ids[mine[n]]: replies for n, replies in zip(batch, made, strict=True)})
                bar.update(new)
    return {name: job.partial.outputs[name] for name in ids}


def _two_turns(job: Job, write: Writer, rows: list[dict[str, Any]], temperature: float) -> list[list[str]]:
    talks: list[list[dict[str, str]]] = [[] for _ in rows]
    writing = Writing(job.protocol.max_new_tokens, (), temperature)
    for turn in range(2):
        for talk, row in zip(talks, rows, strict=True):
            talk.append({"role": "user", "content": row["turns"][turn]})
        template = job.tokenizer.apply_chat_template
        prompts = [template(talk, add_generation_prompt=True, tokenize=False) for talk in talks]
        names = [f"{row['question_id']} {turn}" for row in rows]
        for talk, reply in zip(talks, write(prompts, writing, names), strict=True):
            talk.append({"role": "assistant", "content": reply.text})
    return [[talk[1]["content"], talk[3]["content"]] for talk in talks]


def run_mt_bench(job: Job) -> Outcome:
    """Answers, and ratings where a judge is named.

    Raises:
        CoreLoraError: no chat template; the judge's files are missing; the judge can't be reached.
    """
    if not job.tokenizer.chat_template:
        raise CoreLoraError("mt_bench: this model has no chat template")
    data, endpoint = job.data, endpoint_of(os.environ)
    given = answers(job)
    samples = [
        {"id": name, "category": row["category"], "prompt": "\n\n".join(row["turns"]), "output": given[name]}
        for name, row in zip(given, data, strict=True)
    ]
    if endpoint is None:
        return Outcome(samples, {}, [f"answers only, nothing was sent: name a judge in {URL}, {MODEL} and {KEY}"])
    bench = Bench.beside(Path(job.task.test.path), Judge(endpoint, job.partial.path.with_suffix(".judge")))
    for sample, row in zip(tqdm(samples, desc="judging", unit="question"), data, strict=True):
        sample["ratings"], sample["verdicts"] = bench.rate(row, given[sample["id"]])
        sample["read"] = sample["ratings"]
    return Outcome(samples, rating_scores(samples), [f"judge {endpoint.model}; ratings are parts of 10"])


def rating_scores(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean ratings over 10: all, by turn, by category; a question without a rating is left out of the means."""
    rated = [(s["category"], turn, r / 10) for s in samples for turn, r in enumerate(s["ratings"], 1) if r is not None]
    return _grouped("mt_bench", rated)


def _grouped(name: str, judged: list[tuple[str, int, float]]) -> dict[str, dict[str, Any]]:
    """Means of (category, turn, value): all under `name`, by turn, by category."""
    groups = {name: [v for _, _, v in judged]}
    groups |= {f"turn {t}": [v for _, turn, v in judged if turn == t] for t in (1, 2)}
    groups |= {c: [v for category, _, v in judged if category == c] for c in sorted({c for c, _, _ in judged})}
    return {name: mean_score(values) for name, values in groups.items() if values}


def run_pairs(job: Job) -> Outcome:
    """Answers judged beside another run's: each pair in both orders, a tie where the orders disagree.

    Raises:
        CoreLoraError: no chat template; the other run lacks a question; the judge can't be reached.
    """
    if not job.tokenizer.chat_template:
        raise CoreLoraError("mt_bench: this model has no chat template")
    endpoint, against = endpoint_of(os.environ), job.settings.against
    assert endpoint is not None
    assert against is not None
    others = other_answers(against)
    missing = [name for name in job.ids(len(job.data)) if name not in others]
    if missing:
        raise CoreLoraError(f"mt_bench: {against} has no answer to {missing[0]} and {len(missing) - 1} more")
    given = answers(job)
    bench = Bench.beside(Path(job.task.test.path), Judge(endpoint, job.partial.path.with_suffix(".judge")))
    samples = []
    for name, row in zip(tqdm(given, desc="judging", unit="question"), job.data, strict=True):
        found = bench.compare(row, given[name], others[name])
        facts = {"id": name, "category": row["category"], "prompt": "\n\n".join(row["turns"])}
        samples.append({**facts, "output": given[name], "against": others[name], "choices": found, "read": found})
    return Outcome(samples, pair_scores(samples), [f"judge {endpoint.model}; against {against}; a tie counts half"])


def pair_scores(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Win rates, a tie counting half: all, by turn, by category; and how many pairs were won, lost, tied."""
    worth = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    judged = [(s["category"], turn, choice) for s in samples for turn, choice in enumerate(s["choices"], 1)]
    scores = _grouped("mt_bench win rate", [(category, turn, worth[choice]) for category, turn, choice in judged])
    names = {"win": "wins", "loss": "losses", "tie": "ties"}
    return scores | {names[n]: mean_score([float(c == n) for _, _, c in judged]) for n in names}


def other_answers(run: str) -> dict[str, list[str]]:
    """Both replies to every question of another run, by sample.

    Raises:
        CoreLoraError: the run has none.
    """
    for name in ("mt_bench-single", "mt_bench-pairwise"):
        path = Path(run) / "eval" / f"{name}.json"
        if path.is_file():
            return {s["id"]: s["output"] for s in json.loads(path.read_text(encoding="utf-8"))["samples"]}
    raise CoreLoraError(f"--against {run}: no answers are there; first: corelora evaluate {run} --suite mt_bench")


def _pair_problems(suite: Suite, settings: Settings) -> list[str]:
    """What pairs need beside a model: another run's answers, and a judge."""
    found = []
    if settings.against is None:
        found.append(f"{suite.name}: the protocol pairwise compares two runs: name the other with --against RUN")
    else:
        try:
            other_answers(settings.against)
        except CoreLoraError as error:
            found.append(str(error))
    if endpoint_of(os.environ) is None:
        found.append(f"{suite.name}: pairs need a judge: name one in {URL}, {MODEL} and {KEY}")
    return found


class Bench:
    """The judge with its prompts and reference answers.

    Args:
        judge: who is asked.
        prompts: by name, as in FastChat's judge_prompts.jsonl.
        references: two replies, by question.
    """

    def __init__(
        self, judge: Judge, prompts: Mapping[str, Mapping[str, str]], references: Mapping[int, list[str]]
    ) -> None:
        self.judge, self.prompts, self.references = judge, prompts, references

    @classmethod
    def beside(cls, questions: Path, judge: Judge) -> Bench:
        """Prompts and references from beside the file of questions.

        Raises:
            CoreLoraError: a file is missing.
        """
        rows = {}
        for name in (PROMPTS_FILE, REFERENCES_FILE):
            path = questions.parent / name
            if not path.is_file():
                raise CoreLoraError(f"mt_bench: {path} is missing: it comes with FastChat (fastchat/llm_judge/data)")
            rows[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        references = {row["question_id"]: row["choices"][0]["turns"] for row in rows[REFERENCES_FILE]}
        return cls(judge, {row["name"]: row for row in rows[PROMPTS_FILE]}, references)

    def rate(self, row: Mapping[str, Any], replies: list[str]) -> tuple[list[float | None], list[str]]:
        """Ratings of 1 to 10 of both turns (None: no verdict), and what the judge said."""
        found = [self.judge.verdict(*self._single(row, replies, turn), read_rating) for turn in (0, 1)]
        return [rating for rating, _ in found], [said for _, said in found]

    def compare(self, row: Mapping[str, Any], mine: list[str], other: list[str]) -> list[str]:
        """For each turn "win", "loss" or "tie": asked in both orders, and a tie where the orders disagree."""
        return [self._compare_turn(row, mine, other, turn) for turn in (0, 1)]

    def _compare_turn(self, row: Mapping[str, Any], mine: list[str], other: list[str], turn: int) -> str:
        first, _ = self.judge.verdict(*self._pair(row, mine, other, turn), read_choice)
        second, _ = self.judge.verdict(*self._pair(row, other, mine, turn), read_choice)
        if (first, second) == ("A", "B"):
            return "win"
        return "loss" if (first, second) == ("B", "A") else "tie"

    def _single(self, row: Mapping[str, Any], replies: list[str], turn: int) -> tuple[str, str]:
        values = self._values(row, turn) | {"answer": replies[0], "answer_1": replies[0], "answer_2": replies[1]}
        return self._filled("single", row, turn, values)

    def _pair(self, row: Mapping[str, Any], a: list[str], b: list[str], turn: int) -> tuple[str, str]:
        values = self._values(row, turn) | {"answer_a": a[0], "answer_b": b[0]}
        values |= {f"answer_{side}_{n + 1}": replies[n] for side, replies in (("a", a), ("b", b)) for n in range(2)}
        return self._filled("pair", row, turn, values)

    def _values(self, row: Mapping[str, Any], turn: int) -> dict[str, str]:
        references = self.references.get(row["question_id"], ["", ""])
        values = {"question": row["turns"][0], "ref_answer_1": references[0], "ref_answer_2": references[1]}
        return values | {"question_1": row["turns"][0], "question_2": row["turns"][1]}

    def _filled(self, kind: str, row: Mapping[str, Any], turn: int, values: dict[str, str]) -> tuple[str, str]:
        referenced = row["category"] in REFERENCED and row["question_id"] in self.references
        name = f"{kind}-" + ("math-v1" if referenced else "v1" if kind == "single" else "v2")
        prompt = self.prompts[name + (f"-{TWO_TURNS}" if turn else "")]
        return prompt["system_prompt"], prompt["prompt_template"].format(**values)


KINDS.add("judge", Kind(run=run_mt_bench, writes=True))
KINDS.add("judge_pairs", Kind(run=run_pairs, problems=_pair_problems, writes=True))
