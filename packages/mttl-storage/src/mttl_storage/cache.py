"""Item files on the local disk, for backends whose files are elsewhere."""

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path

from mttl_storage.errors import StorageError, translated
from mttl_storage.items import FileEntry, Item
from mttl_storage.store.base import Store
from mttl_storage.store.disk import lock, make_folders
from mttl_storage.store.transfer import CHUNK

_folders: dict[int, Path] = {}


def _process_folder(process: int) -> Path:
    if process not in _folders:
        folder = Path(tempfile.mkdtemp(prefix="mttl-virtual-"))
        if _folders.setdefault(process, folder) is folder:
            atexit.register(_remove_folder, process)
        else:  # another thread was first
            folder.rmdir()
    return _folders[process]


def _remove_folder(process: int) -> None:
    if os.getpid() == process:  # not in a fork of it
        shutil.rmtree(_folders[process], ignore_errors=True)


def cached_folder(store: Store, item: Item) -> Path:
    """Where the files of an item are kept, by its digest.

    That is the user's cache folder (``mttl/items`` in it), which is shared by processes and can be
    deleted at any time; for a store in memory, a temporary folder that ends with this process.
    """
    if store.distant:
        return user_cache_path("mttl") / "items" / item.digest[:2] / item.digest
    return _process_folder(os.getpid()) / item.digest


def fetch(store: Store, key: str, entry: FileEntry, target: Path) -> None:
    """Write a verified file to ``target``.

    A download that was cut short, by whom ever, goes on where it stopped; of several at once, one
    downloads and the others wait for it.
    """
    partial = target.with_name(f".{entry.sha256}.part")
    with _in_the_way(target), translated("write", str(target)):
        if _is_right(target, entry):
            return
        make_folders(str(target.parent))
        with _locked(partial) as file:
            if _is_right(target, entry):  # someone else was first
                partial.unlink()
                return
            for _ in range(2):
                found = _completed(store, key, entry, file)
                if found == entry:
                    break
                # What was there before may be at fault, or the way, so once more from the start.
                file.truncate(0)
            else:
                partial.unlink()
                store._compare(key, *entry, *found)
            os.fsync(file.fileno())
            partial.replace(target)


@contextlib.contextmanager
def _in_the_way(target: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise StorageError(
            f"cannot write {str(target)!r}: {error.strerror or error}; something else is in its "
            "place or in that of a folder above it, so move that away"
        ) from None


def _completed(store: Store, key: str, entry: FileEntry, file: BinaryIO) -> FileEntry:
    """What the file is after appending what was missing."""
    file.seek(0)
    hashed = hashlib.sha256()
    while chunk := file.read(CHUNK):
        hashed.update(chunk)
    if file.tell() < entry.size:
        for chunk in store.read_chunks(key, file.tell()):
            hashed.update(chunk)
            file.write(chunk)
        file.flush()
    return FileEntry(file.tell(), hashed.hexdigest())


def _is_right(target: Path, entry: FileEntry) -> bool:
    """Whether a file is there with the right bytes; a damaged one is replaced."""
    if not target.is_file() or target.stat().st_size != entry.size:
        return False
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[BinaryIO]:
    """The partial file, open and locked; what was renamed while we waited is opened again."""
    while True:
        with partial.open("a+b") as file:
            lock(file.fileno())
            if _is_still(partial, file):
                yield file
                return


def _is_still(partial: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), partial.stat())
    except FileNotFoundError:
        return False
