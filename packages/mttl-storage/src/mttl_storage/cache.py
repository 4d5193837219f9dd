"""Item files on the local disk, for backends whose files are elsewhere."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from mttl_storage.errors import translated
from mttl_storage.items import FileEntry, Item
from mttl_storage.store.base import Store
from mttl_storage.store.disk import make_folders, temporary_beside


@functools.cache
def _process_folder(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mttl-virtual-"))

    def remove() -> None:
        if os.getpid() == process:  # not in a fork of it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def cached_folder(item: Item) -> Path:
    """Where the files of an item are kept: a temporary folder that ends with this process."""
    return _process_folder(os.getpid()) / item.digest


def fetch(store: Store, key: str, entry: FileEntry, target: Path) -> None:
    """Write a verified file to ``target``, unless one of that size is there."""
    if target.is_file() and target.stat().st_size == entry.size:
        return
    store.check(key, *entry)
    with translated("write", str(target)):
        make_folders(str(target.parent))
        Path(temporary_beside(str(target), store.read_chunks(key))).replace(target)
