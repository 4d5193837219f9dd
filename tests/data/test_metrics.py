from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mttl_data.metrics import METRICS, exact_match, mean_interval, rouge_l, score_answers
from mttl_data.rows import Row


def row(target: str, metadata: str = "") -> Row:
    return Row("question", target, "task", metadata=metadata)


@pytest.mark.parametrize("answer", ["Paris", " paris.", '"PARIS"', "paris\n", "\uff30aris"])
def test_exact_match_looks_past_case_marks_and_spaces(answer):
    assert exact_match(answer, row("Paris")) == 1


@pytest.mark.parametrize("answer", ["", "Paris, France", "Pari s"])
def test_exact_match_asks_for_the_whole_answer_and_no_more(answer):
    assert exact_match(answer, row("Paris")) == 0


def longest_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    @cache
    def length(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + length(i + 1, j + 1)
        return max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


@settings(deadline=None)  # the first call imports the scorer
@given(st.lists(st.sampled_from("abcd"), max_size=7), st.lists(st.sampled_from("abcd"), max_size=7))
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(answer, target):
    common = longest_common(tuple(answer), tuple(target))
    expected = 0 if common == 0 else 2 * common / (len(answer) + len(target))
    assert rouge_l(" ".join(answer), row(" ".join(target))) == pytest.approx(expected)


def test_rouge_l_stems_words():
    assert rouge_l("he walks", row("he walked")) == 1


def test_a_row_without_an_entry_names_the_task_and_what_to_use():
    with pytest.raises(ValueError, match=r"'task'.*exact_match"):
        METRICS["reasoning_gym"].score("1", row("1"))


def test_an_unknown_metric_lists_the_known():
    with pytest.raises(ValueError, match="rouge_l"):
        score_answers("bleu", ["a"], [row("a")])


def test_answers_and_rows_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        score_answers("exact_match", ["a", "b"], [row("a")])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_interval_holds_the_mean_and_stays_in_range(scores):
    interval = mean_interval(scores)
    assert interval.n == len(scores)
    assert 0 <= interval.low <= interval.mean + 1e-12
    assert interval.mean - 1e-12 <= interval.high <= 1


def test_all_wrong_still_has_a_width():
    interval = mean_interval([0.0] * 100)
    assert interval.method == "wilson"
    assert interval.low == pytest.approx(0)
    assert 0.03 < interval.high < 0.04  # the rule of three says .03


@pytest.mark.parametrize("chance", [0.02, 0.3, 0.9])
def test_the_interval_holds_the_truth_about_95_times_in_100(chance):
    generator = random.Random(0)
    held = 0
    for _ in range(600):
        scores = [float(generator.random() < chance) for _ in range(100)]
        interval = mean_interval(scores)
        held += interval.low <= chance <= interval.high
    assert 0.91 < held / 600 < 0.99


def test_part_scores_get_the_normal_interval():
    generator = random.Random(0)
    held = 0
    for _ in range(400):
        interval = mean_interval([generator.random() ** 2 for _ in range(60)])
        held += interval.low <= 1 / 3 <= interval.high
    assert mean_interval([0.5, 0.25]).method == "normal"
    assert 0.91 < held / 400 < 0.99


def test_no_scores_is_an_error():
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([])
