"""Verified reading of the files of an item."""

import os
import threading
from pathlib import Path

from mttl_storage.cache import cached_folder, fetch
from mttl_storage.errors import NotFound
from mttl_storage.items import FileEntry, Item
from mttl_storage.store.base import Store
from mttl_storage.store.transfer import in_parallel

_proven: dict[str, tuple[str, int, int, int]] = {}
_lock = threading.Lock()


def key_of(folder: str, item: Item, file: str) -> str:
    """The key of a file of an item that lies in a folder; NotFound names the files there are."""
    if file not in item.files:
        known = ", ".join(map(repr, sorted(item.files)[:5])) or "no files"
        raise NotFound(f"the item {item.name!r} has no file {file!r}; it has {known}")
    return f"{folder}/{file}".lstrip("/")


def read(store: Store, folder: str, item: Item, file: str) -> bytes:
    """The bytes of a file, or Corrupt."""
    return store.read_verified(key_of(folder, item, file), *item.files[file])


def local_file(store: Store, folder: str, item: Item, file: str) -> Path:
    """A verified file on the local disk, to map or to hand to other programs.

    A file is read in full once for each digest, inode and time of writing.
    """
    key, entry = key_of(folder, item, file), item.files[file]
    path = store.local_path(key) if store.on_disk else cached_folder(store, item) / file
    if not _is_proven(path, entry):
        if store.on_disk:
            store.check(key, *entry)
        else:
            fetch(store, key, entry, path)
        _remember(path, entry)
    return path


def local_folder(store: Store, folder: str, item: Item) -> Path:
    """The folder with all files of an item, verified, on the local disk."""
    in_parallel(lambda file: local_file(store, folder, item, file), item.files)
    if not item.files:  # nothing is stored, and a reader must not make folders in a repository
        cached_folder(store, item).mkdir(parents=True, exist_ok=True)
    elif store.on_disk:
        return store.local_path(folder)
    return cached_folder(store, item)


def _is_proven(path: Path, entry: FileEntry) -> bool:
    return _proven.get(os.fspath(path), ()) == _proof(path, entry)


def _remember(path: Path, entry: FileEntry) -> None:
    if proof := _proof(path, entry):
        with _lock:
            _proven[os.fspath(path)] = proof


def _proof(path: Path, entry: FileEntry) -> tuple[str, int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (entry.sha256, found.st_ino, found.st_mtime_ns, found.st_size)
