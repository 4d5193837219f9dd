from __future__ import annotations

import pytest

from mttl_data.dataset_library import DatasetLibrary
from mttl_data.errors import EmptyTaskError
from mttl_data.held_out_rows import held_out
from mttl_data.rows import Row


@pytest.fixture
def library(tmp_path):
    made = DatasetLibrary(f"virtual://{tmp_path.name}", create=True)
    rows = [
        Row(f"{split} {i}?", str(i), "t", "NIv2" if i % 2 else "P3", "zs" if i % 3 else "fs", split)
        for split in ("train", "test")
        for i in range(12)
    ]
    made.add_task("t", rows, metric="exact_match")
    return made


def test_the_filters_of_the_training_rows_hold_for_the_test_rows_and_the_examples(library):
    held = held_out(library, "t", n_shots=2, task_source=["NIv2"], template_type=["zs"])
    assert [row.source for row in held.rows] == [f"test {i}?" for i in (1, 5, 7, 11)]
    assert {row.task_source for row in held.shots} == {"NIv2"}
    assert {row.template_type for row in held.shots} == {"zs"}


def test_filters_that_leave_nothing_are_named(library):
    with pytest.raises(EmptyTaskError, match="no test rows of task 't' are from CoT with any"):
        held_out(library, "t", task_source=["CoT"])


def test_limits_are_part_of_the_recipe_and_none_leaves_it_as_it_was(library):
    plain = held_out(library, "t")
    assert plain.recipe().keys() == {"rows", "shots", "instruction"}
    cut = held_out(library, "t", max_input_length=9, max_output_length=3)
    assert cut.recipe() == plain.recipe() | {"max_input_length": 9, "max_output_length": 3}
