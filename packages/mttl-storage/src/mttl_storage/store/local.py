"""``local://``: a folder on disk.

A file is written beside its place, flushed, and renamed or hard-linked into it, so that neither a
reader nor a power cut meets half a file. Links that lead out of the root are not followed.
"""

# System calls on path strings, each of which a test makes fail.
# ruff: noqa: PTH100, PTH103, PTH105, PTH106, PTH108, PTH110, PTH112, PTH116, PTH118
# ruff: noqa: PTH119, PTH120, PTH123

import contextlib
import datetime
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mttl_storage.errors import Conflict, Denied, ReadOnly, from_os_error, translated
from mttl_storage.names import PRIVATE
from mttl_storage.store.base import Entry, Staging, Store
from mttl_storage.store.disk import (
    TEMPORARY,
    WholeFile,
    create_from,
    exclusive,
    flush_folder,
    make_folders,
    temporary_beside,
)
from mttl_storage.store.transfer import CHUNK, Upload, in_parallel, verified


class LocalStore(Store):
    """Files under one folder of the local disk."""

    protocol = "local"
    scheme = "local"
    on_disk = True

    def __init__(self, root: str, **kwargs: Any) -> None:
        """A store in the folder ``root``, which need not exist yet."""
        super().__init__(root=root, **kwargs)
        self.root = os.path.abspath(root)
        self._real_root = os.path.realpath(self.root)

    def local_path(self, key: str) -> Path:
        """The stored file or folder itself."""
        return Path(self._full(key))

    def _full(self, key: str) -> str:
        rest = self._strip_protocol(key)
        full, wanted = self._real_root, os.path.join(self._real_root, rest).rstrip("/") or "/"
        for part in rest.split("/"):
            full = os.path.join(full, part)
            try:
                mode = os.lstat(full).st_mode
            except (FileNotFoundError, NotADirectoryError):
                return wanted
            if stat.S_ISLNK(mode):
                return self._behind_links(key, wanted)
        return wanted

    def _behind_links(self, key: str, full: str) -> str:
        real = os.path.realpath(full)
        if not f"{real}/".startswith(f"{self._real_root.rstrip('/')}/"):
            raise Denied(f"{self.address_of(key)!r} is a link that leads out of {self.address!r}")
        return real

    def _plain(self, key: str) -> str:
        """The path of a file to read. A pipe or a device there could block, or never end."""
        full = self._full(key)
        mode = os.stat(full).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise Denied(f"{self.address_of(key)!r} is a pipe or a device, not a file; remove it")
        return full

    # The verbs of a repository.

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create a file with these bytes; False, and nothing done, if the key is taken."""
        full = self._full(key)
        with translated("create", self.address_of(key)):
            if os.path.lexists(full):
                return False
            created = create_from([data], full)
            if created:
                flush_folder(os.path.dirname(full))
        return created

    def version(self, key: str) -> str:
        """What changes whenever the file is written or renewed."""
        with translated("read", self.address_of(key)):
            return _version(os.stat(self._full(key)))

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """Write only if the version is still ``expected`` (None: only if absent), else Conflict."""
        full = self._full(key)
        with translated("write", self.address_of(key)):
            make_folders(os.path.dirname(full))
            with exclusive(os.path.dirname(full)):
                found = _version(os.stat(full)) if os.path.exists(full) else None
                if found == expected:
                    self._replace(key, data)
                    return _version(os.stat(full))
        raise Conflict(
            f"{self.address_of(key)!r} has version {found!r}, not {expected!r}; "
            "read it again and try once more"
        )

    def renew(self, key: str) -> Entry | None:
        """Make the file as young as one just written, so that gc spares it; None if absent."""
        full = self._full(key)
        with translated("renew", self.address_of(key)):
            try:
                with exclusive(os.path.dirname(full)):
                    os.utime(full)
                    return _entry(key, os.stat(full))
            except FileNotFoundError:
                return None

    def delete_if_unchanged(self, key: str, version: str) -> bool:
        """Delete a file unless it was written or renewed since; whether it was deleted."""
        full = self._full(key)
        with translated("delete", self.address_of(key)):
            try:
                with exclusive(os.path.dirname(full)):
                    if _version(os.stat(full)) != version:
                        return False
                    os.unlink(full)
            except FileNotFoundError:
                return False
        self._remove_empty_folders(os.path.dirname(full))
        return True

    def _remove_empty_folders(self, full: str) -> None:
        with contextlib.suppress(OSError):  # not empty, or gone: both are fine
            while full.startswith(f"{self._real_root}/"):
                os.rmdir(full)
                full = os.path.dirname(full)

    def scan(self, prefix: str = "") -> Iterator[Entry]:
        """Every file under a folder, in no order, without what is half written."""
        for key, info in self._walk(self._strip_protocol(prefix)):
            if not os.path.basename(key).startswith(TEMPORARY):
                yield _entry(key, info)

    def _walk(self, key: str) -> Iterator[tuple[str, os.stat_result]]:
        try:
            with os.scandir(self._full(key)) as found:
                entries = list(found)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise from_os_error(error, "list", self.address_of(key)) from error
        for entry in entries:
            child = f"{key}/{entry.name}" if key else entry.name
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(child)
                elif entry.is_file(follow_symlinks=False):
                    yield child, entry.stat(follow_symlinks=False)

    def tidy(self, cutoff: float) -> int:
        """Remove what writers that were killed before a time left half written; how many files."""
        removed = 0
        for key, info in list(self._walk("")):
            if os.path.basename(key).startswith(TEMPORARY) and info.st_mtime < cutoff:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._full(key))
                    removed += 1
        return removed

    def read_chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The file, from a byte on, in chunks of at most CHUNK bytes."""
        with translated("read", self.address_of(key)), open(self._plain(key), "rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk

    def check_writable(self) -> None:
        """Raise ReadOnly or Denied if nothing can be written."""
        if os.access(self._full(PRIVATE), os.W_OK):
            return
        raise ReadOnly(
            f"{self.address!r} cannot be written: no permission to write in {PRIVATE!r}, or it "
            "lies on a read-only disk; open it with read_only=True, or change who owns it"
        )

    def stage(self, makers: Sequence[Callable[[], Mapping[str, Upload]]]) -> Staging:
        """Store the files of a commit to come. A file that is there and right is only renewed."""
        with translated("write in", self.address):
            staging = super().stage(makers)
            # All at the end: the first flush makes most of the others cheap.
            in_parallel(flush_folder, self._folders_of(staging.files))
        return staging

    def _folders_of(self, keys: Iterable[str]) -> set[str]:
        """The folders that files lie in, and those above up to the one that holds the root."""
        folders = set()
        for key in keys:
            folder = os.path.dirname(self._full(key))
            while folder not in folders and len(folder) >= len(self._real_root):
                folders.add(folder)
                folder = os.path.dirname(folder)
        return folders

    def _upload(self, key: str, upload: Upload) -> None:
        with translated("write", self.address_of(key)):
            if not self._is_stored(key, upload):
                full = self._full(key)
                os.makedirs(os.path.dirname(full), exist_ok=True)
                temporary = temporary_beside(full, verified(upload))
                os.replace(temporary, full)

    # The fsspec interface.

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """What lies in a folder, or the file itself."""
        key = self._strip_protocol(path)
        info = self.info(key)
        infos = [info]
        if info["type"] == "directory":
            with translated("list", self.address_of(key)), os.scandir(self._full(key)) as found:
                names = sorted(e.name for e in found if not e.name.startswith(TEMPORARY))
            infos = []
            for name in names:
                with contextlib.suppress(FileNotFoundError, Denied):
                    infos.append(self.info(f"{key}/{name}" if key else name))
        return infos if detail else [each["name"] for each in infos]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size, type, and times of a file or folder."""
        key = self._strip_protocol(path)
        with translated("read", self.address_of(key)):
            found = os.stat(self._full(key))
        folder = stat.S_ISDIR(found.st_mode)
        return {
            "name": key,
            "size": 0 if folder else found.st_size,
            "type": "directory" if folder else "file",
            "created": found.st_ctime,
            "mtime": found.st_mtime,
        }

    def created(self, path: str) -> datetime.datetime:
        """When the file came to be."""
        return _moment(self.info(path)["created"])

    def modified(self, path: str) -> datetime.datetime:
        """When the file was last written."""
        return _moment(self.info(path)["mtime"])

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Make a folder, which must not exist."""
        with translated("create", self.address_of(path)):
            (os.makedirs if create_parents else os.mkdir)(self._full(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder and those above it."""
        with translated("create", self.address_of(path)):
            os.makedirs(self._full(path), exist_ok=exist_ok)

    def rmdir(self, path: str) -> None:
        """Remove an empty folder."""
        with translated("remove", self.address_of(path)):
            os.rmdir(self._full(path))

    def rm_file(self, path: str) -> None:
        """Delete a file."""
        with translated("delete", self.address_of(path)):
            os.unlink(self._full(path))

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy a file, or make a folder of the same kind."""
        if self.isdir(path1):
            self.makedirs(path2, exist_ok=True)
            return
        full = self._full(path2)
        with translated("write", self.address_of(path2)):
            make_folders(os.path.dirname(full))
            os.replace(temporary_beside(full, self.read_chunks(path1)), full)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """The bytes of a file, or of a range of it."""
        with translated("read", self.address_of(path)), open(self._plain(path), "rb") as file:
            if start is None and end is None:
                return file.read()
            first, last, _ = slice(start, end).indices(os.fstat(file.fileno()).st_size)
            file.seek(first)
            return file.read(max(0, last - first))

    def _replace(self, key: str, data: bytes) -> None:
        full = self._full(key)
        with translated("write", self.address_of(key)):
            make_folders(os.path.dirname(full))
            os.replace(temporary_beside(full, [data]), full)
            flush_folder(os.path.dirname(full))

    def _open(
        self, path: str, mode: str = "rb", autocommit: bool = True, **kwargs: Any
    ) -> IO[bytes]:
        full = self._full(path)
        with translated("open", self.address_of(path)):
            if mode == "rb":
                return open(self._plain(path), "rb")
            if mode not in ("wb", "xb", "ab"):
                raise ValueError(f"files here are whole: mode {mode!r} is not 'r', 'w', 'x' or 'a'")
            if os.path.isdir(full):
                raise IsADirectoryError(f"{self.address_of(path)!r} is a folder")
            if mode == "xb" and os.path.lexists(full):
                raise FileExistsError(f"{self.address_of(path)!r} exists")
            make_folders(os.path.dirname(full))
            return WholeFile(full, mode, autocommit)


def _version(found: os.stat_result) -> str:
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"


def _entry(key: str, found: os.stat_result) -> Entry:
    return Entry(key, found.st_size, found.st_mtime, _version(found))


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
