"""Scores of one answer, and the mean of many with its interval.

Generation belongs to ``evaluate``; here are texts and numbers alone.
"""

from __future__ import annotations

import json
import math
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from mttl_data.errors import RowsError
from mttl_data.rows import Row

_Z95 = 1.959963984540054  # the normal quantile at .975
_TRIMMED = " \t\n\r\"'`.,;:!"


@dataclass(frozen=True)
class Metric:
    """A score in [0, 1] for one answer, and where it is defined."""

    score: Callable[[str, Row], float]
    source: str


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` rows and its 95 % interval.

    ``method`` is ``"wilson"`` where every score is 0 or 1, which keeps its width at a mean of 0 or
    1, and ``"normal"`` (1.96 standard errors, cut to [0, 1]) elsewhere.
    """

    n: int
    mean: float
    low: float
    high: float
    method: str


def normalised(text: str) -> str:
    """``text`` in one case and Unicode form, single-spaced, without marks around it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(_TRIMMED)


def exact_match(answer: str, row: Row) -> float:
    """1 where answer and target are the same text after ``normalised``, else 0."""
    return float(normalised(answer) == normalised(row.target))


def rouge_l(answer: str, row: Row) -> float:
    """F-measure of the longest common subsequence of words, stemmed (Lin 2004)."""
    return float(_rouge().score(row.target, answer)["rougeL"].fmeasure)


def reasoning_gym_score(answer: str, row: Row) -> float:
    """Score by the reasoning-gym task that made the row; some give part of a point.

    The row's metadata names the generator and holds its entry, as ``starter`` writes it.
    """
    try:
        metadata = json.loads(row.metadata)
        generator, entry = metadata["generator"], metadata["entry"]
    except (ValueError, KeyError, TypeError) as error:
        raise RowsError(
            f"a row of task {row.task_name!r} has no reasoning-gym entry in its metadata; "
            "score it with 'exact_match' or 'rouge_l'"
        ) from error
    score = float(_reasoning_gym_scorer(generator)(answer.strip(), entry))
    return min(1.0, max(0.0, score))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "exact_match": Metric(exact_match, "https://arxiv.org/abs/1606.05250"),
        "rouge_l": Metric(rouge_l, "https://aclanthology.org/W04-1013"),
        "reasoning_gym": Metric(reasoning_gym_score, "https://arxiv.org/abs/2505.24760"),
    }
)


def score_answers(metric: str, answers: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """The score of each answer for the row at its place."""
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; there are {', '.join(METRICS)}")
    score = METRICS[metric].score
    return [score(answer, row) for answer, row in zip(answers, rows, strict=True)]


def mean_interval(scores: Sequence[float]) -> Interval:
    """Mean of scores in [0, 1] with its 95 % interval; see ``Interval`` for which kind."""
    n = len(scores)
    if n == 0:
        raise ValueError("no scores to take a mean of")
    mean = math.fsum(scores) / n
    if all(score in (0.0, 1.0) for score in scores):
        shrink = 1 + _Z95**2 / n
        centre = (mean + _Z95**2 / (2 * n)) / shrink
        half = _Z95 * math.sqrt(mean * (1 - mean) / n + _Z95**2 / (4 * n * n)) / shrink
        method = "wilson"
    else:
        variance = math.fsum((score - mean) ** 2 for score in scores) / max(n - 1, 1)
        centre, half, method = mean, _Z95 * math.sqrt(variance / n), "normal"
    return Interval(
        n, mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)), method
    )


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


@cache
def _reasoning_gym_scorer(generator: str) -> Callable[[str, dict[str, Any]], float]:
    reasoning_gym()
    from reasoning_gym.factory import get_score_answer_fn

    scorer: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(generator)
    return scorer


def reasoning_gym() -> Any:
    """The reasoning-gym module; its import is slow, and the first one warns about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import reasoning_gym as module
    return module
