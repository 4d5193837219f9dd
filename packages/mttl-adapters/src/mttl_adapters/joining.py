"""Banks put together from others. They share the memory of those, and nothing is copied."""

from __future__ import annotations

from dataclasses import replace

import torch

from mttl_adapters.bank import Bank
from mttl_adapters.slabs import Run, TensorSlab


def padded(bank: Bank, before: int, after: int) -> Bank:
    """A bank with so many experts of rank 0 before and after its own."""
    return replace(
        bank,
        runs=(*[Run(0, 0, 0)] * before, *bank.runs, *[Run(0, 0, 0)] * after),
        scalings=(*[1.0] * before, *bank.scalings, *[1.0] * after),
    )


def appended(bank: Bank, other: Bank) -> Bank:
    """A bank and the experts of another after its own, in the first one's dtype and place."""
    if (bank.in_features, bank.out_features) != (other.in_features, other.out_features):
        raise ValueError(
            f"got a bank of {other.in_features} in and {other.out_features} out features; "
            f"this one has {bank.in_features} and {bank.out_features}"
        )
    other = _converted(other.to(bank.device), bank.dtype)
    shift = len(bank.slabs)
    moved = [run._replace(slab=run.slab + shift) for run in other.runs]
    return replace(
        bank,
        slabs=(*bank.slabs, *other.slabs),
        runs=(*bank.runs, *moved),
        scalings=(*bank.scalings, *other.scalings),
    )


def moved(bank: Bank, origin: int, index: int) -> Bank:
    """A bank with its expert at ``origin`` in the place of that at ``index``, which is gone."""
    runs, scalings = list(bank.runs), list(bank.scalings)
    runs[index], scalings[index] = runs[origin], scalings[origin]
    return replace(bank, runs=tuple(runs), scalings=tuple(scalings)).remove(origin)


def _converted(bank: Bank, dtype: torch.dtype) -> Bank:
    if bank.dtype == dtype:
        return bank
    slabs = [TensorSlab(slab.a.to(dtype), slab.b.to(dtype)) for slab in bank.slabs]
    return replace(bank, slabs=tuple(slabs), dtype=dtype)
