"""ΔW of a few experts at a time, for the methods that go entry by entry.

The factors of a few experts are multiplied in one batched product into one buffer, so memory does
not grow with their number. What thins an update works in place, on as many updates at once as torch
has threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mttl_routing.merges.rule import Update

Matrix = npt.NDArray[np.float32]
Thin = Callable[[Matrix, Update], object]

_ENTRIES = 2**23  # of a batch: 32 MiB, about what a processor's last cache holds
_BLOCK = 2**15  # entries of each expert that are summed up at a time


def dense_batches(
    updates: Sequence[Update], thin: Thin | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (e,) and ΔW (e, o·i) float32 of a few experts, then of the next few, in their order.

    Both are good until the next ones are asked for.

    Args:
        updates: of one module.
        thin: changes one ΔW, (o, i), in place; several run at once in threads.
    """
    shape = updates[0].shape
    most = max(1, min(len(updates), _ENTRIES // math.prod(shape)))
    buffer = torch.empty(most, *shape)
    with ThreadPoolExecutor(min(torch.get_num_threads(), most)) as pool:
        for start in range(0, len(updates), most):
            some = updates[start : start + most]
            delta = buffer[: len(some)]
            _multiply(some, delta)
            if thin is not None:
                list(pool.map(thin, delta.numpy(), some))
            yield torch.tensor([update.weight for update in some]), delta.flatten(1)


def _multiply(updates: Sequence[Update], out: Tensor) -> None:
    """Each ΔW into its place in ``out``; neighbours of one rank go together."""
    done = 0
    for _, group in itertools.groupby(updates, key=lambda update: update.factors.rank):
        same = list(group)
        a = torch.stack([update.factors.a.float() for update in same])  # (e, r, i)
        b = torch.stack([update.scaled_b for update in same])  # (e, o, r)
        torch.bmm(b, a, out=out[done : done + len(same)])
        done += len(same)


def dense_sum(updates: Sequence[Update], thin: Thin | None = None) -> Tensor:
    """Σ_e w_e ΔW_e of the thinned updates, (o, i) float32."""
    total = torch.zeros(updates[0].shape)
    for weights, delta in dense_batches(updates, thin):
        total.view(-1).addmv_(delta.T, weights)
    return total


def blocks(delta: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of (e, n) that are small enough to stay in cache: their columns, and the part."""
    for start in range(0, delta.shape[1], _BLOCK):
        columns = slice(start, min(start + _BLOCK, delta.shape[1]))
        yield columns, delta[:, columns]
