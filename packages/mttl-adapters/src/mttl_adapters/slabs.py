"""Memory that the experts of a bank lie in, and where each lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mttl_adapters.bank import Bank


class Slab(Protocol):
    """Memory with the rows of some experts, one below another."""

    @property
    def a(self) -> Tensor:
        """(R, i)."""

    @property
    def b(self) -> Tensor:
        """(R, o), B by rows."""

    @property
    def pointers(self) -> tuple[int, int]:
        """Where the two begin."""


@dataclass(frozen=True, eq=False)
class TensorSlab:
    """A slab of two tensors."""

    a: Tensor
    b: Tensor

    @property
    def pointers(self) -> tuple[int, int]:
        """Where the two begin."""
        return self.a.data_ptr(), self.b.data_ptr()


class Resident(Protocol):
    """Keeps the memory of banks within bounds; told what is read."""

    def tick(self) -> int:
        """A number above 0 that grows."""

    def grown(self, bank: Bank, n_experts: int) -> None:
        """So many experts of the bank were read that no one had read before."""


class Run(NamedTuple):
    """Where an expert's rows lie."""

    slab: int
    start: int
    rank: int


def stacked(parts: Sequence[Tensor], runs: Sequence[Run]) -> Tensor:
    """(R, n), the rows of every run below one another: a part itself where they lie so already."""
    kept = [run for run in runs if run.rank]
    if not kept:
        return parts[0][:0]
    starts = accumulate((run.rank for run in kept), initial=0)
    first = kept[0].slab
    if all(run[:2] == (first, start) for run, start in zip(kept, starts, strict=False)):
        total = kept[-1].start + kept[-1].rank
        if parts[first].shape[0] == total:
            return parts[first]
    return torch.cat([parts[slab][start : start + rank] for slab, start, rank in kept])
