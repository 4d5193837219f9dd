"""Scores: what a model made of some experts reached on a task, kept among the artifacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from mttl_experts.artifacts import Artifacts, Experts, digests_of
from mttl_experts.plain import plain, recipe_digest
from mttl_storage import Conflict, Denied, Item, ReadOnly, StorageFull


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        task: what it was measured on.
        metric: how rows were scored.
        value: the mean over rows.
        n: rows.
        recipe: what else decides it, as plain data: split, prompt, base fingerprint, merge, …
        experts: digests of the experts in the model, sorted; none for the base alone.
        ci95: ends of the mean's 95 % interval, if it was measured.
    """

    task: str
    metric: str
    value: float
    n: int
    recipe: dict[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    ci95: tuple[float, float] | None = None

    @property
    def digest(self) -> str:
        """Of what was measured: experts, task, metric and recipe, whatever the number."""
        key = _score_key(self.task, self.metric, self.recipe)
        return recipe_digest([sorted(self.experts), key])


class Measured(Protocol):
    """What a measurement gives: a mean over rows, how many, and its 95 % interval."""

    @property
    def mean(self) -> float:
        """Mean score of a row."""

    @property
    def n(self) -> int:
        """Rows."""

    @property
    def ci95(self) -> tuple[float, float]:
        """Lower and upper end."""


class Scores:
    """Scores by (experts, task, metric, recipe), kept as artifacts."""

    def __init__(self, artifacts: Artifacts) -> None:
        """Keep them among these artifacts."""
        self._artifacts = artifacts

    def put(self, experts: Experts, score: Score) -> None:
        """Keep the score of a model made of these experts, in place of an older one."""
        key = _score_key(score.task, score.metric, score.recipe)
        value = {"value": score.value, "n": score.n, "ci95": score.ci95}
        self._artifacts.put(experts, key, value)

    def get(
        self,
        experts: Experts,
        task: str,
        metric: str,
        recipe: Mapping[str, Any] | None = None,
    ) -> Score | None:
        """The score kept under this key, or None."""
        digests = digests_of(experts)
        found = self._artifacts.get(digests, _score_key(task, metric, recipe or {}))
        if found is None:
            return None
        ends = found.get("ci95")
        return Score(
            task,
            metric,
            found["value"],
            found["n"],
            plain(recipe or {}),
            tuple(digests),
            ci95=None if ends is None else (ends[0], ends[1]),
        )

    def get_or_make(
        self,
        experts: Experts,
        task: str,
        metric: str,
        recipe: Mapping[str, Any],
        make: Callable[[], Measured],
        again: bool = False,
    ) -> Score:
        """The score kept under this key; if there is none, what ``make`` measures, kept from then.

        Where it cannot be kept (the library is only read, the disk is full, another writer was
        first) it is given back all the same.

        Args:
            experts: in the model, or their digests; none for the base alone.
            task: what it is measured on.
            metric: how rows are scored.
            recipe: what else decides it.
            make: measures it.
            again: measure it even if it is kept.
        """
        kept = None if again else self.get(experts, task, metric, recipe)
        if kept is not None:
            return kept
        measured = make()
        digests = tuple(digests_of(experts))
        score = Score(
            task, metric, measured.mean, measured.n, plain(recipe), digests, measured.ci95
        )
        with suppress(
            Conflict, Denied, ReadOnly, StorageFull
        ):  # the number is what was asked for; keeping it is a courtesy
            self.put(experts, score)
        return score

    def item(self, score: Score) -> Item:
        """Where a score is kept, with the generation and time of its commit.

        Raises:
            NotFound: when it is not kept here.
        """
        key = _score_key(score.task, score.metric, score.recipe)
        return self._artifacts.item(score.experts, key)

    def table(self) -> list[Score]:
        """All scores in the repository, by task, metric and experts."""
        scores = []
        for entry in self._artifacts.entries():
            if isinstance(entry.recipe, dict) and entry.recipe.get("kind") == "score":
                task, metric = entry.recipe["task"], entry.recipe["metric"]
                score = self.get(entry.experts, task, metric, entry.recipe["how"])
                scores += [] if score is None else [score]
        return sorted(scores, key=lambda score: (score.task, score.metric, score.experts))


def _score_key(task: str, metric: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "score", "task": task, "metric": metric, "how": dict(recipe)}
