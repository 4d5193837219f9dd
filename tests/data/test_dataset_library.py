from __future__ import annotations

import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mttl_data.dataset_library import DatasetLibrary
from mttl_data.errors import EmptyTaskError, TaskExistsError, UnknownTaskError
from mttl_data.rows import SPLITS, Row
from mttl_data.starter import make_starter, starter_rows
from mttl_storage import NotFound

SIZES = {"train": 12, "validation": 3, "test": 5}


def rows(task: str = "sums", n: int = 10) -> list[Row]:
    splits = ["train"] * (n - 2) + ["validation", "test"]
    return [
        Row(f"{i} + {i} =", str(2 * i), task, "made", "plain", split, f'{{"i": {i}}}')
        for i, split in enumerate(splits)
    ]


@pytest.fixture(params=["local", "virtual"])
def library(request, tmp_path):
    uri = {"local": f"local://{tmp_path}/data", "virtual": f"virtual://{tmp_path.name}"}
    return DatasetLibrary(uri[request.param], create=True)


def test_rows_come_back_as_they_went_in(library):
    given_rows = rows()
    library.add_task("sums", given_rows, metric="exact_match")
    back = [row for split in SPLITS for row in library.rows("sums", split)]
    assert back == given_rows


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_any_text_comes_back(pairs):
    library = DatasetLibrary(f"virtual://any-text-{uuid.uuid4()}", create=True)
    texts = [
        (a.encode("utf-8", "replace").decode(), b.encode("utf-8", "replace").decode())
        for a, b in pairs
    ]
    given_rows = [Row(a, b, "t") for a, b in texts]
    library.add_task("t", given_rows, metric="exact_match")
    assert library.rows("t", "train") == given_rows


def test_info_is_known_without_reading_rows(library):
    info = library.add_task(
        "sums", rows(), metric="exact_match", source="made here", recipe={"seed": 1}
    )
    assert info == library.info("sums")
    assert info.sizes == {"train": 8, "validation": 1, "test": 1}
    assert info.metric == "exact_match"
    assert info.recipe == {"seed": 1}
    assert info.columns[:3] == ("source", "target", "task_name")


def test_the_same_rows_again_change_nothing(library):
    first = library.add_task("sums", rows(), metric="exact_match")
    generation = library.repository.generation
    assert library.add_task("sums", rows(), metric="exact_match") == first
    assert library.repository.generation == generation


def test_the_same_rows_are_the_same_bytes_and_digest_anywhere(tmp_path):
    one = DatasetLibrary(tmp_path / "one", create=True)
    two = DatasetLibrary(tmp_path / "two", create=True)
    for library in (one, two):
        library.add_task("sums", rows(), metric="exact_match")
    assert one.info("sums").digest == two.info("sums").digest
    name = "datasets/sums"
    assert one.repository.item(name).digest == two.repository.item(name).digest


def test_other_rows_under_a_name_are_refused_unless_they_replace(library):
    library.add_task("sums", rows(n=10), metric="exact_match")
    with pytest.raises(TaskExistsError, match=r"'sums'.*replace"):
        library.add_task("sums", rows(n=12), metric="exact_match")
    assert library.info("sums").sizes["train"] == 8
    library.add_task("sums", rows(n=12), metric="exact_match", replace=True)
    assert library.info("sums").sizes["train"] == 10


def test_tasks_are_in_the_order_of_their_names(library):
    for task in ("b", "a", "c"):
        library.add_task(task, rows(task), metric="exact_match")
    assert list(library) == library.tasks() == ["a", "b", "c"]
    assert len(library) == 3
    assert "a" in library
    assert "d" not in library


def test_an_unknown_task_gets_near_names(library):
    library.add_task("sums", rows(), metric="exact_match")
    for ask in (library.info, lambda task: library.rows(task, "train"), library.remove_task):
        with pytest.raises(UnknownTaskError, match="did you mean 'sums'"):
            ask("summs")


def test_a_name_that_begins_another_is_not_that_other(library):
    library.add_task("e10", rows("e10"), metric="exact_match")
    with pytest.raises(UnknownTaskError):
        library.info("e1")


def test_a_split_without_rows_says_which_there_are(library):
    library.add_task("sums", [row for row in rows() if row.split == "train"], metric="exact_match")
    with pytest.raises(EmptyTaskError, match="no test rows; it has train 8"):
        library.rows("sums", "test")
    with pytest.raises(ValueError, match="'dev'"):
        library.rows("sums", "dev")


def test_an_empty_task_is_not_added(library):
    with pytest.raises(EmptyTaskError, match="'sums'"):
        library.add_task("sums", [], metric="exact_match")
    assert library.tasks() == []


def test_wrong_rows_are_named(library):
    with pytest.raises(ValueError, match="'other'"):
        library.add_task("sums", rows("other"), metric="exact_match")
    with pytest.raises(ValueError, match="'dev'"):
        library.add_task("sums", [Row("a", "b", "sums", split="dev")], metric="exact_match")
    with pytest.raises(ValueError, match="'bleu'"):
        library.add_task("sums", rows(), metric="bleu")


def test_a_removed_task_is_gone_and_the_rest_stays(library):
    library.add_task("a", rows("a"), metric="exact_match")
    library.add_task("b", rows("b"), metric="exact_match")
    library.remove_task("a")
    assert library.tasks() == ["b"]


def test_a_library_that_is_not_there_is_not_made_by_reading(tmp_path):
    with pytest.raises(NotFound):
        DatasetLibrary(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_was_stored_verifies(library):
    library.add_task("sums", rows(), metric="exact_match")
    assert library.repository.verify() == []


def test_the_starter_mixture_goes_in_and_its_rows_come_out(library):
    told = []
    infos = make_starter(
        library, ["lcm", "chain_sum"], sizes=SIZES, progress=lambda *args: told.append(args)
    )
    assert [info.task for info in infos] == ["lcm", "chain_sum"]
    assert told == [("lcm", 0, 2), ("chain_sum", 1, 2), ("", 2, 2)]
    back = [row for split in SPLITS for row in library.rows("lcm", split)]
    assert back == starter_rows("lcm", SIZES)
    assert library.info("lcm").metric == "reasoning_gym"


def test_a_mixture_made_before_is_left_alone(library, monkeypatch):
    make_starter(library, ["lcm"], sizes=SIZES)
    generation = library.repository.generation
    monkeypatch.setattr("mttl_data.starter.starter_rows", None)  # it must not be called
    make_starter(library, ["lcm"], sizes=SIZES)
    assert library.repository.generation == generation


def test_another_seed_does_not_silently_change_a_mixture(library):
    make_starter(library, ["lcm"], sizes=SIZES)
    with pytest.raises(TaskExistsError, match="'lcm'"):
        make_starter(library, ["lcm"], sizes=SIZES, seed=1)
    make_starter(library, ["lcm"], sizes=SIZES, seed=1, replace=True)
    assert library.info("lcm").recipe["seed"] == 1


def test_an_unknown_starter_task_adds_nothing(library):
    with pytest.raises(UnknownTaskError, match="'lcm'"):
        make_starter(library, ["chain_sum", "lcmm"], sizes=SIZES)
    assert library.tasks() == []
