"""What a repository asks of a backend, beside the fsspec interface.

A store is a folder of relative keys. Every write is whole: a reader sees the old bytes or the new.
"""

import contextlib
import hashlib
import io
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from fsspec import AbstractFileSystem

from mttl_storage.errors import Corrupt, StorageError
from mttl_storage.store.transfer import Upload, in_parallel


class Entry(NamedTuple):
    """One stored file in a listing; ``version`` changes whenever the file is written or renewed."""

    key: str
    size: int
    time: float
    version: str


@dataclass
class Staging:
    """The files of a commit to come, by key, which are stored but seen by no one."""

    files: dict[str, Upload] = field(default_factory=dict)


class Store(AbstractFileSystem):  # type: ignore[misc]
    """An fsspec filesystem rooted at ``root``, with the verbs that fsspec lacks.

    Reading is ``cat_file(key)`` and whole writing ``pipe_file(key, data)``, as in fsspec. A missing
    key is NotFound, which is also FileNotFoundError.
    """

    root_marker = ""
    cachable = False
    root: str
    scheme: str
    on_disk = False
    """Whether ``local_path`` gives the stored file itself."""
    distant = False
    """Whether each request takes long, so that many are made at once and files are cached."""
    items_folder = ""
    """Where items lie below the root."""
    shown_folder = ""
    """Items below this name are also shown at the root by the rest of their name, if it is set."""
    missing_hint = ""
    """What to add when there is no repository."""
    kept_by_history = ""
    """What gc cannot delete here, for people."""

    @property
    def address(self) -> str:
        """The canonical address, without credentials."""
        return f"{self.scheme}://{self.root}"

    def address_of(self, key: str) -> str:
        """The address of one key, for messages."""
        return f"{self.address.rstrip('/')}/{key}"

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create a file with these bytes; False, and nothing done, if the key is taken."""

    @abstractmethod
    def version(self, key: str) -> str:
        """What changes whenever the file is written or renewed."""

    @abstractmethod
    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """Write only if the version is still ``expected`` (None: only if absent), else Conflict.

        Returns:
            The new version.
        """

    @abstractmethod
    def renew(self, key: str) -> Entry | None:
        """Make the file as young as one just written, so that gc spares it; None if absent."""

    @abstractmethod
    def delete_if_unchanged(self, key: str, version: str) -> bool:
        """Delete a file unless it was written or renewed since; whether it was deleted."""

    @abstractmethod
    def scan(self, prefix: str = "") -> Iterator[Entry]:
        """Every file under a folder, in no order, without what is half written."""

    @abstractmethod
    def read_chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The file, from a byte on, in chunks of at most a mebibyte or so."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raise ReadOnly or Denied if nothing can be written."""

    def tidy(self, cutoff: float) -> int:
        """Remove what writers that were killed before a time left half written; how many files."""
        return 0

    def local_path(self, key: str) -> Path:
        """The stored file on the local disk; only where ``on_disk``."""
        raise NotImplementedError(f"files of {self.address} are not on the local disk")

    def item_folder(self, home: str, digest: str) -> str:
        """Where the files of an item lie, by its first name and its digest."""
        return f"{self.items_folder}/{home}/{digest}".lstrip("/")

    def prepare(self) -> None:
        """Make the place itself, a container or a hub repository, if there is none."""

    def stage(self, makers: Sequence[Callable[[], Mapping[str, Upload]]]) -> Staging:
        """Store the files of a commit to come. A file that is there and right is only renewed.

        Args:
            makers: each gives the files of one item by key, which takes reading and hashing them.
        """
        staging = Staging()

        def bring(make: Callable[[], Mapping[str, Upload]]) -> None:
            files = make()
            self._bring(files)
            staging.files.update(files)

        in_parallel(bring, makers)
        return staging

    def _bring(self, files: Mapping[str, Upload]) -> None:
        in_parallel(lambda key: self._upload(key, files[key]), files)

    def publish(
        self,
        key: str,
        data: bytes,
        staging: Staging | None = None,
        beside: Mapping[str, bytes] | None = None,
        shown: Mapping[str, str | None] | None = None,
        message: str = "",
        pages: Callable[[], Mapping[str, bytes]] | None = None,
    ) -> bool:
        """Make a staged commit visible by creating its log entry; False if the key is taken.

        Args:
            key: of the log entry.
            data: the entry.
            staging: what ``stage`` returned.
            beside: further files that only save time; they may come later, or never.
            shown: by path, the key of the file to show there, None for none; see ``shown_folder``.
            message: what was done, where people look at the store itself.
            pages: makes files for people, by key, to be published by the same commit of the store;
                not asked where each file is published by itself.
        """
        if not self.put_if_absent(key, data):
            return False
        for each, content in (beside or {}).items():
            with contextlib.suppress(StorageError):
                self._replace(each, content)
        return True

    def delete_unchanged(self, entries: Sequence[Entry]) -> list[Entry]:
        """Delete files, each unless it was written or renewed since; those that were deleted."""
        deleted: list[Entry] = []

        def delete(entry: Entry) -> None:
            if self.delete_if_unchanged(entry.key, entry.version):
                deleted.append(entry)

        in_parallel(delete, entries)
        return deleted

    @abstractmethod
    def _upload(self, key: str, upload: Upload) -> None:
        """Store one file; ``_is_stored`` says when that is not needed."""

    def _is_stored(self, key: str, upload: Upload) -> bool:
        """Whether the file is there with the right bytes; it is renewed first, so it stays."""
        entry = self.renew(key)
        return entry is not None and entry.size == upload.size and self.sha256(key) == upload.sha256

    def sha256(self, key: str) -> str:
        """The SHA-256 of the stored bytes, read in full."""
        hashed = hashlib.sha256()
        for chunk in self.read_chunks(key):
            hashed.update(chunk)
        return hashed.hexdigest()

    def check(self, key: str, size: int, sha256: str) -> None:
        """Raise Corrupt unless the stored bytes, read in full, have this size and digest."""
        hashed, found = hashlib.sha256(), 0
        with self._no_folder(key):
            for chunk in self.read_chunks(key):
                hashed.update(chunk)
                found += len(chunk)
        self._compare(key, size, sha256, found, hashed.hexdigest())

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """The bytes of several small files, None for each that is missing."""
        if not self.distant:
            return [self._read_or_none(key) for key in keys]
        found: dict[str, bytes | None] = {}
        in_parallel(lambda key: found.update({key: self._read_or_none(key)}), keys)
        return [found[key] for key in keys]

    def _read_or_none(self, key: str) -> bytes | None:
        try:
            with self._no_folder(key):
                data: bytes = self.cat_file(key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return data

    @contextlib.contextmanager
    def _no_folder(self, key: str) -> Iterator[None]:
        try:
            yield
        except IsADirectoryError:
            raise Corrupt(
                f"{self.address_of(key)!r} is damaged: a folder lies where a file should be; "
                "move it away, and run verify"
            ) from None

    def read_verified(self, key: str, size: int, sha256: str) -> bytes:
        """The bytes of a file, or Corrupt if they are not those that were written."""
        with self._no_folder(key):
            data: bytes = self.cat_file(key)
        self._compare(key, size, sha256, len(data), hashlib.sha256(data).hexdigest())
        return data

    def _compare(self, key: str, size: int, sha256: str, found: int, found_sha256: str) -> None:
        if (found, found_sha256) != (size, sha256):
            raise Corrupt(
                f"{self.address_of(key)!r} is damaged: expected {size} bytes with SHA-256 "
                f"{sha256}, found {found} bytes with {found_sha256}; add the same files again, "
                "or copy the item from another repository"
            )

    # What fsspec builds on.

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        text = str(path).removeprefix(f"{cls.scheme}://")
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in text:
            raise ValueError(f"the path {text!r} contains '..' or NUL, which could leave its root")
        return "/".join(parts)

    def unstrip_protocol(self, name: str) -> str:
        """The full address of a path."""
        return self.address_of(self._strip_protocol(name))

    def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> IO[Any]:
        """A file object; what was written is there once closed, and not if the block raised."""
        if "b" in mode or "compression" in kwargs:
            return super().open(path, mode, *args, **kwargs)  # type: ignore[no-any-return]
        options = {k: kwargs.pop(k) for k in ("encoding", "errors", "newline") if k in kwargs}
        binary = super().open(path, mode.replace("t", "") + "b", *args, **kwargs)
        return _TextFile(binary, **options)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete files, and folders with all they hold if ``recursive``."""
        for found in reversed(self.expand_path(path, recursive=recursive, maxdepth=maxdepth)):
            if not self.isdir(found):
                self.rm_file(found)
            elif recursive:
                if found:
                    self.rmdir(found)
            else:
                raise IsADirectoryError(f"{found!r} is a folder; pass recursive=True to delete it")

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        """Create an empty file, empty it, or with ``truncate=False`` only renew its time."""
        if truncate or self.renew(self._strip_protocol(path)) is None:
            self.pipe_file(path, b"")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Write a whole file; mode "create" raises FileExistsError if it is there."""
        key = self._strip_protocol(path)
        if mode != "create":
            self._replace(key, bytes(value))
        elif not self.put_if_absent(key, bytes(value)):
            raise FileExistsError(f"{self.address_of(key)!r} exists")

    @abstractmethod
    def _replace(self, key: str, data: bytes) -> None: ...


class _TextFile(io.TextIOWrapper):
    def __exit__(self, *error: Any) -> None:
        if error[0]:
            cast(Any, self.buffer).__exit__(*error)
        else:
            self.close()
