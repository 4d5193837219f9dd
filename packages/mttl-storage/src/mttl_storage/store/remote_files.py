"""File objects of the distant stores: read in ranges, written whole."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Protocol

from fsspec.spec import AbstractBufferedFile

from mttl_storage.store.disk import WholeFile
from mttl_storage.store.transfer import Upload


class Target(Protocol):
    """What a written file goes to."""

    def put_upload(self, key: str, upload: Upload, new: bool) -> None:
        """Write a whole file; FileExistsError if it must be new and is not."""


class Reader(AbstractBufferedFile):  # type: ignore[misc]
    """A file open for reading, fetched in ranges as it is read."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes = self.fs.cat_file(self.path, start=start, end=end)
        return data


class Draft(WholeFile):
    """A file being written on the local disk; it is uploaded, whole, when closed."""

    def __init__(self, store: Target, key: str, mode: str, autocommit: bool) -> None:
        """Begin a file for a key; mode is wb, xb or ab."""
        super().__init__(os.path.join(tempfile.gettempdir(), "draft"), "wb", autocommit)  # noqa: PTH118
        self._store, self._key, self._must_be_new = store, key, mode == "xb"

    def _place(self, temporary: str) -> None:
        path = Path(temporary)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        upload = Upload(path, path.stat().st_size, sha256)
        self._store.put_upload(self._key, upload, self._must_be_new)
