"""Items: immutable folders of files, and the small record that the log keeps of each."""

import datetime
import functools
import gc
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mttl_storage.errors import Corrupt, translated
from mttl_storage.names import ancestors, check_name, fold
from mttl_storage.sealed import from_json, to_json
from mttl_storage.store.transfer import CHUNK, Upload, in_parallel

INFO_LIMIT = 1 << 18
"""Most bytes of JSON in the info of one item; listing reads all of it."""
_DEPTH_LIMIT = 100
"""Most objects and lists inside one another in an info; Python's own limit depends on the caller"""
_DIGEST = re.compile(r"[0-9a-f]{64}")


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
    if not line.startswith(b'["'):
        raise ValueError(f"{line[:80]!r} does not begin with a name")
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
        items = [_item(name, record) for name, record in from_json(b"[%s]" % b",".join(lines))]
        if [item.name for item in items] != list(map(name_of_line, lines)):
            raise ValueError("a line holds more than a record")
        return items
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        first = f"the record {lines[0][:80]!r}" + " or one after it" * (len(lines) > 1)
        raise Corrupt(f"{first} cannot be read: {error!r:.200}; run verify") from None
    finally:
        if collecting:
            gc.enable()


def _item(name: str, record: Mapping[str, Any]) -> Item:
    check_record(name, record)
    check_time(record["time"])
    if type(record["generation"]) is not int:
        raise TypeError(f"{record['generation']!r:.80} is no generation")
    return Item(
        name,
        record["digest"],
        {file: FileEntry(*entry) for file, entry in record["files"].items()},
        record["info"],
        record["generation"],
        record["time"],
        record.get("home", name),
    )


def check_record(name: str, record: Mapping[str, Any]) -> None:
    """Raise ValueError, or TypeError and the like, for a record that no version has written.

    Its names become paths, and its log may be from elsewhere.
    """
    check_name(name)
    if "home" in record:
        check_name(record["home"])
    check_digest(record["digest"])
    if not isinstance(record["info"], dict):
        raise TypeError(f"the info is {type(record['info']).__name__}, not an object")
    for file, (size, sha256) in record["files"].items():
        _check_file_name(file)
        check_digest(sha256)
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise ValueError(f"{size!r:.80} is no size")


@functools.lru_cache(1000)
def _check_file_name(name: str) -> None:
    check_name(name, "file name")


def check_digest(text: str) -> str:
    """The text itself, if it is a SHA-256 in hexadecimal."""
    if not _DIGEST.fullmatch(text):
        raise ValueError(f"{text!r:.80} is no SHA-256")
    return text


def check_time(text: str) -> str:
    """The text itself, if it is a moment in ISO 8601, with its zone."""
    if datetime.datetime.fromisoformat(text).utcoffset() is None:
        raise ValueError(f"{text!r:.80} has no time zone")
    return text


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
    _check_keys(info, _DEPTH_LIMIT)
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


def _check_keys(value: Any, depth: int) -> None:
    if not depth:
        raise ValueError(f"info must be nested less than {_DEPTH_LIMIT} deep")
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                raise ValueError(f"info must be JSON, whose keys are str: {key!r} is not")
            _check_keys(each, depth - 1)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_keys(each, depth - 1)


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
