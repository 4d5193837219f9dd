"""Scores of models on held-out rows: measured once, kept in the library, with a bar meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mttl_experts.jobs.progress import Progress, bar, say

if TYPE_CHECKING:
    from mttl_experts.expert import Expert
    from mttl_experts.library import ExpertLibrary
    from mttl_experts.scores import Measured, Score

TWO_SHOT = 2
"""Solved examples that the base also gets, so that a learned format is not taken for a skill."""


class Truncated(Protocol):
    """How many rows did not fit; as text, what they lost."""

    @property
    def rows(self) -> int:
        """Rows that lost something."""


class MeasuredRows(Protocol):
    """What asking rows gives: :class:`~mttl_experts.scores.Measured`, and what did not fit."""

    @property
    def mean(self) -> float:
        """Mean score of a row."""

    @property
    def n(self) -> int:
        """Rows."""

    @property
    def ci95(self) -> tuple[float, float]:
        """Lower and upper end of the mean's 95 % interval."""

    @property
    def truncation(self) -> Truncated:
        """What was cut."""


class Questions(Protocol):
    """Rows that a model is asked and scored on; ``mttl_data.HeldOut`` is one."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def metric(self) -> str:
        """How answers are scored."""

    @property
    def rows(self) -> Sequence[Any]:
        """What is asked."""

    def recipe(self) -> dict[str, Any]:
        """What identifies a score on these rows apart from the model."""

    def score(
        self, model: Any, tokenizer: Any, batch_size: int, progress: Progress
    ) -> MeasuredRows:
        """Ask them."""


class Base(Protocol):
    """A loaded base model; ``mttl_adapters.BaseModel`` is one."""

    @property
    def model(self) -> Any:
        """The transformers model."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""

    @property
    def fingerprint(self) -> str:
        """Digest of its weights."""


@dataclass(frozen=True)
class Scoring:
    """How the scores of one command are measured.

    Attributes:
        library: where scores are kept.
        base: what all models are made of.
        batch_size: rows answered at once.
        again: measure what is kept already too.
        no_score: errors that leave a score out, with a line that says so, and end nothing.
    """

    library: ExpertLibrary
    base: Base
    batch_size: int = 32
    again: bool = False
    no_score: tuple[type[Exception], ...] = ()

    def score(
        self,
        questions: Questions,
        who: str,
        model: AbstractContextManager[Any],
        experts: Sequence[Expert] = (),
        method: Mapping[str, Any] | None = None,
    ) -> Score:
        """The score of a model, from the library if it is there.

        Args:
            questions: what it is asked.
            who: what to call it.
            model: gives, for as long as it is asked, what has the transformers model as ``model``.
            experts: what is in it.
            method: how they became one model; part of the score's key.
        """

        def measure() -> Measured:
            what = f"{questions.task}: {who}"
            with model as asked, bar(what, len(questions.rows)) as shown:
                score = questions.score(
                    asked.model, self.base.tokenizer, self.batch_size, shown.update
                )
            if score.truncation.rows:
                say(f"{what}: of {score.n}, {score.truncation}")
            return score

        how = questions.recipe() | {
            "base": self.base.fingerprint,
            "dtype": str(self.base.model.dtype),
        }
        if method:
            how["method"] = dict(method)
        return self.library.scores.get_or_make(
            list(experts), questions.task, questions.metric, how, measure, again=self.again
        )

    def score_if_possible(self, *args: Any, **kwargs: Any) -> Score | None:
        """``score``; after one of the errors of ``no_score`` None, and a line that says why."""
        try:
            return self.score(*args, **kwargs)
        except self.no_score as error:
            questions, who = args[:2]
            say(f"{questions.task}: {who} has no score: {error}")
            return None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None if none is."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def percent(value: float | None) -> str:
    """A share as a table shows it; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}"
