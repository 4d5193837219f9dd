"""One expert's factors in a mapped file: what is in it, and the slabs that banks read.

Of each module the rows of A (r, i), and of B (r, o), as safetensors; its last tensor is a seal of
checksums: of the header, of all numbers, and of the name that the file was written under. What is
not exactly such a file is a :class:`DamagedFileError`, and is not read.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import struct
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mttl_adapters.layer_factors import Factors

FORMAT = 2
SEAL, SEALED = "seal", struct.Struct("<III")
# Bytes that a checksum takes at a time.
CHUNK = 2**20
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# The system maps so much around a page that is read, so this is what is counted and let go.
GRAIN = 64 * 1024


class DamagedFileError(ValueError):
    """A file that is not what :func:`write` makes; to be written again."""


class Place(NamedTuple):
    """Where a module's rows lie in a file, and what they are."""

    a: int
    b: int
    rank: int
    in_features: int
    out_features: int
    scaling: float
    dtype: torch.dtype


class Layout(NamedTuple):
    """What a header says; one object for all files that have the same."""

    places: Mapping[str, Place]
    begin: int
    size: int


def write(path: Path, factors: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """Write one expert beside and move it into place: readers see all of it or nothing.

    It is not forced to the disk, which may take seconds: what a crash cuts off is too short after
    it, and that is noticed.
    """
    tensors: dict[str, Tensor] = {}
    for module, (a, b, _) in factors.items():
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{module!r} has A {tuple(a.shape)} and B {tuple(b.shape)}; ranks must agree"
            )
        tensors[f"{module}.a"] = a.detach().to("cpu", dtype).contiguous()
        tensors[f"{module}.b"] = b.detach().T.to("cpu", dtype).contiguous()
    scalings = {module: float(scaling) for module, (_, _, scaling) in factors.items()}
    tensors[SEAL] = torch.zeros(SEALED.size, dtype=torch.uint8)  # the last, by its dtype
    # One entry, because those of several are in no order.
    metadata = {"bank": json.dumps({"format": FORMAT, "scalings": scalings})}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        save_file(tensors, beside, metadata)
        with beside.open("r+b") as file:
            header, length = _header_of(file), os.fstat(file.fileno()).st_size
            seal = (_sum(header), _sum_of(file, len(header), length), _sum(path.stem.encode()))
            os.pwrite(file.fileno(), SEALED.pack(*seal), length - SEALED.size)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def places_of(path: Path) -> Mapping[str, Place]:
    """What a file's header says, by module path; its numbers are not looked at.

    Raises:
        FileNotFoundError: it is not here.
        DamagedFileError: its header, its length or its name is wrong.
    """
    with path.open("rb") as file:
        return _layout_of(file, path).places


def check_numbers(path: Path) -> None:
    """Read all of a file, which does not stay in this process's memory; raises as above.

    Raises:
        FileNotFoundError: it is not here.
        DamagedFileError: a bit of it is not what was written.
    """
    with path.open("rb") as file:
        layout = _layout_of(file, path)
        _, expected, _ = _seal_of(file, layout.size)
        if _sum_of(file, layout.begin, layout.size) != expected:
            raise _damaged(path, "its numbers do not have the checksum they were written with")


class MappedFile:
    """One expert's file, mapped.

    Attributes:
        memory: all of it.
        address: where that begins.
        places: of its modules, by path.
    """

    def __init__(self, path: Path) -> None:
        """Map a file, of which only the header is read; errors as :func:`places_of`."""
        with path.open("rb") as file:
            self.places = _layout_of(file, path).places
            # Private and never written to: the pages are the file's own.
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()

    def let_go(self) -> None:
        """Take all of it out of this process's memory; reading brings it back."""
        self.memory.madvise(mmap.MADV_DONTNEED)


class MappedSlab:
    """One module's rows in a file; tensors are made only for those who ask."""

    __slots__ = ("file", "place")

    def __init__(self, file: MappedFile, place: Place) -> None:
        """Nothing is read."""
        self.file, self.place = file, place

    @property
    def a(self) -> Tensor:
        """(r, i)."""
        return self._tensor(self.place.a, self.place.in_features)

    @property
    def b(self) -> Tensor:
        """(r, o), B by rows."""
        return self._tensor(self.place.b, self.place.out_features)

    @property
    def pointers(self) -> tuple[int, int]:
        """Where the two begin."""
        return self.file.address + self.place.a, self.file.address + self.place.b

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Offsets in the file, in whole grains, that reading the rows may bring into memory."""
        spans = []
        rank, size = self.place.rank, self.place.dtype.itemsize
        for start, features in (
            (self.place.a, self.place.in_features),
            (self.place.b, self.place.out_features),
        ):
            end = start + rank * features * size
            if end > start:
                # Grains of the address, which the system counts in, and never past the file.
                shift = self.file.address % GRAIN
                low = (start + shift) // GRAIN * GRAIN - shift
                high = -(-(end + shift) // GRAIN) * GRAIN - shift
                spans.append((max(0, low), min(high, len(self.file.memory))))
        return spans

    def let_go(self) -> None:
        """Take the rows out of this process's memory; reading them brings them back."""
        for low, high in self.spans:
            low = -(-low // mmap.PAGESIZE) * mmap.PAGESIZE
            if high > low:
                self.file.memory.madvise(mmap.MADV_DONTNEED, low, high - low)

    def _tensor(self, offset: int, features: int) -> Tensor:
        rank, dtype = self.place.rank, self.place.dtype
        if not rank * features:
            return torch.empty(rank, features, dtype=dtype)
        flat = torch.frombuffer(self.file.memory, dtype=dtype, count=rank * features, offset=offset)
        return flat.view(rank, features)


def _layout_of(file: Any, path: Path) -> Layout:
    length = os.fstat(file.fileno()).st_size
    try:
        header = _header_of(file)
        layout = _parsed(header)
        if layout.size != length:
            raise ValueError(f"{length} bytes where the header says {layout.size}")
        found = _seal_of(file, length)
        if found[0] != _sum(header):
            raise ValueError("its header does not have the checksum it was written with")
        if found[2] != _sum(path.stem.encode()):
            raise ValueError("it was written under another name")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise _damaged(path, error) from error
    return layout


def _damaged(path: Path, why: object) -> DamagedFileError:
    return DamagedFileError(f"{str(path)!r} is damaged ({why}); it can be written again")


def _header_of(file: Any) -> bytes:
    """All bytes before the numbers."""
    length = os.fstat(file.fileno()).st_size
    start: bytes = os.pread(file.fileno(), 8, 0)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > length - 8:
        raise ValueError(f"a header of {size} bytes in a file of {length}")
    return os.pread(file.fileno(), 8 + size, 0)


def _seal_of(file: Any, length: int) -> tuple[int, ...]:
    """Checksums of the header, of the numbers, and of the name."""
    return SEALED.unpack(os.pread(file.fileno(), SEALED.size, length - SEALED.size))


def _sum(content: bytes) -> int:
    return zlib.crc32(content)


def _sum_of(file: Any, begin: int, length: int) -> int:
    """Checksum of a file's numbers, without the seal."""
    found, end = 0, length - SEALED.size
    for at in range(begin, end, CHUNK):
        found = zlib.crc32(os.pread(file.fileno(), min(CHUNK, end - at), at), found)
    return found


@lru_cache(maxsize=256)
def _parsed(header: bytes) -> Layout:
    entries = json.loads(header[8:])
    metadata = json.loads(entries.pop("__metadata__")["bank"])
    if metadata["format"] != FORMAT:
        raise ValueError(f"format {metadata['format']!r}, this version reads {FORMAT!r}")
    begin, end = len(header), 0
    seal = entries.pop(SEAL)["data_offsets"]
    starts: dict[str, tuple[int, list[int], torch.dtype]] = {}
    for name, entry in entries.items():
        dtype, shape, (low, high) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if high - low != shape[0] * shape[1] * dtype.itemsize or (begin + low) % dtype.itemsize:
            raise ValueError(f"{name!r} has offsets {low} and {high} and shape {shape}")
        starts[name], end = (begin + low, shape, dtype), max(end, high)
    if seal != [end, end + SEALED.size]:
        raise ValueError(f"its seal has offsets {seal}, its numbers end at {end}")
    places = {}
    for module, scaling in metadata["scalings"].items():
        a, (rank, in_features), dtype = starts[f"{module}.a"]
        b, (rank_of_b, out_features), dtype_of_b = starts[f"{module}.b"]
        if (rank, dtype) != (rank_of_b, dtype_of_b):
            raise ValueError(f"A and B of {module!r} do not fit each other")
        places[module] = Place(a, b, rank, in_features, out_features, float(scaling), dtype)
    return Layout(MappingProxyType(places), begin, begin + seal[1])
