"""What the distant stores have in common: keys without folders, reached by requests that can fail.

A backend gives a handful of requests. Asking again, resuming a cut download, recognising a write
whose answer was lost, and the fsspec interface are here.
"""

import hashlib
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple, Self, TypeVar

from mttl_storage.errors import Conflict, NotFound, StorageError
from mttl_storage.retrying import Failure, patiently
from mttl_storage.secrets import Secret
from mttl_storage.store.base import Entry, Store
from mttl_storage.store.remote_files import Draft, Reader
from mttl_storage.store.transfer import Upload

ANY = "*"
"""The expected version of a write that does not depend on what is there."""
SMALL = 4 << 20
"""Bytes up to which a file is sent by one request."""
_TRIES_WITHOUT_A_BYTE = 20

_Answer = TypeVar("_Answer")


class Body(NamedTuple):
    """What a download sends.

    Args:
        size: of the whole file.
        version: of the file.
        chunks: from the place asked for; the connection may break in between.
    """

    size: int
    version: str
    chunks: Iterator[bytes]


class RemoteStore(Store):
    """Files elsewhere. Folders are only what keys have before a slash; empty ones do not exist."""

    distant = True

    def __init__(self, root: str, **kwargs: Any) -> None:
        """A store at ``root``, with the credential of the environment; nothing is contacted yet."""
        super().__init__(root=root, **kwargs)
        self.root = root
        self._token: object = None

    def with_token(self, token: object) -> Self:
        """This store, with a credential. fsspec keeps and shows arguments, so it is none."""
        self._token = Secret(token) if isinstance(token, str) else token
        return self

    @abstractmethod
    def _failure(self, error: Exception, doing: str, key: str) -> Failure | None:
        """What an exception of the client means, None if it is none of its."""

    @abstractmethod
    def _find(self, key: str) -> Entry:
        """One file, or NotFound (or what ``_failure`` makes that of)."""

    @abstractmethod
    def _get(self, key: str, first: int, last: int | None, version: str | None) -> Body:
        """Download from byte ``first`` to before ``last``, only if it still has the version."""

    @abstractmethod
    def _write(self, key: str, upload: Upload, expected: str | None) -> str | None:
        """Write a whole file, and give its version.

        Args:
            key: of the file.
            upload: its content.
            expected: ANY, or the version it must have, or None if it must not exist. If that is
                not so, nothing is written and None comes back.
        """

    @abstractmethod
    def _list(self, folder: str, recursive: bool) -> Iterator[Entry | str]:
        """The files below a folder; or those in it, and the folders in it as str."""

    @abstractmethod
    def _delete(self, keys: list[str]) -> None:
        """Delete files, at once where the backend can."""

    def _ask(
        self,
        doing: str,
        key: str,
        action: Callable[[], _Answer],
        noted: Callable[[Failure], None] | None = None,
    ) -> _Answer:
        return patiently(action, lambda error: self._failure(error, doing, key), noted)

    # The verbs of a repository.

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create a file with these bytes; False, and nothing done, if the key is taken."""
        return self._put(self._strip_protocol(key), upload_of(data), None) is not None

    def version(self, key: str) -> str:
        """What changes whenever the file is written or renewed."""
        return self._entry(self._strip_protocol(key)).version

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """Write only if the version is still ``expected`` (None: only if absent), else Conflict."""
        key = self._strip_protocol(key)
        version = self._put(key, upload_of(data), expected)
        if version is None:
            raise Conflict(
                f"{self.address_of(key)!r} does not have version {expected!r} any more; "
                "read it again and try once more"
            )
        return version

    def _put(self, key: str, upload: Upload, expected: str | None) -> str | None:
        """As ``_write``, tried again; a write whose answer alone was lost counts as one."""
        lost = False

        def noted(failure: Failure) -> None:
            nonlocal lost
            lost = lost or failure.unknown

        version = self._ask("write", key, lambda: self._write(key, upload, expected), noted)
        if version is None and lost:
            entry = self._entry_or_none(key)
            if entry and entry.size == upload.size and self.sha256(key) == upload.sha256:
                return entry.version
        return version

    def put_upload(self, key: str, upload: Upload, new: bool) -> None:
        """Write a whole file; FileExistsError if it must be new and is not."""
        if self._put(key, upload, None if new else ANY) is None:
            raise FileExistsError(f"{self.address_of(key)!r} was created meanwhile")

    def _upload(self, key: str, upload: Upload) -> None:
        # Of a small file it is cheaper to send it than to ask for it first.
        if upload.size <= SMALL and self._put(key, upload, None) is not None:
            return
        if not self._is_stored(key, upload):
            self._put(key, upload, ANY)

    def _replace(self, key: str, data: bytes) -> None:
        self._put(key, upload_of(data), ANY)

    def _entry(self, key: str) -> Entry:
        return self._ask("read", key, lambda: self._find(key))

    def _entry_or_none(self, key: str) -> Entry | None:
        try:
            return self._entry(key)
        except NotFound:
            return None

    def scan(self, prefix: str = "") -> Iterator[Entry]:
        """Every file under a folder, in no order."""
        for entry in self._listed(self._strip_protocol(prefix), recursive=True):
            if isinstance(entry, Entry):
                yield entry

    def _listed(self, folder: str, recursive: bool) -> list[Entry | str]:
        try:
            return self._ask("list", folder, lambda: list(self._list(folder, recursive)))
        except NotFound:
            return []

    def read_chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The file, from a byte on, in chunks of at most a mebibyte or so."""
        yield from self._stream(self._strip_protocol(key), start, None)

    def _stream(self, key: str, position: int, last: int | None) -> Iterator[bytes]:
        """Bytes from a place on; a download that breaks goes on where it stopped."""
        version, fruitless = None, 0
        while last is None or position < last:
            body = self._ask(
                "read",
                key,
                lambda: self._get(key, position, last, version),  # noqa: B023
            )
            last = body.size if last is None else min(last, body.size)
            version, began = body.version, position
            failure = None
            try:
                for chunk in body.chunks:
                    position += len(chunk)
                    yield chunk
            except Exception as error:
                failure = self._failure(error, "read", key)
                if failure is None:
                    raise
            if failure and not failure.passing:
                raise failure.error
            fruitless = 0 if position > began else fruitless + 1
            if position < last and fruitless > _TRIES_WITHOUT_A_BYTE:
                raise failure.error if failure else self._cut(key, position, last)
            if position < last:
                time.sleep(random.uniform(0, 0.1 * 2 ** min(fruitless, 6)))  # noqa: S311

    def _cut(self, key: str, position: int, last: int) -> StorageError:
        return StorageError(
            f"cannot read {self.address_of(key)!r}: it ends after {position} of {last} bytes, "
            "again and again; try later, and if it stays so, add the file again"
        )

    def check_writable(self) -> None:
        """Nothing is asked: a credential that may not write is Denied when it tries."""

    # The fsspec interface.

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """The bytes of a file, or of a range of it."""
        key = self._strip_protocol(path)
        if (start or 0) < 0 or (end or 0) < 0:
            start, end, _ = slice(start, end).indices(self._entry(key).size)
        return b"".join(self._stream(key, start or 0, end))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size, type and version of a file or folder."""
        key = self._strip_protocol(path)
        entry = self._entry_or_none(key) if key else None
        if entry is not None:
            return _info(entry)
        if any(True for _ in self._listed(key, recursive=False)):
            return {"name": key, "size": 0, "type": "directory"}
        raise NotFound(f"{self.address_of(key)!r} does not exist")

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """What lies in a folder, or the file itself."""
        key = self._strip_protocol(path)
        infos = [_info(entry) for entry in self._listed(key, recursive=False)]
        infos = sorted(infos, key=lambda info: str(info["name"])) or [self.info(key)]
        return infos if detail else [info["name"] for info in infos]

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Every file below a folder, by one listing where no depth or folders are asked for."""
        if maxdepth is not None or withdirs:
            return super().find(path, maxdepth, withdirs, detail, **kwargs)
        key = self._strip_protocol(path)
        entries = list(self.scan(key)) or [e for e in [self._entry_or_none(key)] if key and e]
        infos = {entry.key: _info(entry) for entry in sorted(entries)}
        return infos if detail else list(infos)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Nothing: a folder is there as soon as a file is in it."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: a folder is there as soon as a file is in it."""

    def rmdir(self, path: str) -> None:
        """Nothing: a folder is gone as soon as no file is in it."""

    def rm_file(self, path: str) -> None:
        """Delete a file."""
        self._delete([self._strip_protocol(path)])

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete files, and folders with all they hold if ``recursive``."""
        found = self.expand_path(path, recursive=recursive, maxdepth=maxdepth)
        files = [each for each in found if each and self._entry_or_none(each)]
        if not recursive and len(files) < len(found):
            folder = next(each for each in found if each not in files)
            raise IsADirectoryError(f"{folder!r} is a folder; pass recursive=True to delete it")
        self._delete(files)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy a file."""
        key = self._strip_protocol(path1)
        if self._entry_or_none(key) is not None:
            self._replace(self._strip_protocol(path2), self.cat_file(key))
        elif not self.isdir(key):
            raise NotFound(f"{self.address_of(key)!r} does not exist")

    def _open(
        self, path: str, mode: str = "rb", autocommit: bool = True, **kwargs: Any
    ) -> IO[bytes]:
        key = self._strip_protocol(path)
        if mode == "rb":
            return Reader(self, key, **kwargs)
        if mode not in ("wb", "xb", "ab"):
            raise ValueError(f"files here are whole: mode {mode!r} is not 'r', 'w', 'x' or 'a'")
        there = self._entry_or_none(key)
        if there is None and self._listed(key, recursive=False):
            raise IsADirectoryError(f"{self.address_of(key)!r} is a folder")
        if there is not None and mode == "xb":
            raise FileExistsError(f"{self.address_of(key)!r} exists")
        file = Draft(self, key, mode, autocommit)
        if there is not None and mode == "ab":
            for chunk in self._stream(key, 0, None):
                file.write(chunk)
        return file


def upload_of(data: bytes) -> Upload:
    """Bytes as something to store."""
    return Upload(data, len(data), hashlib.sha256(data).hexdigest())


def _info(entry: Entry | str) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"name": entry, "size": 0, "type": "directory"}
    return {
        "name": entry.key,
        "size": entry.size,
        "type": "file",
        "mtime": entry.time,
        "version": entry.version,
    }


def slices(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Chunks put together to pieces of one size; the last may be shorter."""
    piece = bytearray()
    for chunk in chunks:
        piece += chunk
        while len(piece) >= size:
            yield bytes(piece[:size])
            del piece[:size]
    if piece:
        yield bytes(piece)
