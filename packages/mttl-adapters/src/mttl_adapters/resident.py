"""Keeps what mapped banks take of this process's memory within a bound."""

from __future__ import annotations

import itertools
import math
import threading
import weakref

import torch
from torch import Tensor

from mttl_adapters.bank import Bank
from mttl_adapters.mapped import GRAIN, MappedFile, MappedSlab

# Of the bound, what stays when it was reached: so that each time a good part is let go at once.
KEPT = 0.75


class Bound:
    """Lets go of the experts that no token has needed for longest, once too much is in memory.

    Args:
        limit: bytes; None is no bound, and the system takes memory back when it needs it.
    """

    def __init__(self, limit: int | None) -> None:
        """Nothing is in memory yet."""
        if limit is not None and limit < 0:
            raise ValueError(f"resident_bytes is {limit!r}; it takes 0 or more")
        self.limit = math.inf if limit is None else limit
        self._banks: weakref.WeakSet[Bank] = weakref.WeakSet()
        self._files: weakref.WeakSet[MappedFile] = weakref.WeakSet()
        self._sizes: weakref.WeakKeyDictionary[Bank, Tensor] = weakref.WeakKeyDictionary()
        self._held = 0
        self._ticks = itertools.count(1)
        self._lock = threading.Lock()

    def watch(self, file: MappedFile) -> None:
        """Let go of this file too, when all is let go."""
        with self._lock:
            self._files.add(file)

    def tick(self) -> int:
        """A number above 0 that grows."""
        return next(self._ticks)

    def grown(self, bank: Bank, n_experts: int) -> None:
        """Count what was read for the first time; other threads may read on in what is let go."""
        with self._lock:
            self._banks.add(bank)
            self._held += n_experts * _largest(bank)
            if self._held > self.limit:
                self._let_go_of_oldest()

    def let_go(self) -> None:
        """Take everything out of this process's memory, and count anew."""
        with self._lock:
            for bank in self._banks:
                bank.table[:, 3] = 0
            for file in self._files:
                file.let_go()
            self._held = 0

    def _let_go_of_oldest(self) -> None:
        banks = list(self._banks)
        ticks = torch.cat([bank.table[:, 3] for bank in banks])
        sizes = torch.cat([self._sizes_of(bank) for bank in banks])
        places = torch.cat([torch.arange(len(bank)) for bank in banks])
        numbers = torch.arange(len(banks)).repeat_interleave(
            torch.tensor([len(bank) for bank in banks])
        )
        held = torch.nonzero(ticks).flatten()
        held = held[ticks[held].argsort()]  # the oldest first
        left = sizes[held].sum() - sizes[held].cumsum(0)
        n_gone = min(len(held), int((left > self.limit * KEPT).sum()) + 1)
        for number, expert in zip(
            numbers[held[:n_gone]].tolist(), places[held[:n_gone]].tolist(), strict=True
        ):
            bank = banks[number]
            bank.table[expert, 3] = 0
            slab = bank.slabs[bank.runs[expert].slab]
            if isinstance(slab, MappedSlab):
                slab.let_go()
        self._held = int(left[n_gone - 1]) if n_gone else 0

    def _sizes_of(self, bank: Bank) -> Tensor:
        """(e,) bytes that each expert takes once it is read."""
        if bank not in self._sizes:
            self._sizes[bank] = torch.tensor([_size(bank, expert) for expert in range(len(bank))])
        return self._sizes[bank]


def _size(bank: Bank, expert: int) -> int:
    slab = bank.slabs[bank.runs[expert].slab]
    if bank.runs[expert].rank == 0 or not isinstance(slab, MappedSlab):
        return 0
    return sum(high - low for low, high in slab.spans)


def _largest(bank: Bank) -> int:
    """What one expert of the bank takes at most: its rows and a grain at each end, twice."""
    return bank.widest * (bank.in_features + bank.out_features) * bank.dtype.itemsize + 4 * GRAIN
