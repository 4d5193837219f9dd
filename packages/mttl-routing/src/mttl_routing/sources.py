"""Where the banks of a routed model come from: copied into memory, or mapped from files.

Either way experts of a library are read one after the other and let go of, so that no factor is in
memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mttl_adapters import BankFiles
from mttl_adapters.bank import Bank
from mttl_adapters.finite import is_finite
from mttl_adapters.slabs import Run, TensorSlab
from mttl_experts import Expert, UnsupportedAdapterError, lora_modules
from mttl_routing.cohort import check_features

# Experts that are read at a time.
_WORKERS = 4


class Source(Protocol):
    """Makes banks of experts."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the factors; None is the experts' own."""

    def banks(self, experts: Sequence[Expert]) -> dict[str, Bank]:
        """A bank for each module that some expert adapts, by path, sorted.

        One that leaves a module alone has rank 0 there.

        Raises:
            UnsupportedAdapterError: an expert is no plain LoRA, or has weights that are not finite.
            IncompatibleExpertError: a module has another shape in one expert than in another.
        """

    def changed(self) -> None:
        """Told after experts came or went."""


def source_of(bank_files: BankFiles | None, dtype: torch.dtype | None) -> Source:
    """The files, or else this process's memory."""
    if bank_files is None:
        return InMemory(dtype)
    if dtype not in (None, bank_files.dtype):
        raise ValueError(
            f"got dtype {dtype} and bank files of {bank_files.dtype}; give the files the dtype"
        )
    return InFiles(bank_files)


class InMemory:
    """Copies each module's factors into one slab."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        """Keep the dtype; None is the widest that the experts have for a module."""
        self.dtype = dtype

    def banks(self, experts: Sequence[Expert]) -> dict[str, Bank]:
        """See :class:`Source`; gradients reach factors that want them."""
        with ThreadPoolExecutor(_WORKERS) as pool:  # a library verifies what it reads first
            shapes = list(pool.map(_shapes_of, experts))
        check_features(experts, [{m: s.features for m, s in own.items()} for own in shapes])
        alike: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        banks = {
            module: self._room([own.get(module) for own in shapes], alike)
            for module in sorted(set().union(*shapes))
        }
        for column, expert in enumerate(experts):
            for module, factors in lora_modules(expert.unread()).items():
                bank = banks[module]
                _, start, rank = bank.runs[column]
                a, b = (part[start : start + rank] for part in (bank.slabs[0].a, bank.slabs[0].b))
                a[:], b[:] = factors.a, factors.b.T
                _check_finite(expert, module, a, b)
        return banks

    def changed(self) -> None:
        """Nothing is to be done."""

    def _room(
        self, column: Sequence[_Shape | None], alike: dict[tuple[Any, ...], tuple[Any, ...]]
    ) -> Bank:
        """A bank whose factors are still to be written; it shares what is ``alike`` in others."""
        some = [shape for shape in column if shape is not None]
        ranks = [0 if shape is None else shape.rank for shape in column]
        dtype, device, (out_features, in_features) = self.dtype, some[0].device, some[0].features
        if dtype is None:
            dtype = some[0].dtype
            for shape in some[1:]:
                dtype = torch.promote_types(dtype, shape.dtype)
        slab = TensorSlab(
            *(torch.empty(sum(ranks), width, dtype=dtype, device=device)
              for width in (in_features, out_features))
        )  # fmt: skip
        starts = accumulate(ranks, initial=0)
        runs = tuple(Run(0, start, rank) for start, rank in zip(starts, ranks, strict=False))
        scalings = tuple(1.0 if shape is None else shape.scaling for shape in column)
        return Bank(
            (slab,),
            alike.setdefault(runs, runs),
            alike.setdefault(scalings, scalings),
            in_features,
            out_features,
            dtype,
        )


class InFiles:
    """Maps files, and writes those that are not there."""

    def __init__(self, files: BankFiles) -> None:
        """Keep the files."""
        self.files = files

    @property
    def dtype(self) -> torch.dtype:
        """That of the files."""
        return self.files.dtype

    def banks(self, experts: Sequence[Expert]) -> dict[str, Bank]:
        """See :class:`Source`."""
        with ThreadPoolExecutor(_WORKERS) as pool:
            digests = list(pool.map(self._written, experts))
        check_features(experts, [self.files.features(digest) for digest in digests])
        return self.files.banks(digests)

    def changed(self) -> None:
        """Count anew what is in memory: the banks that it was counted for are gone."""
        self.files.let_go()

    def _written(self, expert: Expert) -> str:
        digest = expert.digest
        if digest not in self.files:
            factors = lora_modules(expert.unread())
            for module, f in factors.items():
                _check_finite(expert, module, f.a.to(self.dtype), f.b.to(self.dtype))
            self.files.add(digest, {path: (f.a, f.b, f.scaling) for path, f in factors.items()})
        return digest


def _check_finite(expert: Expert, module: str, a: Tensor, b: Tensor) -> None:
    """Refuse an expert that would spoil the tokens of others, while its rows are in the caches."""
    for name, factor in (("lora_A", a), ("lora_B", b)):
        if not is_finite(factor):
            raise UnsupportedAdapterError(
                f"expert {expert.name!r} has a NaN or infinite number in {name} of module "
                f"{module!r}, as {factor.dtype}; leave it out"
            )


class _Shape(NamedTuple):
    """All of a module's factors but their numbers."""

    features: tuple[int, int]
    rank: int
    scaling: float
    dtype: torch.dtype
    device: torch.device


def _shapes_of(expert: Expert) -> Mapping[str, _Shape]:
    return {
        module: _Shape(
            (f.b.shape[0], f.a.shape[1]),
            f.a.shape[0],
            f.scaling,
            torch.promote_types(f.a.dtype, f.b.dtype),
            f.a.device,
        )
        for module, f in lora_modules(expert.unread()).items()
    }
