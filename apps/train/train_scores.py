"""Scores on rows held out, of the base and of what was trained, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from rich.table import Table
from train_options import TrainOptions

from mttl_data import DatasetLibrary, HeldOut, held_out
from mttl_experts import Score
from mttl_experts.jobs import TWO_SHOT, Scoring, mean, percent

SCORES = ("base", "base_two_shot", "expert")


def rows_held_out(
    options: TrainOptions, data: DatasetLibrary, task: str, n_shots: int = 0
) -> HeldOut:
    """Rows of a task to score on."""
    return held_out(
        data,
        task,
        n_shots=n_shots,
        limit=options.test_rows,
        metric=options.metric,
        task_source=options.task_source,
        template_type=options.template_type,
        max_input_length=options.max_input_length,
        max_output_length=options.max_output_length,
    )


def base_scores(
    options: TrainOptions, data: DatasetLibrary, scoring: Scoring, task: str
) -> tuple[Score, Score | None]:
    """Of the base on a task's test rows, and of the base with two examples."""
    return (
        scoring.score(rows_held_out(options, data, task), "base", nullcontext(scoring.base)),
        scoring.score_if_possible(
            rows_held_out(options, data, task, TWO_SHOT),
            f"base with {TWO_SHOT} examples",
            nullcontext(scoring.base),
        ),
    )


def row_of(
    name: str,
    tasks: Sequence[str],
    bases: Sequence[tuple[Score, Score | None]],
    own: Sequence[Score],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """One row of the table, from the scores on each of some tasks."""
    return {
        "expert_name": name,
        "task": ",".join(tasks),
        "metric": own[0].metric,
        "n": sum(score.n for score in own),
        "base": mean(score.value for score, _ in bases),
        "base_two_shot": mean(None if shots is None else shots.value for _, shots in bases),
        "expert": mean(score.value for score in own),
        "ci95": own[0].ci95 if len(tasks) == 1 else None,
        "examples": metrics["examples"],
        "tokens_per_second": metrics["tokens"] / max(metrics["seconds"], 1e-9),
        "seconds": metrics["seconds"],
    }


def table_of(
    rows: list[dict[str, Any]], means: Mapping[str, float | None], who: str = "expert"
) -> Table:
    """Scores of the base and of what was trained, a line a row, and their means."""
    table = Table(title="Held-out scores, in percent", title_justify="left")
    table.add_column("task", overflow="fold")
    for column in (
        "base", "base, 2 examples", who, "95 %", "rows", "examples", "tokens/s", "seconds"
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        low_high = "-".join(f"{100 * end:.0f}" for end in row["ci95"] or ())
        table.add_row(
            row["expert_name"],
            *(percent(row[kind]) for kind in SCORES),
            low_high,
            str(row["n"]),
            str(row["examples"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds']:.0f}",
        )
    table.add_section()
    table.add_row("mean", *(percent(means[kind]) for kind in SCORES))
    return table
