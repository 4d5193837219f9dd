"""The zip archive that ``torch.save`` writes: one pickle, and the values of tensors beside it."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from typing import Any

import torch
from torch import Tensor

from mttl_experts.legacy.machine import Machine, RefusedFileError

PICKLE_LIMIT = 16 << 20
"""Most bytes of the pickle itself."""
_ROOM = 8  # tied weights share their values, so tensors can take more bytes than the file
_ENTRY = re.compile(
    r"(?P<top>[^/\\\0]+)/(?P<rest>data\.pkl|version|byteorder|data/[0-9]{1,9}|"
    r"\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_ENCRYPTED = 1
# What zipfile raises for bytes that are no whole archive.
_BROKEN = (
    *(zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError),
    *(OverflowError, struct.error, LookupError),
)


def read_archive(data: bytes, where: str) -> Any:
    """What ``torch.save`` put into a file: plain data, tensors and arrays. Nothing in it is run.

    Args:
        data: the file's bytes.
        where: its name, for errors.

    Raises:
        RefusedFileError: naming the file and what in it is refused.
    """
    try:
        return _read(data)
    except RefusedFileError as error:
        raise RefusedFileError(
            f"{where!r} is refused, and nothing in it was run: it has {error}; only plain data, "
            "tensors and arrays as torch.save writes them are read"
        ) from None


def _read(data: bytes) -> Any:
    if not data.startswith(b"PK\x03\x04"):
        raise RefusedFileError("no zip archive (is it damaged, or from before torch 1.6?)")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = _checked(archive, len(data))
            if entries["data.pkl"].file_size > PICKLE_LIMIT:
                raise RefusedFileError(f"a pickle of more than {PICKLE_LIMIT} bytes")
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise RefusedFileError("tensors that are not little-endian")
            pickled, storages = archive.read(entries["data.pkl"]), _Storages(archive, entries)
            return Machine(pickled, storages, room=_ROOM * len(data)).run()
    except RefusedFileError:
        raise
    except _BROKEN as error:
        raise RefusedFileError(f"no whole zip archive ({error})") from None


def _checked(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by name below the archive's one folder, if torch.save could have made them."""
    found: dict[str, zipfile.ZipInfo] = {}
    tops: set[str] = set()
    total = 0
    for entry in archive.infolist():
        match = _ENTRY.fullmatch(entry.filename)
        if match is None or match["top"] in (".", ".."):
            raise RefusedFileError(f"an entry {entry.filename!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise RefusedFileError(f"a compressed or encrypted entry {entry.filename!r}")
        if match["rest"] in found:
            raise RefusedFileError(f"the entry {entry.filename!r} twice")
        total += entry.file_size
        if entry.file_size != entry.compress_size or total > size:
            raise RefusedFileError(f"an entry {entry.filename!r} larger than the file has room for")
        tops.add(match["top"])
        found[match["rest"]] = entry
    if len(tops) != 1 or "data.pkl" not in found:
        raise RefusedFileError("no entry 'data.pkl' in one folder")
    return found


class _Storages:
    """Values of tensors by key, each read once; all that refer to one share it."""

    def __init__(self, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> None:
        self._archive = archive
        self._entries = entries
        self._read: dict[str, Tensor] = {}

    def __call__(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """The (count,) values."""
        entry = self._entries.get(f"data/{key}")
        if entry is None:
            raise RefusedFileError(f"a tensor whose values {key[:20]!r} are missing")
        if count < 0 or entry.file_size != count * dtype.itemsize:
            raise RefusedFileError(
                f"{entry.file_size} bytes where {count} elements of {dtype} should be"
            )
        if key not in self._read:
            content = bytearray(self._archive.read(entry))
            self._read[key] = (
                torch.frombuffer(content, dtype=dtype) if count else torch.empty(0, dtype=dtype)
            )
        found = self._read[key]
        if found.dtype != dtype:
            raise RefusedFileError(f"the values {key!r} both as {found.dtype} and as {dtype}")
        return found
