"""Our verdicts on GSM8K replies beside those of lm-evaluation-harness's own filters and metric, on the same replies.

    corelora evaluate RUN --suite gsm8k --protocol chat
    python benchmarks/harness_agreement.py RUN/eval/gsm8k-chat.json --rows gsm8k_test.jsonl --out FILE

Each of our readers is compared with the filter of the harness's task `gsm8k` that asks the same question. Every reply
on which they differ is written down, with what each read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager

PAIRS = (("gsm8k_flexible", "flexible-extract"), ("gsm8k_last", "flexible-extract"), ("gsm8k_strict", "strict-match"))
SHOWN = 160  # characters of a reply's end


class Instance:
    """What a filter of the harness looks at."""

    def __init__(self, reply: str) -> None:
        self.resps, self.doc, self.filtered_resps = [reply], {}, {}


def harness_read(config: dict[str, Any], name: str, replies: list[str]) -> list[str]:
    """What a filter of the harness's task reads in each reply; [invalid] is nothing."""
    steps = next(f["filter"] for f in config["filter_list"] if f["name"] == name)
    parts = [[step["function"], {k: v for k, v in step.items() if k != "function"}] for step in steps]
    instances = [Instance(reply) for reply in replies]
    build_filter_ensemble(name, parts).apply(instances)
    return [i.filtered_resps[name] for i in instances]


def harness_right(config: dict[str, Any], read: str, answer: str) -> bool:
    """The task's metric on one reply; the reference is the whole solution, as in the harness."""
    metric = next(m for m in config["metric_list"] if m["metric"] == "exact_match")
    options = {k: v for k, v in metric.items() if k not in ("metric", "aggregation", "higher_is_better")}
    return bool(exact_match_fn(predictions=[read], references=[answer], **options)["exact_match"])


def compare(samples: list[dict[str, Any]], answers: dict[str, str]) -> dict[str, Any]:
    """Agreement of each pair, and every reply on which it differs.

    Args:
        samples: of the result file.
        answers: the gold solution by sample id.
    """
    config = TaskManager().task_index["gsm8k"].cfg
    replies = [s["output"] for s in samples]
    out: dict[str, Any] = {}
    for reader, name in PAIRS:
        theirs = harness_read(config, name, replies)
        differing = []
        for sample, read in zip(samples, theirs, strict=True):
            answer = answers[sample["id"]]
            right, ours = harness_right(config, read, answer), sample["readers"][reader]
            if right != ours["right"]:
                gold = answer.rpartition("####")[2].strip()
                seen = {"gold": gold, "ours": ours["read"], "harness": read, "end": sample["output"][-SHOWN:]}
                differing.append({"id": sample["id"], "right": "ours" if ours["right"] else "harness", **seen})
        share = 1 - len(differing) / len(samples)
        out[f"{reader} and {name}"] = {"agreement": share, "n": len(samples), "differing": differing}
    return out


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a result file of the suite gsm8k")
    parser.add_argument("--rows", type=Path, required=True, help="gsm8k_test.jsonl: the gold solutions, in order")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    made = json.loads(arguments.result.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines()]
    samples = made["samples"]
    answers = {s["id"]: rows[n]["answer"] for n, s in enumerate(samples)}
    found = {k: made[k] for k in ("suite", "version", "protocol", "model", "scores") if k in made}
    found |= {"agreement": compare(samples, answers)}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    for name, pair in found["agreement"].items():
        print(f"{name}: {100 * pair['agreement']:.2f} % of {pair['n']}, {len(pair['differing'])} differ")


if __name__ == "__main__":
    main()
