"""Moving files: what is to be stored, streaming it with its digest, several at once."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from mttl_storage.store.base import Store

WORKERS = 8
"""Uploads and downloads in flight at once."""
CHUNK = 1 << 20

_Key = TypeVar("_Key")
_inside = threading.local()


class Stored(NamedTuple):
    """A file of another store, to be streamed from there."""

    store: "Store"
    key: str


Source = bytes | Path | Stored


class Upload(NamedTuple):
    """One file to store: where it comes from, and what must arrive."""

    source: Source
    size: int
    sha256: str


def verified(upload: Upload) -> Iterator[bytes]:
    """The bytes of an upload in chunks; ValueError at the end if they are not those promised."""
    if isinstance(upload.source, bytes):
        yield upload.source
        return
    hashed, size, source = hashlib.sha256(), 0, upload.source
    for chunk in _chunks(source):
        hashed.update(chunk)
        size += len(chunk)
        yield chunk
    if (size, hashed.hexdigest()) == (upload.size, upload.sha256):
        return
    if isinstance(source, Stored):
        source.store.check(source.key, upload.size, upload.sha256)
    raise ValueError(f"{str(source)!r} changed while it was being added; add it again")


def _chunks(source: Path | Stored) -> Iterator[bytes]:
    if isinstance(source, Stored):
        yield from source.store.read_chunks(source.key)
        return
    with source.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def in_parallel(action: Callable[[_Key], object], keys: Iterable[_Key]) -> None:
    """Call an action for each key, WORKERS at once; after an error no further call begins.

    Within such an action it calls one after the other, so that there are never more at once.
    """
    keys = list(keys)
    if len(keys) < 2 or getattr(_inside, "one", False):
        for key in keys:
            action(key)
        return
    with ThreadPoolExecutor(min(WORKERS, len(keys)), initializer=_enter) as pool:
        futures = [pool.submit(action, key) for key in keys]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _enter() -> None:
    _inside.one = True
