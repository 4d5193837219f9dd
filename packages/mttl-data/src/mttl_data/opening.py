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
    from mttl_data.flan_sources import HUB_DATASET
    from mttl_data.starter import make_starter
    from mttl_storage import NotFound

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
        return _flat("local://mttldata/flan-flat", None, tasks, progress)
    path = Path(name.removeprefix("local://")).expanduser()
    if "://" not in name or name.startswith("local://"):
        if not path.exists():
            raise DataNotReachableError(
                f"there is no dataset at {name!r}; pass 'starter', the address of a library that "
                "apps/dataset made, or a folder of parquet or jsonl files"
            )
        if _holds_rows(path):
            digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
            return _flat(f"local://mttldata/{path.stem}-{digest}", path, tasks, progress)
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


def _flat(
    address: str, source: Path | None, tasks: Sequence[str] | None, progress: Progress | None
) -> DatasetLibrary:
    """The library at ``address`` with the wanted tasks of ``source``, made where missing."""
    from mttl_data.flan import make_flan

    library = DatasetLibrary(address, create=True)
    missing = None if tasks is None else [task for task in tasks if task not in library]
    if missing != []:
        make_flan(library, source, missing, progress=progress)
    return library
