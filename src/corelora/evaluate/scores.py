"""Scores with standard errors, from verdicts or from predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 500


def mean_score(values: Sequence[float]) -> dict[str, Any]:
    """Mean of verdicts (or of pass@k's estimates) and its standard error, sqrt(variance / n).

    Args:
        values: one a sample, in [0, 1].
    """
    n = len(values)
    mean = sum(values) / n if n else math.nan
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else 0.0
    return {"value": mean, "stderr": math.sqrt(variance / n) if n else math.nan, "n": n}


def bootstrap_score(measure: Callable[[np.ndarray], float], n: int, seed: int = 0) -> dict[str, Any]:
    """A figure over all samples, and its spread over samples drawn again with replacement.

    Args:
        measure: the figure on the samples with these indices.
        n: number of samples.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)
    drawn = [measure(rng.integers(0, n, n)) for _ in range(RESAMPLES)]
    return {"value": float(measure(np.arange(n))), "stderr": float(np.std(drawn, ddof=1)), "n": n}


def average(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The plain mean over tasks, as papers print it; the tasks' errors are taken as independent."""
    value = sum(s["value"] for s in scores) / len(scores)
    stderr = math.sqrt(sum(s["stderr"] ** 2 for s in scores)) / len(scores)
    return {"value": value, "stderr": stderr, "n": sum(s["n"] for s in scores)}
