"""One name for any collection of tasks: the starter mixture, a library, local files, the hub."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

from mttl_data.dataset_library import DatasetLibrary
from mttl_data.errors import DataNotReachableError, OtherRowsWarning
from mttl_data.progress import Progress

STARTER_LIBRARY = "local://mttldata/datasets"
"""Where the starter mixture is kept."""

_HUB = "hf://"
_WHOLE = "made/whole"  # an item that says: every task of the source is here


def open_dataset(
    name: str, tasks: Sequence[str] | None = None, progress: Progress | None = None
) -> DatasetLibrary:
    """The dataset library that ``name`` stands for, made first where it has to be.

    Args:
        name: ``starter``; the address of a dataset library; a local file or folder of flat rows; or
            ``hf://chiayewken/flan-v2``, FLAN on the hub. Flat rows become a library once for each
            content, under ``local://mttldata``, by the rules of :func:`~mttl_data.make_flan`; their
            own splits are kept if they have a column of that name.
        tasks: What is wanted of it, so that no more than that need be made; all if left out.
        progress: Told how far the making of it is.

    Raises:
        DataNotReachableError: There is no such folder, or the hub does not answer.
        RowsError: The rows there cannot be read.
        UnknownTaskError: It has no such task.
    """
    from mttl_data.flan_sources import HUB_DATASET, row_files
    from mttl_storage import NotFound

    if name == "starter":
        return _starter(tasks, progress)
    if name.startswith(_HUB):
        if name.removeprefix(_HUB) != HUB_DATASET:
            raise DataNotReachableError(
                f"dataset {name!r} is not known; of the hub's datasets {_HUB + HUB_DATASET!r} is "
                "read, and any other as local files: pass their folder"
            )
        return _flat("local://mttldata/flan-flat", None, tasks, progress)
    is_local = "://" not in name or name.startswith("local://")
    path = Path(name.removeprefix("local://")).expanduser()
    if is_local and not path.exists():
        raise DataNotReachableError(
            f"there is no dataset at {name!r}; pass 'starter', the address of a library that "
            "apps/dataset made, or a folder of parquet or jsonl files"
        )
    if not (is_local and path.is_file()):
        try:
            return DatasetLibrary(name)
        except NotFound:
            if not is_local:
                raise
    digest = _content_digest(row_files(path))
    return _flat(f"local://mttldata/{path.resolve().stem}-{digest[:12]}", path, tasks, progress)


def _starter(tasks: Sequence[str] | None, progress: Progress | None) -> DatasetLibrary:
    """The starter mixture: what is missing is made, what is there is used as it is."""
    from mttl_data.starter import made_otherwise, make_starter, starter_names

    names = starter_names(tasks)
    library = DatasetLibrary(STARTER_LIBRARY, create=True)
    make_starter(library, [name for name in names if name not in library], progress=progress)
    others = made_otherwise(library, names)
    if others:
        warnings.warn(
            f"{library.uri} has {', '.join(others)} with other sizes, seed or settings than the "
            "starter mixture's own; they are used as they are (`apps/dataset starter --replace` "
            "makes them anew)",
            OtherRowsWarning,
            stacklevel=3,
        )
    return library


def _content_digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.suffix.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _flat(
    address: str, path: Path | None, tasks: Sequence[str] | None, progress: Progress | None
) -> DatasetLibrary:
    """The library at ``address`` with the wanted tasks of a source, made where missing."""
    from mttl_data.flan import make_flan
    from mttl_data.flan_sources import open_source

    library = DatasetLibrary(address, create=True)
    if tasks is None and _WHOLE in library.repository:
        return library
    missing = None if tasks is None else [task for task in tasks if task not in library]
    if missing != []:
        source = open_source(path)
        keep_split = "split" in source.columns
        make_flan(library, source, missing, keep_split=keep_split, progress=progress)
    if tasks is None:
        library.repository.add(_WHOLE, {})
    return library
