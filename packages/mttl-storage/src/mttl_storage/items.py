"""Items: immutable folders of files, and the small record that the log keeps of each."""

import gc
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mttl_storage.errors import Corrupt, translated
from mttl_storage.names import ancestors, check_name, fold
from mttl_storage.sealed import to_json
from mttl_storage.store.transfer import CHUNK, Upload, in_parallel

INFO_LIMIT = 1 << 18
"""Most bytes of JSON in the info of one item; listing reads all of it."""


class FileEntry(NamedTuple):
    """One file of an item."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Item:
    """One item as a generation has it.

    Args:
        name: as in "experts/arithmetic".
        digest: SHA-256 over the sorted list of its files (name, size, SHA-256 of each).
        files: by relative name; there may be none.
        info: a small JSON object.
        generation: the one in which the item became what it is.
        time: of that commit, ISO 8601 in UTC.
        home: the name under which its files were first stored; renaming moves no files.
    """

    name: str
    digest: str
    files: Mapping[str, FileEntry] = field(hash=False)
    info: Mapping[str, Any] = field(hash=False)
    generation: int
    time: str
    home: str = field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """Bytes in all its files."""
        return sum(entry.size for entry in self.files.values())


def content_digest(files: Mapping[str, FileEntry]) -> str:
    """The digest of an item with these files."""
    listed = sorted([name, entry.size, entry.sha256] for name, entry in files.items())
    return hashlib.sha256(to_json(listed)).hexdigest()


def encode_line(name: str, record: Mapping[str, Any]) -> bytes:
    """One line of a snapshot: the name and the record."""
    return to_json([name, record])


def name_of_line(line: bytes) -> str:
    """The name on a line, without parsing the rest. Names hold no quotes."""
    quoted = line[1 : line.index(b'"', 2) + 1]
    if b"\\" not in quoted:
        return quoted[1:-1].decode()
    name: str = json.loads(quoted)
    return name


def decode_line(line: bytes) -> Item:
    """The item on a line, or Corrupt."""
    return decode_lines([line])[0]


def decode_lines(lines: Sequence[bytes]) -> list[Item]:
    """The items on lines, or Corrupt. Parsing many at once is faster than one by one."""
    # Ten thousand records are many small objects and no garbage: collecting takes half the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return [_item(name, record) for name, record in json.loads(b"[%s]" % b",".join(lines))]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Corrupt(f"the record {lines[0][:80]!r} cannot be read: {error!r}") from None
    finally:
        if collecting:
            gc.enable()


def _item(name: str, record: Mapping[str, Any]) -> Item:
    return Item(
        name,
        record["digest"],
        {file: FileEntry(*entry) for file, entry in record["files"].items()},
        record["info"],
        record["generation"],
        record["time"],
        record.get("home", name),
    )


def to_record(name: str, item: Item) -> dict[str, Any]:
    """What the log keeps of an item that is to be called ``name``."""
    record = {
        "digest": item.digest,
        "files": {file: list(entry) for file, entry in item.files.items()},
        "info": item.info,
    }
    return record if item.home == name else {**record, "home": item.home}


def new_record(files: Mapping[str, Upload], info: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an item with these files."""
    entries = {file: FileEntry(upload.size, upload.sha256) for file, upload in files.items()}
    return {
        "digest": content_digest(entries),
        "files": {file: list(entry) for file, entry in entries.items()},
        "info": info,
    }


def checked_info(info: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of the info as JSON keeps it; an error says what JSON cannot keep."""
    if info is None:
        return {}
    if not isinstance(info, Mapping):
        raise TypeError(f"info must be a mapping, not {type(info).__name__}")
    _check_keys(info)
    try:
        text = to_json(dict(info))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"info must be JSON: {error}") from None
    if len(text) > INFO_LIMIT:
        raise ValueError(
            f"info has {len(text)} bytes of JSON, and at most {INFO_LIMIT} are allowed; "
            "put what is large into a file of the item"
        )
    checked: dict[str, Any] = json.loads(text)
    return checked


def _check_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                raise ValueError(f"info must be JSON, whose keys are str: {key!r} is not")
            _check_keys(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_keys(each)


Files = Mapping[str, bytes | os.PathLike[str] | Upload]


def checked_files(files: Files) -> dict[str, Any]:
    """A copy of the files of an item, after their names and kinds were checked."""
    if not isinstance(files, Mapping):
        raise TypeError(f"files must be a mapping of names, not {type(files).__name__}")
    _check_names(files)
    for source in files.values():
        if not isinstance(source, (bytes, bytearray, memoryview, os.PathLike, Upload)):
            raise TypeError(f"a file is given as bytes or a Path, not {type(source).__name__}")
    return dict(files)


def uploads_of(files: Mapping[str, Any]) -> dict[str, Upload]:
    """The files of an item, hashed."""
    uploads: dict[str, Upload] = {}

    def hash_one(name: str) -> None:
        uploads[name] = _upload_of(files[name])

    in_parallel(hash_one, files)
    return dict(sorted(uploads.items()))


def _check_names(files: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in files:
        check_name(name, "file name")
        other = seen.setdefault(fold(name), name)
        if other != name:
            raise ValueError(f"file names {other!r} and {name!r} differ only in case or form")
    for name in seen.values():
        for folder in ancestors(fold(name)):
            if folder in seen:
                raise ValueError(f"{seen[folder]!r} is a file, so {name!r} cannot lie in it")


def _upload_of(source: Any) -> Upload:
    if isinstance(source, Upload):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return Upload(data, len(data), hashlib.sha256(data).hexdigest())
    path, hashed, size = Path(source), hashlib.sha256(), 0
    with translated("read", str(path)), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
            size += len(chunk)
    return Upload(path, size, hashed.hexdigest())
