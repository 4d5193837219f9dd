"""Writing whole files to a local disk, durably."""

# System calls on path strings, each of which a test makes fail.
# ruff: noqa: PTH102, PTH105, PTH108, PTH112, PTH118
# ruff: noqa: PTH120, PTH123

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from mttl_storage.names import PRIVATE

TEMPORARY = f"{PRIVATE}-tmp-"
"""How the names of files that are being written begin."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


def temporary_beside(full: str, chunks: Iterable[bytes]) -> str:
    """Path of a new, flushed file with these bytes, in the folder of ``full``."""
    temporary = _temporary_name(full)
    descriptor = _create(temporary)
    try:
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        _discard(temporary)
        raise
    return temporary


def _create(path: str) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):  # gc removed the folder while it was empty
            return os.open(path, flags, 0o666)
        make_folders(os.path.dirname(path))
    return os.open(path, flags, 0o666)


def create_from(chunks: Iterable[bytes], full: str) -> bool:
    """Create ``full``, whole, with these bytes and its folder; False if it exists."""
    temporary = temporary_beside(full, chunks)
    try:
        return link_new(temporary, full)
    finally:
        _discard(temporary)


def link_new(temporary: str, full: str) -> bool:
    """Give a file a second name that must not exist; False if it does.

    A hard link is the one step that is both atomic and exclusive on POSIX. Where there are none
    (FAT, some network drives) a lock and a rename do it.
    """
    try:
        os.link(temporary, full)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with exclusive(os.path.dirname(full)):
            if os.path.lexists(full):
                return False
            os.replace(temporary, full)
    return True


def make_folders(folder: str) -> None:
    """Make a folder and those above it, and flush every folder that got a new entry."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(each)
        if not os.path.isdir(each):
            raise NotADirectoryError(f"{each!r} is a file; a folder is needed there")
        flush_folder(os.path.dirname(each))


def flush_folder(folder: str) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: str) -> Iterator[None]:
    """Hold the lock of a folder. It guards a few system calls, never an upload.

    The kernel drops it when the process dies. Where a file system has no locks, none is held.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> None:
    """Wait for the lock of an open file or folder; it is held until that is closed."""
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


class WholeFile(io.BufferedWriter):
    """A file being written beside its place; it appears there, whole, when closed.

    Leaving a ``with`` block by an exception, or dropping it unclosed, leaves nothing behind.
    """

    def __init__(self, full: str, mode: str, autocommit: bool = True) -> None:
        """Begin a file for ``full``; mode is wb, xb or ab."""
        self._full, self._mode, self._autocommit = full, mode, autocommit
        self._temporary = _temporary_name(full)
        self._settled = False
        super().__init__(io.FileIO(_create(self._temporary), "w"))
        if mode == "ab":
            with contextlib.suppress(FileNotFoundError), open(full, "rb") as old:
                while chunk := old.read(1 << 20):
                    self.write(chunk)

    def close(self) -> None:
        """Flush to disk and put the file in its place."""
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
        except BaseException:
            self.discard()
            raise
        super().close()
        if self._autocommit:
            self.commit()

    def commit(self) -> None:
        """Put the file in its place; FileExistsError if it must be new and is not."""
        if self._settled:
            return
        self._settled = True
        try:
            self._place(self._temporary)
        finally:
            _discard(self._temporary)

    def _place(self, temporary: str) -> None:
        if self._mode != "xb":
            os.replace(temporary, self._full)
        elif not link_new(temporary, self._full):
            raise FileExistsError(f"{self._full!r} was created meanwhile")
        flush_folder(os.path.dirname(self._full))

    def discard(self) -> None:
        """Forget what was written."""
        self._settled = True
        self._autocommit = False
        _discard(self._temporary)
        with contextlib.suppress(OSError):
            super().close()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        """Close, or forget what was written if the block raised."""
        self.close() if kind is None else self.discard()

    def __del__(self) -> None:
        """Leave nothing half written."""
        if not self.closed:
            self.discard()


def _temporary_name(full: str) -> str:
    return os.path.join(os.path.dirname(full), f"{TEMPORARY}{secrets.token_hex(8)}")


def _discard(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
