"""Where rows of a flat collection are read from: parquet and jsonl files, or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mttl_data.errors import DataNotReachableError, RowsError
from mttl_data.hub import hub_dataset

if TYPE_CHECKING:
    import pyarrow as pa

HUB_DATASET = "chiayewken/flan-v2"
_SUFFIXES = (".parquet", ".jsonl")


@runtime_checkable
class Source(Protocol):
    """Rows that can be read again and again, always in the same order.

    Attributes:
        name: What to call it in messages and in the library.
        columns: The columns that every part of it has.
        rows: How many rows there are, if that is known before reading them.
    """

    name: str
    columns: frozenset[str]
    rows: int | None

    def check(self, columns: set[str]) -> None:
        """Raise ``RowsError`` if a column is missing."""
        ...

    def batches(self, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        """The rows as record batches of text columns."""
        ...


def open_source(path: str | PathLike[str] | None) -> Source:
    """The rows under a path, or of the hub's FLAN v2 if there is none."""
    if path is None:
        return _Hub(
            hub_dataset(
                HUB_DATASET,
                None,
                "train",
                "pass --source PATH with a parquet or jsonl copy of it",
            )
        )
    return _Files(str(path), row_files(path))


def row_files(path: str | PathLike[str]) -> list[Path]:
    """The files with rows under a path, in the order in which they are read.

    Raises:
        DataNotReachableError: there is no such file or folder.
        RowsError: none of its files has rows.
    """
    root = Path(path)
    if not root.exists():
        raise DataNotReachableError(f"there is no file or folder {str(path)!r} to take rows from")
    found = [root] if root.is_file() else sorted(root.rglob("*"))
    files = [file for file in found if file.suffix in _SUFFIXES and file.is_file()]
    if not files:
        raise RowsError(f"{str(path)!r} has no rows: no file ends in {' or '.join(_SUFFIXES)}")
    return files


class _Checked:
    name: str
    columns: frozenset[str]

    def check(self, columns: set[str]) -> None:
        missing = columns - self.columns
        if missing:
            raise RowsError(
                f"{self.name} has no column {', '.join(sorted(missing))}; "
                f"it has {', '.join(sorted(self.columns))}"
            )


class _Files(_Checked):
    """Parquet and jsonl files, one after the other."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        self.name = name
        self.files = files
        columns: list[set[str]] = []
        self.rows: int | None = 0
        for file in files:
            if file.suffix == ".parquet":
                columns.append(set(_parquet(file).names))
                if self.rows is not None:
                    self.rows += pq.read_metadata(file).num_rows
            else:
                columns.append(set(next(_json_rows(file), {})))
                self.rows = None
        self.columns = frozenset.intersection(*map(frozenset, columns))
        for file, has in zip(files, columns, strict=True):
            if "split" in has and "split" not in self.columns:
                raise RowsError(
                    f"{str(file)!r} has a column split and other files of {name!r} have none; "
                    "give all of them one, or none"
                )

    def batches(self, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        for file in self.files:
            if file.suffix == ".parquet":
                with _readable(file), pq.ParquetFile(file) as parquet:
                    for batch in parquet.iter_batches(size, columns=list(columns)):
                        yield _as_text(batch, columns)
            else:
                yield from _json_batches(file, columns, size)


class _Hub(_Checked):
    """A dataset of the hub, which ``datasets`` keeps on disk and maps into memory."""

    def __init__(self, dataset: Any) -> None:
        self.name = HUB_DATASET
        self.dataset = dataset
        self.columns = frozenset(dataset.column_names)
        self.rows: int | None = len(dataset)

    def batches(self, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        chosen = self.dataset.select_columns(list(columns)).with_format("arrow")
        for table in chosen.iter(size):
            for batch in table.to_batches():
                yield _as_text(batch, columns)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Name a file whose bytes are no parquet, or whose columns are no text."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise RowsError(f"{str(file)!r} cannot be read as parquet rows of text: {error}") from error


def _parquet(file: Path) -> Any:
    import pyarrow.parquet as pq

    with _readable(file):
        return pq.read_schema(file)


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise RowsError(f"line {number} of {str(file)!r} is not a JSON object")
            yield row


def _json_batches(file: Path, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    held: list[dict[str, Any]] = []

    def batch() -> pa.RecordBatch:
        taken = {
            column: pa.array(
                [None if (value := row.get(column)) is None else str(value) for row in held],
                pa.string(),
            )
            for column in columns
        }
        return pa.RecordBatch.from_pydict(taken)

    for row in _json_rows(file):
        held.append(row)
        if len(held) == size:
            yield batch()
            held = []
    if held:
        yield batch()


def _as_text(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    """The columns in the order asked for, as plain strings (a copy may have them as codes)."""
    import pyarrow as pa

    arrays = [batch.column(column).cast(pa.string()) for column in columns]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))
