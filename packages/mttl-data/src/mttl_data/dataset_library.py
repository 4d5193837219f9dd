"""Tasks kept as items of a repository: ``datasets/<task>``, one parquet file for each split.

How bytes are stored, versioned and verified is ``mttl_storage``'s; how rows are made is ``flan``'s
and ``starter``'s.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

from mttl_data.errors import EmptyTaskError, TaskExistsError, unknown_task
from mttl_data.rows import SPLITS, Row

if TYPE_CHECKING:
    import pyarrow as pa

    from mttl_storage import Item, Repository

_PREFIX = "datasets/"
_FORMAT = 1
_COLUMNS = tuple(column.name for column in fields(Row))
_ROW_GROUP = 10_000


@dataclass(frozen=True)
class TaskInfo:
    """What a library knows of one task without reading its rows.

    Attributes:
        task: Its name.
        metric: The name in ``METRICS`` that scores it.
        source: Where the rows come from.
        sizes: Rows in each split that has any.
        columns: Names of the columns of every file.
        digest: SHA-256 over all rows; the same rows give the same digest anywhere.
        recipe: How the rows were made, as plain data; empty if that is not known.
    """

    task: str
    metric: str
    source: str
    sizes: Mapping[str, int]
    columns: tuple[str, ...]
    digest: str
    recipe: Mapping[str, Any] = field(default_factory=dict)


class DatasetLibrary:
    """Tasks at one address of ``mttl_storage``, always in the order of their names.

    Args:
        uri: Such as ``"local://mttldata/datasets"``; a path without a scheme is local.
        token: Credential for addresses that need one.
        create: Make an empty library where there is none.
        read_only: Refuse every change.
    """

    def __init__(
        self,
        uri: str | PathLike[str],
        token: object = None,
        create: bool = False,
        read_only: bool = False,
    ) -> None:
        """Open the library; one that is not there raises ``mttl_storage.NotFound``."""
        from mttl_storage import Repository

        self.repository: Repository = Repository.open(
            uri, token=token, create=create, read_only=read_only
        )

    def __repr__(self) -> str:
        """Address and number of tasks."""
        return f"DatasetLibrary({self.uri!r}, {len(self)} tasks)"

    @property
    def uri(self) -> str:
        """The address, without credentials."""
        return self.repository.uri

    def tasks(self) -> list[str]:
        """The names of all tasks."""
        return [name.removeprefix(_PREFIX) for name in self.repository.items(_PREFIX)]

    def __len__(self) -> int:
        """How many tasks there are."""
        return len(self.tasks())

    def __iter__(self) -> Iterator[str]:
        """The names of all tasks."""
        return iter(self.tasks())

    def __contains__(self, task: object) -> bool:
        """Whether there is a task of that name."""
        return f"{_PREFIX}{task}" in self.repository

    def info(self, task: str) -> TaskInfo:
        """Sizes, digest and origin of a task; reads no rows."""
        return _info(self._item(task))

    def table(self, task: str, split: str) -> pa.Table:
        """The rows of one split as an arrow table."""
        import pyarrow.parquet as pq

        item = self._item(task)
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        if f"{split}.parquet" not in item.files:
            sizes = ", ".join(f"{name} {size}" for name, size in _info(item).sizes.items())
            raise EmptyTaskError(f"task {task!r} in {self.uri} has no {split} rows; it has {sizes}")
        path = self.repository.path(item.name, f"{split}.parquet")
        return pq.read_table(path, memory_map=True)

    def rows(
        self,
        task: str,
        split: str,
        task_source: Collection[str] = (),
        template_type: Collection[str] = (),
    ) -> list[Row]:
        """The rows of one split; ``EmptyTaskError`` if there is none.

        Args:
            task: Its name.
            split: One of ``SPLITS``.
            task_source: Rows from these collections alone; any if empty.
            template_type: Rows of these template types alone; any if empty.
        """
        table = self.table(task, split)
        columns = [table.column(name).to_pylist() for name in _COLUMNS]
        rows = [
            row
            for row in (Row(*values) for values in zip(*columns, strict=True))
            if (not task_source or row.task_source in task_source)
            and (not template_type or row.template_type in template_type)
        ]
        if not rows:
            raise EmptyTaskError(
                f"no {split} rows of task {task!r} are from "
                f"{' or '.join(task_source) or 'any collection'} with "
                f"{' or '.join(template_type) or 'any template'}; give other filters"
            )
        return rows

    def add_task(
        self,
        task: str,
        rows: Sequence[Row],
        *,
        metric: str,
        source: str = "",
        recipe: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> TaskInfo:
        """Add a task with all its rows, in one commit; the same rows again change nothing.

        Args:
            task: A name that storage takes; every row must carry it.
            rows: Of any splits; their order within a split is kept.
            metric: The name in ``METRICS`` that scores them.
            source: Where the rows come from.
            recipe: How they were made, as plain JSON data.
            replace: Put these rows in place of others under that name, which is an error without.
        """
        from mttl_data.metrics import METRICS

        if metric not in METRICS:
            raise ValueError(f"no metric {metric!r}; there are {', '.join(METRICS)}")
        if not rows:
            raise EmptyTaskError(f"task {task!r} has no rows; nothing was added to {self.uri}")
        splits = _by_split(task, rows)
        digest = _rows_digest(splits)
        name = f"{_PREFIX}{task}"
        old = self.repository.items(name).get(name)
        if old is not None and _info(old).digest == digest:
            return _info(old)
        if old is not None and not replace:
            raise TaskExistsError(
                f"{self.uri} has a task {task!r} with other rows; replace it (replace=True), or "
                "use another library"
            )
        info = {
            "format": _FORMAT,
            "metric": metric,
            "source": source,
            "sizes": {split: len(members) for split, members in splits.items()},
            "columns": list(_COLUMNS),
            "digest": digest,
            "recipe": dict(recipe or {}),
        }
        files = {f"{split}.parquet": _parquet(members) for split, members in splits.items()}
        if old is None:
            return _info(self.repository.add(name, files, info))
        return _info(self.repository.replace(name, files, info, expected=old.digest))

    def remove_task(self, task: str) -> None:
        """Take a task out; the repository can restore it."""
        self.repository.remove(self._item(task).name)

    def _item(self, task: str) -> Item:
        name = f"{_PREFIX}{task}"
        item = self.repository.items(name).get(name)
        if item is None:
            raise unknown_task(task, self.uri, self.tasks())
        return item


def _info(item: Item) -> TaskInfo:
    info = item.info
    return TaskInfo(
        task=item.name.removeprefix(_PREFIX),
        metric=info["metric"],
        source=info["source"],
        sizes={split: info["sizes"][split] for split in SPLITS if split in info["sizes"]},
        columns=tuple(info["columns"]),
        digest=info["digest"],
        recipe=info["recipe"],
    )


def _by_split(task: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        if row.task_name != task:
            raise ValueError(f"a row of task {row.task_name!r} was given for task {task!r}")
        if row.split not in splits:
            raise ValueError(
                f"a row of task {task!r} has split {row.split!r}, not one of {', '.join(SPLITS)}"
            )
        splits[row.split].append(row)
    return {split: members for split, members in splits.items() if members}


def _rows_digest(splits: Mapping[str, list[Row]]) -> str:
    digest = hashlib.sha256()
    for split in sorted(splits):
        for row in splits[split]:
            digest.update(json.dumps(astuple(row), ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _parquet(rows: Sequence[Row]) -> bytes:
    """The rows as a parquet file whose bytes nothing else decides."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in _COLUMNS
    }
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns), sink, compression="zstd", compression_level=3, row_group_size=_ROW_GROUP
    )
    return sink.getvalue()
