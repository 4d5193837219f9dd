"""One name for any collection of tasks: the starter mixture, a library, local files, the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from mttl_data.dataset_library import DatasetLibrary
from mttl_data.errors import DataNotReachableError

Progress = Callable[[str, int, int | None], object]

STARTER_LIBRARY = "local://mttldata/datasets"
"""Where the starter mixture is kept."""

_ROWS = (".parquet", ".jsonl", ".json")
_HUB = "hf://"


def open_dataset(
    name: str, tasks: Sequence[str] | None = None, progress: Progress | None = None
) -> DatasetLibrary:
    """The dataset library that ``name`` stands for, made first where it has to be.

    Args:
        name: ``starter``; the address of a dataset library; a local file or folder of flat rows; or
            ``hf://chiayewken/flan-v2``, FLAN on the hub. Flat rows become a library once, under
            ``local://mttldata``, by the rules of :func:`~mttl_data.make_flan`.
        tasks: What is wanted of it, so that no more than that need be made; all if left out.
        progress: Told what is being done, how far it is, and how far it goes if that is known.

    Raises:
        DataNotReachableError: There is no such folder, or the hub does not answer.
        UnknownTaskError: It has no such task.
    """
    from mttl_storage import NotFound

    from mttl_data.flan import make_flan
    from mttl_data.flan_sources import HUB_DATASET
    from mttl_data.starter import make_starter

    if name == "starter":
        library = DatasetLibrary(STARTER_LIBRARY, create=True)
        make_starter(library, tasks, progress=progress)
        return library
    if name.startswith(_HUB):
        if name.removeprefix(_HUB) != HUB_DATASET:
            raise DataNotReachableError(
                f"dataset {name!r} is not known; of the hub's datasets {_HUB + HUB_DATASET!r} is "
                "read, and any other as local files: pass their folder"
            )
        library = DatasetLibrary("local://mttldata/flan-flat", create=True)
        make_flan(library, None, _missing(library, tasks), progress=progress)
        return library
    path = Path(name.removeprefix("local://")).expanduser()
    if "://" not in name or name.startswith("local://"):
        if not path.exists():
            raise DataNotReachableError(
                f"there is no dataset at {name!r}; pass 'starter', the address of a library that "
                "apps/dataset made, or a folder of parquet or jsonl files"
            )
        if _holds_rows(path):
            digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
            library = DatasetLibrary(f"local://mttldata/{path.stem}-{digest}", create=True)
            make_flan(library, path, _missing(library, tasks), progress=progress)
            return library
    try:
        return DatasetLibrary(name)
    except NotFound as error:
        raise DataNotReachableError(
            f"{name!r} is no dataset library and has no parquet or jsonl files in it; make one "
            "with apps/dataset, or pass a folder of such files"
        ) from error


def _holds_rows(path: Path) -> bool:
    files = [path] if path.is_file() else path.iterdir()
    return any(file.suffix in _ROWS for file in files)


def _missing(library: DatasetLibrary, tasks: Sequence[str] | None) -> Sequence[str] | None:
    """The wanted tasks that are not there yet; None if all are wanted, whatever there are."""
    return None if tasks is None else [task for task in tasks if task not in library]
