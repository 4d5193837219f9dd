from __future__ import annotations

import json

import pytest

from mttl_data import flan
from mttl_data.dataset_library import DatasetLibrary
from mttl_data.errors import DataNotReachableError, OtherRowsWarning, RowsError
from mttl_data.opening import STARTER_LIBRARY, open_dataset
from mttl_data.rows import SPLITS
from mttl_data.starter import make_starter
from mttl_storage import NotFound

SIZES = {"train": 6, "validation": 2, "test": 3}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, n=30, **columns):
    rows = [
        {"source": f"{task} {i}", "target": str(i), "task_name": task}
        | {name: value(i) for name, value in columns.items()}
        for task in ("a", "b")
        for i in range(n)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "rows" / "inner" / "part.jsonl").parents[1]


def n_rows(library, task):
    return sum(library.info(task).sizes.values())


def test_rows_are_found_in_inner_folders_and_other_files_are_no_rows(folder):
    (folder / "tasks.json").write_text("[]")
    library = open_dataset(str(folder))
    assert library.tasks() == ["a", "b"]
    (folder / "inner" / "part.jsonl").unlink()
    with pytest.raises(RowsError, match="no file ends in"):
        open_dataset(str(folder))


def test_an_edited_folder_is_another_dataset_and_a_moved_one_the_same(folder, tmp_path):
    first = open_dataset(str(folder))
    write(folder / "inner" / "part.jsonl", n=40)
    assert n_rows(open_dataset(str(folder)), "a") == 40
    write(folder / "inner" / "part.jsonl", n=30)
    assert open_dataset(str(folder)).uri == first.uri
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "rows")
    assert open_dataset(str(moved)).uri == first.uri


def test_a_split_column_is_kept_so_that_no_test_row_is_trained_on(tmp_path):
    path = write(tmp_path / "rows.jsonl", split=lambda i: SPLITS[i % 3])
    library = open_dataset(str(path))
    for number, split in enumerate(SPLITS):
        assert {int(row.target) % 3 for row in library.rows("a", split)} == {number}


def test_splits_that_only_some_files_have_are_refused(tmp_path):
    write(tmp_path / "rows" / "one.jsonl", split=lambda i: "test")
    write(tmp_path / "rows" / "two.jsonl")
    with pytest.raises(RowsError, match=r"one\.jsonl.*column split"):
        open_dataset(str(tmp_path / "rows"))


def test_all_tasks_are_made_once_and_the_source_is_not_read_again(folder, monkeypatch):
    open_dataset(str(folder), ["a"])
    library = open_dataset(str(folder))
    assert library.tasks() == ["a", "b"]
    monkeypatch.setattr(flan, "make_flan", lambda *_, **__: pytest.fail("read again"))
    assert open_dataset(str(folder)).tasks() == ["a", "b"]
    assert open_dataset(str(folder), ["b"]).tasks() == ["a", "b"]


def test_a_dataset_library_in_a_folder_is_opened_as_one(folder, tmp_path):
    made = open_dataset(str(folder))
    assert open_dataset(made.uri).uri == made.uri
    assert open_dataset(made.uri.removeprefix("local://")).uri == made.uri


def test_what_is_not_there_is_named():
    with pytest.raises(DataNotReachableError, match="no dataset at 'nowhere'"):
        open_dataset("nowhere")
    with pytest.raises(NotFound):
        open_dataset("virtual://nowhere")


def test_starter_tasks_that_are_there_are_used_as_they_are_and_it_says_so():
    make_starter(DatasetLibrary(STARTER_LIBRARY, create=True), ["lcm"], sizes=SIZES, seed=7)
    with pytest.warns(OtherRowsWarning, match="has lcm with other sizes, seed"):
        library = open_dataset("starter", ["lcm", "products"])
    assert library.info("lcm").sizes == SIZES
    assert library.info("products").sizes == {"train": 400, "validation": 32, "test": 100}


@pytest.mark.filterwarnings("error")
def test_starter_tasks_of_the_default_sizes_are_no_matter():
    open_dataset("starter", ["products"])
    assert open_dataset("starter", ["products"]).tasks() == ["products"]
