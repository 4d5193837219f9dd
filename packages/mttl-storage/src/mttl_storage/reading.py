"""Verified reading of the files of an item."""

import os
import threading
from pathlib import Path
from typing import BinaryIO

from mttl_storage.cache import cached_folder, fetch
from mttl_storage.errors import NotFound
from mttl_storage.items import Item
from mttl_storage.store.base import Store, in_parallel

_proven: dict[str, tuple[str, int, int, int]] = {}
_lock = threading.Lock()


def key_of(store: Store, item: Item, file: str) -> str:
    """Where a file of an item lies in its store; NotFound names the files there are."""
    if file not in item.files:
        known = ", ".join(map(repr, sorted(item.files)[:5])) or "no files"
        raise NotFound(f"the item {item.name!r} has no file {file!r}; it has {known}")
    return f"{store.item_folder(item.home, item.digest)}/{file}"


def read(store: Store, item: Item, file: str) -> bytes:
    """The bytes of a file, or Corrupt."""
    return store.read_verified(key_of(store, item, file), *item.files[file])


def open_file(store: Store, item: Item, file: str) -> BinaryIO:
    """A verified file, open for reading."""
    return local_file(store, item, file).open("rb")


def local_file(store: Store, item: Item, file: str) -> Path:
    """A verified file on the local disk, to map or to hand to other programs."""
    key = key_of(store, item, file)
    if store.on_disk:
        path = store.local_path(key)
        _prove(store, key, path, item, file)
        return path
    target = cached_folder(item) / file
    fetch(store, key, item.files[file], target)
    return target


def local_folder(store: Store, item: Item) -> Path:
    """The folder with all files of an item, verified, on the local disk."""
    in_parallel(lambda file: local_file(store, item, file), item.files)
    if not item.files:  # nothing is stored, and a reader must not make folders in a repository
        cached_folder(item).mkdir(parents=True, exist_ok=True)
    elif store.on_disk:
        return store.local_path(store.item_folder(item.home, item.digest))
    return cached_folder(item)


def _prove(store: Store, key: str, path: Path, item: Item, file: str) -> None:
    """Check a file in full, but only once for each digest, inode and time of writing."""
    entry = item.files[file]
    try:
        found = path.stat()
        proof = (entry.sha256, found.st_ino, found.st_mtime_ns, found.st_size)
    except FileNotFoundError:
        proof = None
    if proof is not None and _proven.get(os.fspath(path)) == proof:
        return
    store.check(key, *entry)
    if proof is not None:
        with _lock:
            _proven[os.fspath(path)] = proof
