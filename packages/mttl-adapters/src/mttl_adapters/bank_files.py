"""Banks of experts that lie in files: mapped, read where a token needs them, and let go again.

One file an expert, under the digest of its weights, beside others of the same dtype. So adding or
replacing an expert writes that expert alone, any choice and order of experts shares the files, and
none is ever stale. They are derived: whoever deletes them loses only the time to write them again.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import re
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from safetensors.torch import save_file
from torch import Tensor

from mttl_adapters.bank import Bank, Factors, Run

# The system maps so much around a page that is read, so this is what is counted and let go.
GRAIN = 64 * 1024
# Of the bound, what stays when it was reached: so that each time a good part is let go at once.
KEPT = 0.75

_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class BankFiles:
    """Folder of experts as banks read them: per module A (r, i), and B by rows, (r, o).

    Args:
        folder: where the files go; in the user's cache by default.
        dtype: of the factors in them; bfloat16 takes half the memory of float32 and rounds each
            factor by at most 2^-8 of itself, which moves an expert's ΔW by about 0.2 % of its norm.
        resident_bytes: bound of what the mapped files take of this process's memory; None leaves
            that to the system, which takes it back when it needs it.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        resident_bytes: int | None = None,
    ) -> None:
        """Nothing is read or written yet."""
        if dtype not in _NAMES.values():
            raise TypeError(
                f"got {dtype}; experts are kept in {', '.join(map(str, _NAMES.values()))}"
            )
        name = str(dtype).removeprefix("torch.")
        self.folder = (folder or user_cache_path("mttl") / "banks") / name
        self.dtype = dtype
        self._resident = _Resident(resident_bytes) if resident_bytes is not None else None

    def __contains__(self, digest: str) -> bool:
        """Whether an expert is here."""
        return self._path(digest).exists()

    def add(self, digest: str, factors: Mapping[str, Factors]) -> None:
        """Write one expert, unless it is here; readers see all of it or nothing.

        Args:
            digest: of its weights; letters and digits.
            factors: a (r, i), b (o, r) and scaling of each module that it changes.
        """
        path = self._path(digest)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for module, (a, b, _) in factors.items():
            if a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"{module!r} has A {tuple(a.shape)} and B {tuple(b.shape)}; ranks must agree"
                )
            tensors[f"{module}.a"] = a.detach().to("cpu", self.dtype).contiguous()
            tensors[f"{module}.b"] = b.detach().T.to("cpu", self.dtype).contiguous()
        scalings = json.dumps(
            {module: float(scaling) for module, (_, _, scaling) in factors.items()}
        )
        beside = path.with_name(
            f".{path.name}.{next(_NUMBERS)}-{threading.get_ident()}-{os.getpid()}"
        )
        try:
            save_file(tensors, beside, metadata={"scalings": scalings})
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def add_all(self, experts: Iterable[tuple[str, Mapping[str, Factors]]]) -> None:
        """:meth:`add` each, one in memory at a time."""
        for digest, factors in experts:
            self.add(digest, factors)

    def banks(self, digests: Sequence[str]) -> dict[str, Bank]:
        """A bank for each module that some of the experts change, its experts in the order given.

        Nothing but the files' headers is read. An expert that leaves a module alone has rank 0.

        Raises:
            FileNotFoundError: an expert is not here.
        """
        files = [_File(self._path(digest)) for digest in digests]
        return {
            module: self._bank(module, files)
            for module in sorted({module for file in files for module in file.modules})
        }

    def _bank(self, module: str, files: Sequence[_File]) -> Bank:
        slabs: list[_MappedSlab] = []
        runs, scalings = [], []
        features: set[tuple[int, int]] = set()
        for file in files:
            if module not in file.modules:
                runs.append(Run(0, 0, 0))
                scalings.append(1.0)
                continue
            slab = _MappedSlab(file, module)
            features.add((slab.in_features, slab.out_features))
            runs.append(Run(len(slabs), 0, slab.rank))
            scalings.append(file.modules[module])
            slabs.append(slab)
        if len(features) > 1:
            raise ValueError(
                f"experts disagree on {module!r}: its (in, out) features are {sorted(features)!r}"
            )
        ((in_features, out_features),) = features
        bank = Bank(
            tuple(slabs),
            tuple(runs),
            tuple(scalings),
            in_features,
            out_features,
            self.dtype,
            self._resident,
        )
        if self._resident:
            self._resident.add(bank)
        return bank

    def _path(self, digest: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", digest):
            raise ValueError(f"{digest!r} is no digest: letters, digits, '-' and '_' name a file")
        return self.folder / f"{digest}.safetensors"


class _File:
    """One expert's file, mapped."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            # Private and never written to: the pages are the file's own.
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.begin = 8 + size
        self.modules: dict[str, float] = json.loads(header.pop("__metadata__")["scalings"])
        self.header = header
        self.address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()


class _MappedSlab:
    """One expert's rows in its file; tensors are made only for those who ask."""

    def __init__(self, file: _File, module: str) -> None:
        self.file = file
        self._a, self._b = file.header[f"{module}.a"], file.header[f"{module}.b"]
        self.rank, self.in_features = self._a["shape"]
        self.out_features = self._b["shape"][1]

    @cached_property
    def a(self) -> Tensor:
        return self._tensor(self._a)

    @cached_property
    def b(self) -> Tensor:
        return self._tensor(self._b)

    @property
    def pointers(self) -> tuple[int, int]:
        origin = self.file.address + self.file.begin
        return origin + self._a["data_offsets"][0], origin + self._b["data_offsets"][0]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Offsets in the file, in whole grains, that reading the rows may bring into memory."""
        spans = []
        for entry in (self._a, self._b):
            start, end = (self.file.begin + offset for offset in entry["data_offsets"])
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

    def _tensor(self, entry: dict[str, Any]) -> Tensor:
        shape, dtype = entry["shape"], _NAMES[str(entry["dtype"])]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        count = shape[0] * shape[1]
        offset = self.file.begin + entry["data_offsets"][0]
        return torch.frombuffer(self.file.memory, dtype=dtype, count=count, offset=offset).view(
            shape
        )


class _Resident:
    """Lets go of the experts that no token has needed for longest, once too much is in memory."""

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"resident_bytes is {limit!r}; it takes 0 or more")
        self.limit = limit
        self._banks: weakref.WeakSet[Bank] = weakref.WeakSet()
        self._held = 0
        self._ticks = itertools.count(1)
        self._lock = threading.Lock()

    def add(self, bank: Bank) -> None:
        self._banks.add(bank)

    def tick(self) -> int:
        return next(self._ticks)

    def grown(self, bank: Bank, n_experts: int) -> None:
        """Count what was read for the first time; other threads may read on in what is let go."""
        with self._lock:
            self._banks.add(bank)  # one with an expert more or less than those of the files
            self._held += n_experts * _largest(bank)
            if self._held > self.limit:
                self._let_go()

    def _let_go(self) -> None:
        banks = list(self._banks)
        used = [(bank, bank.table[:, 3]) for bank in banks]
        held = sorted(
            (tick, number, expert)
            for number, (_, ticks) in enumerate(used)
            for expert, tick in enumerate(ticks.tolist())
            if tick > 0
        )
        self._held = sum(_size(banks[number], expert) for _, number, expert in held)
        for _, number, expert in held:
            if self._held <= self.limit * KEPT:
                break
            bank, ticks = used[number]
            ticks[expert] = 0
            self._held -= _size(bank, expert)
            slab = bank.slabs[bank.runs[expert].slab]
            if isinstance(slab, _MappedSlab):
                slab.let_go()


def _size(bank: Bank, expert: int) -> int:
    slab = bank.slabs[bank.runs[expert].slab]
    if bank.runs[expert].rank == 0 or not isinstance(slab, _MappedSlab):
        return 0
    return sum(high - low for low, high in slab.spans)


def _largest(bank: Bank) -> int:
    """What one expert of the bank takes at most: its rows and a grain at each end, twice."""
    return bank.widest * (bank.in_features + bank.out_features) * bank.dtype.itemsize + 4 * GRAIN


_NUMBERS = itertools.count()


__all__ = ["BankFiles"]
