from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from mttl_data.errors import UnknownTaskError
from mttl_data.metrics import score_answers
from mttl_data.starter import STARTER_TASKS, starter_rows

SIZES = {"train": 60, "validation": 10, "test": 20}


@pytest.fixture(scope="module")
def mixture():
    return {task: starter_rows(task, SIZES) for task in STARTER_TASKS}


def test_the_mixture_has_twelve_tasks_that_show_skill():
    assert len(STARTER_TASKS) >= 12
    assert max(task.chance for task in STARTER_TASKS.values()) < 0.4


def test_sizes_are_as_asked(mixture):
    for rows in mixture.values():
        assert Counter(row.split for row in rows) == SIZES


def test_the_same_seed_gives_the_same_rows(mixture):
    for task, rows in mixture.items():
        assert starter_rows(task, SIZES) == rows


def test_another_seed_gives_other_rows(mixture):
    here = {row.source for row in mixture["lcm"]}
    there = {row.source for row in starter_rows("lcm", SIZES, seed=43)}
    assert len(here & there) < len(here) / 2


def test_no_source_is_in_two_splits_or_twice_in_one(mixture):
    for rows in mixture.values():
        assert len({row.source for row in rows}) == len(rows)


def test_no_scrambled_answer_is_in_two_splits(mixture):
    for task, settings in STARTER_TASKS.items():
        if settings.unique_answers:
            answers = [row.target.casefold() for row in mixture[task]]
            assert len(set(answers)) == len(answers), task


def test_more_training_rows_leave_the_test_rows_alone(mixture):
    more = starter_rows("chain_sum", {**SIZES, "train": 90})
    assert [row for row in more if row.split == "test"] == [
        row for row in mixture["chain_sum"] if row.split == "test"
    ]


def test_every_target_gets_the_full_score_from_its_own_scorer(mixture):
    for task, rows in mixture.items():
        scores = score_answers("reasoning_gym", [row.target for row in rows], rows)
        assert set(scores) == {1.0}, task


def test_an_empty_answer_gets_nothing(mixture):
    for task, rows in mixture.items():
        assert sum(score_answers("reasoning_gym", [""] * len(rows), rows)) == 0, task


def test_one_fixed_answer_scores_about_what_the_table_says(mixture):
    for task, settings in STARTER_TASKS.items():
        rows = mixture[task]
        common = Counter(row.target for row in rows).most_common(5)
        best = max(
            sum(score_answers("reasoning_gym", [answer] * len(rows), rows)) / len(rows)
            for answer, _ in common
        )
        assert best <= settings.chance + 0.15, task


def test_rows_hold_the_question_alone_and_what_the_scorer_needs(mixture):
    for task, rows in mixture.items():
        assert all("answer only" not in row.source.lower() for row in rows)
        for row in rows:
            assert row.task_name == task
            assert len(row.source) < 500
            content = json.loads(row.metadata)
            assert content["entry"]["question"].strip() == row.source


def test_an_unknown_task_gets_near_names():
    with pytest.raises(UnknownTaskError, match="'spell_backward'"):
        starter_rows("spel_backward")


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="dev"):
        starter_rows("lcm", {"dev": 3})


def test_more_rows_than_there_are_is_one_clear_error():
    with pytest.raises(ValueError, match="distinct rows"):
        starter_rows("lcm", {"train": 5000})


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, mttl_data.starter; "
        "sys.exit(bool({'torch', 'transformers', 'reasoning_gym'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
