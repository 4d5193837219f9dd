"""One expert's factors in a mapped file: what is in it, and the slabs that banks read.

Of each module the rows of A (r, i), and of B (r, o), as safetensors. What is not exactly such a
file is a :class:`DamagedFileError`, and is not read.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mttl_adapters.bank import Factors

FORMAT = 1
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
    # One entry, because those of several are in no order.
    metadata = {"bank": json.dumps({"format": FORMAT, "scalings": scalings})}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        save_file(tensors, beside, metadata)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def places_of(path: Path) -> Mapping[str, Place]:
    """What a file's header says, by module path.

    Raises:
        FileNotFoundError: it is not here.
        DamagedFileError: its header or its length is wrong.
    """
    with path.open("rb") as file:
        return _layout_of(file, path).places


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
    start = file.read(8)
    size = int.from_bytes(start, "little")
    try:
        if len(start) < 8 or size > length - 8:
            raise ValueError(f"a header of {size} bytes in a file of {length}")
        layout = _parsed(file.read(size))
        if layout.size != length:
            raise ValueError(f"{length} bytes where the header says {layout.size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(
            f"{str(path)!r} is damaged ({error}); it can be written again"
        ) from error
    return layout


@lru_cache(maxsize=256)
def _parsed(header: bytes) -> Layout:
    entries = json.loads(header)
    metadata = json.loads(entries.pop("__metadata__")["bank"])
    if metadata["format"] != FORMAT:
        raise ValueError(f"format {metadata['format']!r}, this version reads {FORMAT!r}")
    begin, end = 8 + len(header), 0
    starts: dict[str, tuple[int, list[int], torch.dtype]] = {}
    for name, entry in entries.items():
        dtype, shape, (low, high) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if high - low != shape[0] * shape[1] * dtype.itemsize or (begin + low) % dtype.itemsize:
            raise ValueError(f"{name!r} has offsets {low} and {high} and shape {shape}")
        starts[name], end = (begin + low, shape, dtype), max(end, high)
    places = {}
    for module, scaling in metadata["scalings"].items():
        a, (rank, in_features), dtype = starts[f"{module}.a"]
        b, (rank_of_b, out_features), dtype_of_b = starts[f"{module}.b"]
        if (rank, dtype) != (rank_of_b, dtype_of_b):
            raise ValueError(f"A and B of {module!r} do not fit each other")
        places[module] = Place(a, b, rank, in_features, out_features, float(scaling), dtype)
    return Layout(MappingProxyType(places), begin + end)
