from __future__ import annotations

import json
import random
import time
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mttl_data import flan
from mttl_data.dataset_library import DatasetLibrary
from mttl_data.errors import DataNotReachableError, TaskExistsError, UnknownTaskError
from mttl_data.flan import EVALUATION_OVERLAP, clean_name, make_flan
from mttl_data.rows import SPLITS, Row


def raw_rows(sizes: dict[str, int], seed: int = 0) -> list[dict[str, str]]:
    rows = [
        {
            "source": f"question {i} of {task}",
            "target": f"answer {i}",
            "task_name": task,
            "task_source": "NIv2" if i % 3 else "P3",
            "template_type": "zs_noopt" if i % 2 else "fs_opt",
        }
        for task, n in sizes.items()
        for i in range(n)
    ]
    random.Random(seed).shuffle(rows)  # tasks lie mixed up, as they do in the collection
    return rows


def by_the_rule(rows: list[dict[str, str]], limit: int = 10_000, seed: int = 42) -> list[Row]:
    """The slow way, with datasets' own shuffle, in the order train, validation, test."""
    made = []
    for name in sorted({row["task_name"] for row in rows}):
        task = datasets.Dataset.from_list([row for row in rows if row["task_name"] == name])
        kept = task.shuffle(seed=seed)
        kept = kept.select(range(min(limit, len(kept))))
        clean = name
        for mark in ":/-.":
            clean = clean.replace(mark, "_")
        for index, row in enumerate(kept):
            draw = np.random.RandomState(index).rand()
            split = "train" if draw < 0.8 else "validation" if draw < 0.9 else "test"
            made.append(
                Row(
                    row["source"],
                    row["target"],
                    clean,
                    row["task_source"],
                    row["template_type"],
                    split,
                )
            )
    return sorted(made, key=lambda row: (row.task_name, SPLITS.index(row.split)))


def all_rows(library: DatasetLibrary) -> list[Row]:
    return [
        row
        for task in library
        for split in library.info(task).sizes
        for row in library.rows(task, split)
    ]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=97)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def library(tmp_path):
    return DatasetLibrary(f"virtual://{tmp_path.name}", create=True)


SIZES = {"wiqa": 130, "ai2_arc/ARC-Easy:1.0.0": 40, "cot_gsm8k": 25}


@pytest.fixture
def small_parts(monkeypatch):
    """Batches and spool so small that every border is met."""
    monkeypatch.setattr(flan, "_BATCH_ROWS", 16)
    monkeypatch.setattr(flan, "_HELD_ROWS", 20)


@pytest.mark.parametrize("name", ["flat.parquet", "flat.jsonl"])
@pytest.mark.parametrize("limit", [10_000, 50, 1])
@pytest.mark.usefixtures("small_parts")
def test_rows_are_those_of_the_slow_obvious_way(tmp_path, library, name, limit):
    rows = raw_rows(SIZES)
    make_flan(library, write(tmp_path / name, rows), limit=limit)
    assert all_rows(library) == by_the_rule(rows, limit)


def test_the_hub_dataset_gives_the_same_rows(tmp_path, library, monkeypatch):
    rows = raw_rows(SIZES)
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: "README.md")
    infos = make_flan(library)
    assert asked == [("chiayewken/flan-v2", "train")]
    assert {info.source for info in infos} == {"chiayewken/flan-v2"}
    assert all_rows(library) == by_the_rule(rows)


def test_no_hub_is_one_clear_line_soon(library, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: pytest.fail("no need to ask again")
    )
    start = time.monotonic()
    with pytest.raises(
        DataNotReachableError, match=r"'chiayewken/flan-v2'.*--source PATH"
    ) as error:
        make_flan(library)
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)
    assert library.tasks() == []


def test_a_dataset_the_hub_client_cannot_load_is_one_clear_line(library, monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: "README.md")
    with pytest.raises(DataNotReachableError, match="ConnectionError"):
        make_flan(library)


@pytest.mark.usefixtures("small_parts")
def test_chosen_tasks_get_the_rows_that_all_tasks_would_give_them(tmp_path, library):
    rows = raw_rows(SIZES)
    path = write(tmp_path / "flat.parquet", rows)
    infos = make_flan(library, path, ["ai2_arc/ARC-Easy:1.0.0", "wiqa"])
    assert [info.task for info in infos] == ["ai2_arc_ARC_Easy_1_0_0", "wiqa"]
    expected = [row for row in by_the_rule(rows) if row.task_name != "cot_gsm8k"]
    assert all_rows(library) == expected


@pytest.mark.usefixtures("small_parts")
def test_filters_come_before_the_shuffle(tmp_path, library):
    rows = raw_rows(SIZES)
    path = write(tmp_path / "flat.parquet", rows)
    make_flan(library, path, include_task_source=["NIv2"], include_template_type=["zs_noopt"])
    kept = [
        row for row in rows if row["task_source"] == "NIv2" and row["template_type"] == "zs_noopt"
    ]
    assert all_rows(library) == by_the_rule(kept)


def test_a_filter_that_leaves_nothing_says_so(tmp_path, library):
    path = write(tmp_path / "flat.parquet", raw_rows(SIZES))
    with pytest.raises(ValueError, match="no rows from CoT"):
        make_flan(library, path, include_task_source=["CoT"])


@pytest.mark.parametrize("mark", list(":/-."))
def test_marks_in_a_name_become_underscores(mark):
    assert clean_name(f"a{mark}b c_1") == "a_b c_1"


def test_the_tasks_that_overlap_the_evaluation_are_seven_clean_names():
    assert len(EVALUATION_OVERLAP) == 7
    assert {clean_name(name) for name in EVALUATION_OVERLAP} == EVALUATION_OVERLAP
    assert clean_name("ai2_arc/ARC-Easy:1.0.0") in EVALUATION_OVERLAP


def test_tasks_that_overlap_the_evaluation_stay_in_the_dataset(tmp_path, library):
    rows = raw_rows({"ai2_arc/ARC-Easy:1.0.0": 20, "piqa:1.0.0": 20})
    make_flan(library, write(tmp_path / "flat.parquet", rows))
    assert library.tasks() == ["ai2_arc_ARC_Easy_1_0_0", "piqa_1_0_0"]


def test_a_split_column_is_not_read_unless_it_is_to_be_kept(tmp_path):
    rows = raw_rows(SIZES)
    for index, row in enumerate(rows):
        row["split"] = SPLITS[index % 3]
    path = write(tmp_path / "flat.parquet", rows)
    ruled = DatasetLibrary(tmp_path / "ruled", create=True)
    make_flan(ruled, path)
    assert all_rows(ruled) == by_the_rule(rows)
    kept = DatasetLibrary(tmp_path / "kept", create=True)
    make_flan(kept, path, keep_split=True)
    split_of = {row["source"]: row["split"] for row in rows}
    assert all(row.split == split_of[row.source] for row in all_rows(kept))


def test_a_split_of_another_name_is_named(tmp_path, library):
    rows = [{**row, "split": "dev"} for row in raw_rows({"a": 3})]
    with pytest.raises(ValueError, match="'dev'"):
        make_flan(library, write(tmp_path / "flat.jsonl", rows), keep_split=True)


def test_a_folder_is_read_file_by_file_in_order(tmp_path, library):
    rows = raw_rows(SIZES)
    folder = tmp_path / "parts"
    (folder / "b").mkdir(parents=True)
    write(folder / "a.parquet", rows[:60])
    write(folder / "b" / "rest.jsonl", rows[60:])
    (folder / "README.md").write_text("not rows")
    (folder / "tasks.json").write_text("[]")
    make_flan(library, folder)
    assert all_rows(library) == by_the_rule(rows)


def test_an_unknown_task_gets_near_names_and_adds_nothing(tmp_path, library):
    path = write(tmp_path / "flat.parquet", raw_rows(SIZES))
    with pytest.raises(UnknownTaskError, match="did you mean 'cot_gsm8k'"):
        make_flan(library, path, ["wiqa", "cot_gsm8"])
    assert library.tasks() == []


def test_the_same_rows_again_change_nothing_and_others_are_refused(tmp_path, library):
    path = write(tmp_path / "flat.parquet", raw_rows(SIZES))
    make_flan(library, path)
    generation = library.repository.generation
    make_flan(library, path)
    assert library.repository.generation == generation
    with pytest.raises(TaskExistsError):
        make_flan(library, path, seed=1)
    make_flan(library, path, seed=1, replace=True)
    assert all_rows(library) == by_the_rule(raw_rows(SIZES), seed=1)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("rows.txt", "x", "no file ends in"),
        ("rows.parquet", "x", "cannot be read as parquet rows"),
        ("rows.jsonl", '{"source": "a"}\nnot json\n', "no column target, task_name"),
        (
            "rows.jsonl",
            '{"source": "a", "target": "b", "task_name": "t"}\nnot json\n',
            "line 2 of .* is not a JSON object",
        ),
    ],
)
def test_a_source_that_is_not_one_is_named(tmp_path, library, name, content, match):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=match):
        make_flan(library, path)


def test_a_source_that_is_not_there_is_named(library):
    with pytest.raises(DataNotReachableError, match="nowhere"):
        make_flan(library, "nowhere")


def test_progress_goes_through_counting_reading_and_writing(tmp_path, library):
    told = []
    path = write(tmp_path / "flat.parquet", raw_rows(SIZES))
    make_flan(library, path, progress=lambda *args: told.append(args))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["counting", "reading", "writing"]
    assert told[-1] == ("writing", 3, 3)
    assert ("reading", 195, 195) in told


@pytest.mark.slow
def test_memory_stays_small_when_the_collection_is_large(tmp_path):
    path = tmp_path / "large.parquet"
    schema = pa.schema([(c, pa.string()) for c in ("source", "target", "task_name")])
    with pq.ParquetWriter(path, schema) as writer:
        for part in range(40):
            n = 10_000
            writer.write_table(
                pa.table(
                    {
                        "source": [f"{part} {i} " + "x" * 400 for i in range(n)],
                        "target": ["y"] * n,
                        "task_name": [f"task{i % 5}" for i in range(n)],
                    },
                    schema=schema,
                )
            )
    library = DatasetLibrary(tmp_path / "library", create=True)
    tracemalloc.start()
    make_flan(library, path, limit=2_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sum(library.info(task).sizes.values()) for task in library) == 10_000
    assert peak < 60 << 20  # of 170 MB


def test_the_local_copy_becomes_a_library(test_data, tmp_path):
    library = DatasetLibrary(tmp_path / "flan", create=True)
    infos = make_flan(library, test_data / "flan_flat")
    assert len(infos) == 48
    assert sum(sum(info.sizes.values()) for info in infos) == 15_014
    arc = library.info("ai2_arc_ARC_Challenge_1_0_0")
    assert sum(arc.sizes.values()) == 318
    assert 0.7 < arc.sizes["train"] / 318 < 0.9
    assert library.repository.verify() == []
