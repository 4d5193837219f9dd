"""FLAN v2 as flat rows: at most 10,000 of each task, shuffled and split in a fixed way.

Rows are read twice, a batch at a time: once to count each task, once to take what the shuffle
chose. What is taken waits on disk, so memory stays small however large the collection is. Where the
rows come from is ``flan_sources``'s; where they go is ``dataset_library``'s.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mttl_data.errors import EmptyTaskError, RowsError, unknown_task
from mttl_data.progress import Progress
from mttl_data.rows import SPLITS, Row

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from mttl_data.dataset_library import DatasetLibrary, TaskInfo
    from mttl_data.flan_sources import Source

FLAN_LIMIT = 10_000
FLAN_SEED = 42
FLAN_METRIC = "rouge_l"
# Tasks whose rows are also in ARC, BoolQ, HellaSwag, OpenBookQA, PIQA or WinoGrande. A flat set has
# them; who trains a whole library to be measured on those leaves them out.
EVALUATION_OVERLAP = frozenset(
    {
        "ai2_arc_ARC_Challenge_1_0_0",
        "ai2_arc_ARC_Easy_1_0_0",
        "bool_q_1_0_0",
        "hellaswag_1_1_0",
        "openbookqa_0_1_0",
        "piqa_1_0_0",
        "winogrande_1_1_0",
    }
)

_BATCH_ROWS = 10_000
_HELD_ROWS = 200_000  # chosen rows kept in memory before they go to disk
_WANTED = ("source", "target", "task_name", "task_source", "template_type", "split")


def clean_name(task: str) -> str:
    """A task's name with ``_`` for each of ``: / - .``, as libraries and flags have it."""
    return re.sub(r"[:/\-.]", "_", task)


def make_flan(
    library: DatasetLibrary,
    source: Source | str | PathLike[str] | None = None,
    tasks: Sequence[str] | None = None,
    *,
    limit: int = FLAN_LIMIT,
    seed: int = FLAN_SEED,
    include_task_source: Sequence[str] = (),
    include_template_type: Sequence[str] = (),
    keep_split: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> list[TaskInfo]:
    """Add FLAN tasks to a library, each in one commit; the same rows again change nothing.

    Of each task the rows that pass the filters are shuffled as ``datasets.Dataset.shuffle(seed)``
    does it, the first ``limit`` are kept, and row i of these goes to a split by the number that
    ``numpy.random.RandomState(i).rand()`` draws: below .8 train, below .9 validation, else test.

    Args:
        library: Where the tasks go.
        source: A parquet or jsonl file or a folder of them, with columns source, target and
            task_name, or what ``flan_sources.open_source`` gave; the hub's
            ``chiayewken/flan-v2`` if left out.
        tasks: Names, cleaned or not; all if left out.
        limit: Most rows of one task.
        seed: Of the shuffle.
        include_task_source: Keep rows from these collections alone, such as ``"NIv2"``.
        include_template_type: Keep rows of these templates alone, such as ``"zs_noopt"``.
        keep_split: Take the splits from a column ``split`` of the source, as for a copy that was
            flat before. Without it such a column is not read, and the rule above holds.
        replace: Put these rows in place of others under the same names.
        progress: Told of counting, reading and writing.

    Raises:
        DataNotReachableError: No ``source`` was given and the hub cannot be reached.
    """
    import numpy as np

    from mttl_data.flan_sources import Source, open_source

    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit!r}")
    rows = source if isinstance(source, Source) else open_source(source)
    scan = _Scan(rows, include_task_source, include_template_type, progress)
    counts = scan.counts()
    names = sorted(counts) if tasks is None else list(dict.fromkeys(map(clean_name, tasks)))
    if not names:
        raise EmptyTaskError(
            f"{rows.name} has no rows from {', '.join(include_task_source) or 'any collection'} "
            f"with {', '.join(include_template_type) or 'any template'}; give other filters"
        )
    for name in names:
        if name not in counts:
            raise unknown_task(name, rows.name, counts)
    chosen = {name: np.random.default_rng(seed).permutation(counts[name])[:limit] for name in names}
    recipe = {
        "mixture": "flan",
        "limit": limit,
        "seed": seed,
        "include_task_source": sorted(include_task_source),
        "include_template_type": sorted(include_template_type),
        "keep_split": keep_split,
    }
    made = []
    with tempfile.TemporaryDirectory(prefix="mttl-flan-") as folder:
        spool = _Spool(Path(folder))
        for name, positions, columns in scan.take(chosen, keep_split):
            spool.add(name, positions, columns)
        for done, name in enumerate(names):
            if progress is not None:
                progress("writing", done, len(names))
            made.append(
                library.add_task(
                    name,
                    _task_rows(name, spool.rows(name), keep_split),
                    metric=FLAN_METRIC,
                    source=rows.name,
                    recipe=recipe,
                    replace=replace,
                )
            )
    if progress is not None:
        progress("writing", len(names), len(names))
    return made


class _Scan:
    """Passes over a source that see the same rows in the same order each time."""

    def __init__(
        self,
        source: Source,
        task_sources: Sequence[str],
        template_types: Sequence[str],
        progress: Progress | None,
    ) -> None:
        self.source = source
        self.filters = {
            column: list(values)
            for column, values in (
                ("task_source", task_sources),
                ("template_type", template_types),
            )
            if values
        }
        self.progress = progress
        source.check({"source", "target", "task_name", *self.filters})

    def counts(self) -> dict[str, int]:
        """How many rows each task has, by clean name."""
        import numpy as np

        counts: dict[str, int] = {}
        for batch in self._batches("counting", ["task_name", *self.filters]):
            codes, names = _tasks_of(batch)
            for name, n in zip(names, np.bincount(codes, minlength=len(names)), strict=True):
                counts[name] = counts.get(name, 0) + int(n)
        return {name: n for name, n in counts.items() if n}

    def take(
        self, chosen: dict[str, np.ndarray], keep_split: bool
    ) -> Iterator[tuple[str, list[int], list[dict[str, Any]]]]:
        """(task, places in the task's shuffled order, rows) as the source brings them."""
        import numpy as np

        places = {name: np.argsort(rows) for name, rows in chosen.items()}
        ordered = {name: rows[places[name]] for name, rows in chosen.items()}
        seen = dict.fromkeys(chosen, 0)
        columns = [c for c in _WANTED if c in self.source.columns and (keep_split or c != "split")]
        if keep_split:
            self.source.check({"split"})
        for batch in self._batches("reading", columns):
            codes, names = _tasks_of(batch)
            order = np.argsort(codes, kind="stable")
            ends = np.cumsum(np.bincount(codes, minlength=len(names)))
            for code, name in enumerate(names):
                if name not in chosen:
                    continue
                members = order[ends[code - 1] if code else 0 : ends[code]]
                first = seen[name]
                seen[name] += len(members)
                low, high = np.searchsorted(ordered[name], [first, first + len(members)])
                if low == high:
                    continue
                hits = members[ordered[name][low:high] - first]
                yield name, places[name][low:high].tolist(), batch.take(hits).to_pylist()

    def _batches(self, doing: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa
        import pyarrow.compute as pc

        done = 0
        for batch in self.source.batches(list(dict.fromkeys(columns)), _BATCH_ROWS):
            if self.progress is not None:
                self.progress(doing, done, self.source.rows)
            done += len(batch)
            for column, values in self.filters.items():
                kept = pc.is_in(batch.column(column), value_set=pa.array(values))
                batch = batch.filter(kept)
            if len(batch):
                yield batch
        if self.progress is not None:
            self.progress(doing, done, done)


def _tasks_of(batch: pa.RecordBatch) -> tuple[np.ndarray, list[str]]:
    """The clean task names of a batch, and for each row the place of its own among them."""
    import numpy as np

    encoded = batch.column("task_name").dictionary_encode()
    raw = encoded.dictionary.to_pylist()
    names = sorted({clean_name(name) for name in raw})
    place = {name: index for index, name in enumerate(names)}
    of_raw = np.array([place[clean_name(name)] for name in raw], dtype=np.int64)
    return of_raw[encoded.indices.to_numpy(zero_copy_only=False)], names


class _Spool:
    """Chosen rows by task, in memory while they are few and in a folder when they are many."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, list[str]] = {}
        self.n_held = 0
        self.files: dict[str, Path] = {}

    def add(self, task: str, positions: Iterable[int], rows: Iterable[dict[str, Any]]) -> None:
        lines = [json.dumps([position, row]) for position, row in zip(positions, rows, strict=True)]
        self.held.setdefault(task, []).extend(lines)
        self.n_held += len(lines)
        if self.n_held >= _HELD_ROWS:
            self._write()

    def rows(self, task: str) -> list[dict[str, Any]]:
        """The rows of a task in its shuffled order."""
        lines = self.held.get(task, [])
        if task in self.files:
            lines = self.files[task].read_text("utf-8").splitlines() + lines
        return [row for _, row in sorted(map(json.loads, lines), key=lambda entry: int(entry[0]))]

    def _write(self) -> None:
        for task, lines in self.held.items():
            path = self.files.setdefault(task, self.folder / f"{len(self.files)}.jsonl")
            with path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        self.held.clear()
        self.n_held = 0


def _task_rows(task: str, rows: Sequence[dict[str, Any]], keep_split: bool) -> list[Row]:
    made = []
    for index, row in enumerate(rows):
        split = row["split"] if keep_split else _split(index)
        if split not in SPLITS:
            raise RowsError(
                f"a row of task {task!r} has split {split!r}, not one of {', '.join(SPLITS)}; "
                "rename the splits, or leave the column out to have rows split by the rule"
            )
        made.append(
            Row(
                source=row["source"] or "",
                target=row["target"] or "",
                task_name=task,
                task_source=row.get("task_source") or "",
                template_type=row.get("template_type") or "",
                split=split,
            )
        )
    return made


@cache
def _split(index: int) -> str:
    import numpy as np

    draw = np.random.RandomState(index).rand()
    return "train" if draw < 0.8 else "validation" if draw < 0.9 else "test"
