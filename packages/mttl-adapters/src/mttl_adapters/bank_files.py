"""Banks of experts that lie in files: mapped, read where a token needs them, and let go again.

One file an expert, under the digest of its weights, beside others of the same dtype. So adding or
replacing an expert writes that expert alone, any choice and order of experts shares the files, and
none is ever stale. They are derived: whoever deletes them loses only the time to write them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from platformdirs import user_cache_path

from mttl_adapters.bank import Bank
from mttl_adapters.layer_factors import Factors
from mttl_adapters.mapped import (
    DTYPES,
    DamagedFileError,
    MappedFile,
    MappedSlab,
    check_numbers,
    places_of,
    write,
)
from mttl_adapters.resident import Bound
from mttl_adapters.slabs import Run


class BankFiles:
    """Folder of experts as banks read them.

    Args:
        folder: where the files go; in the user's cache by default.
        dtype: of the factors in them; bfloat16 takes half the memory of float32 and rounds each
            factor by at most 2^-8 of itself, which moves an expert's ΔW by about 0.2 % of its norm.
        resident_bytes: bound of what the mapped files take of this process's memory; None leaves
            that to the system, which takes it back when it needs it.
        verify: read all of each file once, when it is first asked for, and compare its checksum.
            False looks at headers, lengths and names alone, which notices a file that was cut off
            or exchanged, but no number that changed on the disk.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        resident_bytes: int | None = None,
        verify: bool = True,
    ) -> None:
        """Nothing is read or written yet."""
        if dtype not in DTYPES.values():
            raise TypeError(
                f"got {dtype}; experts are kept in {', '.join(map(str, DTYPES.values()))}"
            )
        name = str(dtype).removeprefix("torch.")
        self.folder = Path(folder or user_cache_path("mttl") / "banks") / name
        self.dtype = dtype
        self.verify = verify
        self._bound = Bound(resident_bytes)
        self._verified: dict[str, tuple[int, ...]] = {}

    def __contains__(self, digest: str) -> bool:
        """Whether an expert is here, in a file that is whole."""
        try:
            self._check(digest)
        except (FileNotFoundError, DamagedFileError):
            return False
        return True

    def add(self, digest: str, factors: Mapping[str, Factors]) -> None:
        """Write one expert, unless it is here; readers see all of it or nothing.

        Args:
            digest: of its weights; letters and digits.
            factors: a (r, i), b (o, r) and scaling of each module that it changes.
        """
        if digest not in self:
            write(self._path(digest), factors, self.dtype)

    def add_all(self, experts: Iterable[tuple[str, Mapping[str, Factors]]]) -> None:
        """:meth:`add` each, one in memory at a time."""
        for digest, factors in experts:
            self.add(digest, factors)

    def features(self, digest: str) -> dict[str, tuple[int, int]]:
        """(out, in) features of each module of an expert that is here; errors as :meth:`banks`."""
        places = places_of(self._path(digest))
        return {module: (at.out_features, at.in_features) for module, at in places.items()}

    def banks(self, digests: Sequence[str]) -> dict[str, Bank]:
        """A bank for each module that some of the experts change, its experts in the order given.

        Nothing is kept in memory but the files' headers. An expert that leaves a module alone has
        rank 0.

        Raises:
            FileNotFoundError: an expert is not here.
            DamagedFileError: it is, but not whole; ``add`` writes it again.
        """
        for digest in digests:
            self._check(digest)
        files = [MappedFile(self._path(digest)) for digest in digests]
        for file in files:
            self._bound.watch(file)
        return {
            module: self._bank(module, files)
            for module in sorted({module for file in files for module in file.places})
        }

    def let_go(self) -> None:
        """Take all that was read of the files out of this process's memory; it comes back."""
        self._bound.let_go()

    def _check(self, digest: str) -> None:
        path = self._path(digest)
        places_of(path)
        if not self.verify:
            return
        seen = path.stat()
        stamp = seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns
        if self._verified.get(digest) != stamp:
            check_numbers(path)
            self._verified[digest] = stamp

    def _bank(self, module: str, files: Sequence[MappedFile]) -> Bank:
        slabs: list[MappedSlab] = []
        runs, scalings = [], []
        features: set[tuple[int, int]] = set()
        for file in files:
            place = file.places.get(module)
            if place is None:
                runs.append(Run(0, 0, 0))
                scalings.append(1.0)
                continue
            features.add((place.in_features, place.out_features))
            runs.append(Run(len(slabs), 0, place.rank))
            scalings.append(place.scaling)
            slabs.append(MappedSlab(file, place))
        if len(features) > 1:
            raise ValueError(
                f"experts disagree on {module!r}: its (in, out) features are {sorted(features)!r}"
            )
        ((in_features, out_features),) = features
        return Bank(
            tuple(slabs),
            tuple(runs),
            tuple(scalings),
            in_features,
            out_features,
            self.dtype,
            self._bound,
        )

    def _path(self, digest: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", digest):
            raise ValueError(f"{digest!r} is no digest: letters, digits, '-' and '_' name a file")
        return self.folder / f"{digest}.safetensors"


__all__ = ["BankFiles"]
