"""``virtual://``: a tree in the memory of this process. It never touches the disk.

All addresses are folders of one tree, so ``virtual://a`` holds what ``virtual://a/b`` does.
"""

import datetime
import io
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Union

from mttl_storage.errors import Conflict, NotFound
from mttl_storage.store.base import Entry, Store
from mttl_storage.store.transfer import CHUNK, Upload, verified

_versions = itertools.count(1)


@dataclass
class _Blob:
    data: bytes
    created: float = field(default_factory=time.time)
    time: float = field(default_factory=time.time)
    version: str = field(default_factory=lambda: str(next(_versions)))


_Folder = dict[str, Union["_Folder", _Blob]]
_TREE: _Folder = {}
_LOCK = threading.RLock()


class VirtualStore(Store):
    """Files in memory under one folder of the process's tree; the whole tree by default."""

    protocol = "virtual"
    scheme = "virtual"

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        """A store in the folder ``root``, which need not exist yet."""
        super().__init__(root=root, **kwargs)
        self.root = self._strip_protocol(root)

    def _parts(self, key: str) -> list[str]:
        return [part for part in f"{self.root}/{self._strip_protocol(key)}".split("/") if part]

    def _find(self, key: str) -> "_Folder | _Blob":
        node: _Folder | _Blob = _TREE
        for part in self._parts(key):
            if not isinstance(node, dict) or part not in node:
                raise NotFound(f"{self.address_of(key)!r} does not exist")
            node = node[part]
        return node

    def _blob(self, key: str) -> _Blob:
        node = self._find(key)
        if isinstance(node, dict):
            raise IsADirectoryError(f"{self.address_of(key)!r} is a folder")
        return node

    def _folder(self, parts: list[str]) -> _Folder:
        """The folder of these parts, made where missing."""
        node = _TREE
        for part in parts:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise NotADirectoryError(f"{part!r} in virtual://{'/'.join(parts)} is a file")
            node = child
        return node

    # The verbs of a repository.

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create a file with these bytes; False, and nothing done, if the key is taken."""
        *above, name = self._parts(key)
        with _LOCK:
            return self._folder(above).setdefault(name, new := _Blob(bytes(data))) is new

    def version(self, key: str) -> str:
        """What changes whenever the file is written or renewed."""
        return self._blob(key).version

    def compare_and_swap(self, key: str, data: bytes, expected: str | None) -> str:
        """Write only if the version is still ``expected`` (None: only if absent), else Conflict."""
        with _LOCK:
            found = self.version(key) if self.exists(key) else None
            if found == expected:
                self._replace(key, data)
                return self.version(key)
        raise Conflict(
            f"{self.address_of(key)!r} has version {found!r}, not {expected!r}; "
            "read it again and try once more"
        )

    def renew(self, key: str) -> Entry | None:
        """Make the file as young as one just written, so that gc spares it; None if absent."""
        with _LOCK:
            try:
                blob = self._blob(key)
            except NotFound:
                return None
            blob.time, blob.version = time.time(), str(next(_versions))
            return Entry(key, len(blob.data), blob.time, blob.version)

    def delete_if_unchanged(self, key: str, version: str) -> bool:
        """Delete a file unless it was written or renewed since; whether it was deleted."""
        with _LOCK:
            try:
                if self.version(key) != version:
                    return False
            except NotFound:
                return False
            parts = self._parts(key)
            del self._folder(parts[:-1])[parts[-1]]
            while len(parts := parts[:-1]) > 1 and not self._folder(parts):
                del self._folder(parts[:-1])[parts[-1]]
        return True

    def scan(self, prefix: str = "") -> Iterator[Entry]:
        """Every file under a folder, in no order."""
        key = self._strip_protocol(prefix)
        with _LOCK:
            try:
                found = list(_walk(key, self._find(key)))
            except NotFound:
                found = []
        yield from found

    def read_chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The file, from a byte on, in chunks of at most CHUNK bytes."""
        data = self._blob(key).data
        for first in range(start, len(data), CHUNK):
            yield data[first : first + CHUNK]

    def check_writable(self) -> None:
        """Memory can always be written."""

    def _upload(self, key: str, upload: Upload) -> None:
        if not self._is_stored(key, upload):
            self._replace(key, b"".join(verified(upload)))

    # The fsspec interface.

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """What lies in a folder, or the file itself."""
        key = self._strip_protocol(path)
        with _LOCK:
            node = self._find(key)
            if isinstance(node, dict):
                infos = [
                    _info(f"{key}/{name}" if key else name, node[name]) for name in sorted(node)
                ]
            else:
                infos = [_info(key, node)]
        return infos if detail else [each["name"] for each in infos]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size, type, and times of a file or folder."""
        key = self._strip_protocol(path)
        return _info(key, self._find(key))

    def created(self, path: str) -> datetime.datetime:
        """When the file came to be."""
        return datetime.datetime.fromtimestamp(self._blob(path).created, tz=datetime.UTC)

    def modified(self, path: str) -> datetime.datetime:
        """When the file was last written."""
        return datetime.datetime.fromtimestamp(self._blob(path).time, tz=datetime.UTC)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Make a folder, which must not exist."""
        with _LOCK:
            if self.exists(path):
                raise FileExistsError(f"{self.address_of(path)!r} exists")
            if not create_parents:
                self._find(self._parent(path))
            self._folder(self._parts(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder and those above it."""
        with _LOCK:
            if not (exist_ok and self.isdir(path)):
                self.mkdir(path)

    def rmdir(self, path: str) -> None:
        """Remove an empty folder."""
        *above, name = self._parts(path)
        with _LOCK:
            node = self._find(path)
            if not isinstance(node, dict):
                raise NotADirectoryError(f"{self.address_of(path)!r} is a file")
            if node:
                raise OSError(f"{self.address_of(path)!r} is not empty")
            del self._folder(above)[name]

    def rm_file(self, path: str) -> None:
        """Delete a file."""
        *above, name = self._parts(path)
        with _LOCK:
            self._blob(path)
            del self._folder(above)[name]

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy a file, or make a folder of the same kind."""
        with _LOCK:
            node = self._find(path1)
            if isinstance(node, dict):
                self.makedirs(path2, exist_ok=True)
            else:
                self._replace(self._strip_protocol(path2), node.data)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """The bytes of a file, or of a range of it."""
        return self._blob(path).data[start:end]

    def _replace(self, key: str, data: bytes) -> None:
        *above, name = self._parts(key)
        with _LOCK:
            folder = self._folder(above)
            old = folder.get(name)
            if isinstance(old, dict):
                raise IsADirectoryError(f"{self.address_of(key)!r} is a folder")
            folder[name] = _Blob(bytes(data), created=old.created if old else time.time())

    def _open(
        self, path: str, mode: str = "rb", autocommit: bool = True, **kwargs: Any
    ) -> IO[bytes]:
        if mode == "rb":
            return io.BytesIO(self._blob(path).data)
        if mode not in ("wb", "xb", "ab"):
            raise ValueError(f"files here are whole: mode {mode!r} is not 'r', 'w', 'x' or 'a'")
        if mode == "xb" and self.exists(path):
            raise FileExistsError(f"{self.address_of(path)!r} exists")
        if self.isdir(path):
            raise IsADirectoryError(f"{self.address_of(path)!r} is a folder")
        file = _WrittenFile(self, path, mode, autocommit)
        if mode == "ab" and self.exists(path):
            file.write(self.cat_file(path))
        return file


class _WrittenFile(io.BytesIO):
    """A file being written; it appears in the store, whole, when closed without an error."""

    def __init__(self, store: VirtualStore, path: str, mode: str, autocommit: bool) -> None:
        super().__init__()
        self._store, self._path, self._mode = store, path, mode
        self._autocommit = autocommit
        self._data = b""

    def close(self) -> None:
        if self.closed:
            return
        self._data = self.getvalue()
        super().close()
        if self._autocommit:
            self.commit()

    def commit(self) -> None:
        """Put the file in its place."""
        self._store.pipe_file(
            self._path, self._data, mode="create" if self._mode == "xb" else "overwrite"
        )

    def discard(self) -> None:
        """Forget what was written."""
        self._autocommit = False
        self.close()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.close() if kind is None else self.discard()

    def __del__(self) -> None:
        self.discard()


def _walk(key: str, node: "_Folder | _Blob") -> Iterator[Entry]:
    if not isinstance(node, dict):
        yield Entry(key, len(node.data), node.time, node.version)
        return
    for name, child in node.items():
        yield from _walk(f"{key}/{name}" if key else name, child)


def _info(key: str, node: "_Folder | _Blob") -> dict[str, Any]:
    if isinstance(node, dict):
        return {"name": key, "size": 0, "type": "directory"}
    return {
        "name": key,
        "size": len(node.data),
        "type": "file",
        "created": node.created,
        "mtime": node.time,
    }
