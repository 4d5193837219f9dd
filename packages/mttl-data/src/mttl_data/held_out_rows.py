"""The held-out rows of a task, and how a model is asked for answers to them and scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from mttl_data.dataset_library import DatasetLibrary
from mttl_data.evaluate import TaskScore, evaluate_task
from mttl_data.progress import Progress
from mttl_data.prompts import ANSWER_ONLY
from mttl_data.rows import Row


@dataclass(frozen=True)
class HeldOut:
    """Test rows of one task with all that decides a model's score on them.

    Attributes:
        task: Its name.
        metric: The name in ``METRICS``.
        rows: What is asked.
        shots: Solved examples put before each question; none are test rows.
        max_input_length: Most tokens of a prompt without its examples.
        max_output_length: Most tokens of an answer.
        share_prefix: Run what all prompts begin with only once; not for a model that decides
            something by a whole prompt, such as which experts to send it to.
    """

    task: str
    metric: str
    rows: tuple[Row, ...]
    shots: tuple[Row, ...] = ()
    max_input_length: int | None = None
    max_output_length: int | None = None
    share_prefix: bool = True

    def recipe(self) -> dict[str, Any]:
        """What identifies a score on these rows apart from the model, as plain data."""
        limits = {
            "max_input_length": self.max_input_length,
            "max_output_length": self.max_output_length,
        }
        return {
            "rows": _digest(self.rows),
            "shots": _digest(self.shots),
            "instruction": ANSWER_ONLY,
            **{name: most for name, most in limits.items() if most is not None},
        }

    def score(
        self, model: Any, tokenizer: Any, batch_size: int = 32, progress: Progress | None = None
    ) -> TaskScore:
        """Score of ``model`` on the rows; ``progress`` is told how many are answered."""
        return evaluate_task(
            model,
            tokenizer,
            self.rows,
            self.metric,
            self.shots,
            max_input_length=self.max_input_length,
            max_output_length=self.max_output_length,
            batch_size=batch_size,
            share_prefix=self.share_prefix,
            progress=progress,
        )


def held_out(
    library: DatasetLibrary,
    task: str,
    *,
    n_shots: int = 0,
    limit: int | None = None,
    metric: str | None = None,
    split: str = "test",
    task_source: Collection[str] = (),
    template_type: Collection[str] = (),
    max_input_length: int | None = None,
    max_output_length: int | None = None,
) -> HeldOut:
    """The test rows of a task in a library, chosen and cut as the rows that were trained on.

    Args:
        library: Where the task is.
        task: Its name.
        n_shots: Solved examples, the first training rows that are not asked.
        limit: Most rows; all if left out.
        metric: The task's own if left out.
        split: Which rows to ask.
        task_source: Rows from these collections alone; any if empty.
        template_type: Rows of these template types alone; any if empty.
        max_input_length: Most tokens of a prompt without its examples.
        max_output_length: Most tokens of an answer.

    Raises:
        EmptyTaskError: The task has no such rows there.
    """
    rows = library.rows(task, split, task_source, template_type)[:limit]
    asked = {row.source for row in rows}
    train = library.rows(task, "train", task_source, template_type) if n_shots else []
    return HeldOut(
        task=task,
        metric=metric or library.info(task).metric,
        rows=tuple(rows),
        shots=tuple([row for row in train if row.source not in asked][:n_shots]),
        max_input_length=max_input_length,
        max_output_length=max_output_length,
    )


def _digest(rows: Sequence[Row]) -> str:
    text = json.dumps([astuple(row) for row in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
