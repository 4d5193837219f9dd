"""Sums over experts in plain torch, on any device, differentiable by autograd.

What ``rows.py`` cannot do: gradients, experts in several slabs, factors of another dtype than x.

Factors come as A (r, i) and B by rows, (r, o), one pair an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mttl_adapters.chosen import Chosen

Factors = Callable[[int], tuple[Tensor, Tensor, float]]

# Pairs of token and expert that are worked on at a time: what they need stays in the caches, and
# is too small for the allocator to fetch it from the system anew, page by page.
PAIRS = 512
# Tokens of a line of one choice from which on they are taken as they lie.
LINE = 16


def dense(x: Tensor, a: Tensor, b: Tensor, per_rank: Tensor, out: Tensor | None = None) -> Tensor:
    """Two products over all ranks: x (t, i), A (R, i), B (R, o), gates of ranks (t, R or 1).

    Returns:
        (t, o); ``out`` itself, with them added, where it is given, of the dtype of x.
    """
    hidden = x @ a.to(x.dtype).T  # (t, R)
    hidden = (hidden * per_rank).to(x.dtype)
    return hidden @ b.to(x.dtype) if out is None else out.addmm_(hidden, b.to(x.dtype))


def before(x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scalings: Tensor) -> Tensor:
    """(Σ g s B)(Σ g A) x for experts of one rank: A (e r, i), B (e r, o), gates (t, e).

    Gates (t, q, e) are apart for q equal slices of the input, which A reads, and of the output,
    which B writes.
    """
    t, e = len(x), gates.shape[-1]
    q = gates.shape[1] if gates.dim() == 3 else 1
    gates = gates.reshape(t, q, e, 1).transpose(0, 1)  # (q, t, e, 1)
    slices = x.reshape(t, q, x.shape[1] // q).transpose(0, 1)  # (q, t, i/q)
    a = a.to(x.dtype).reshape(len(a), q, x.shape[1] // q).permute(1, 2, 0)
    hidden = (slices @ a).view(q, t, e, a.shape[2] // e)  # (q, t, e, r)
    mixed = (hidden * gates).sum(dim=(0, 2), keepdim=True)  # (1, t, 1, r)
    hidden = (mixed * (gates * scalings.unsqueeze(1))).flatten(2)  # (q, t, e r)
    b = b.to(x.dtype).reshape(len(b), q, b.shape[1] // q).transpose(0, 1)
    out = hidden.to(x.dtype) @ b  # (q, t, o/q)
    return out.transpose(0, 1).flatten(1)


def grouped(x: Tensor, factors: Factors, chosen: Chosen, out: Tensor) -> Tensor:
    """``out`` (t, o), added to by one pair of products for each expert that some token chose."""
    if chosen.tokens >= LINE and not out.requires_grad:
        return _by_rows(x, factors, chosen, out)
    chosen = chosen.each()
    if torch.is_grad_enabled():
        return _differentiable(x, factors, chosen, out)
    order, found, sizes = sorted_pairs(chosen.experts)
    k, weights = chosen.experts.shape[1], chosen.weights.flatten()
    for block in _blocks(found, sizes):
        pairs = order[block[0].start : block[-1].stop]
        token_of = pairs // max(1, k)
        taken = x.index_select(0, token_of)
        scaled = weights.index_select(0, pairs).unsqueeze(1)
        updates = x.new_empty(len(pairs), out.shape[1])
        for expert, start, stop in block:
            rows = slice(start - block[0].start, stop - block[0].start)
            a, b, scaling = factors(expert)
            hidden = torch.mm(taken[rows], a.to(x.dtype).T)
            hidden = (hidden * (scaled[rows] * scaling)).to(x.dtype)
            torch.mm(hidden, b.to(x.dtype), out=updates[rows])
        out.index_add_(0, token_of, updates.to(out.dtype))
    return out


class _Part(NamedTuple):
    """Some of the sorted pairs of one expert."""

    expert: int
    start: int
    stop: int


def _blocks(found: list[int], sizes: list[int]) -> Iterator[list[_Part]]:
    """The sorted pairs in parts of one expert each, as many parts at a time as make PAIRS."""
    block: list[_Part] = []
    place = 0
    for expert, size in zip(found, sizes, strict=True):
        for start in range(place, place + size, PAIRS):
            part = _Part(expert, start, min(start + PAIRS, place + size))
            if block and part.stop - block[0].start > PAIRS:
                yield block
                block = []
            block.append(part)
        place += size
    if block:
        yield block


def sorted_pairs(experts: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Pairs (line, place) by expert: their flat indices, the experts met, and how many each has."""
    flat = experts.flatten()
    ordered, order = torch.sort(flat, stable=True)
    present, counts = torch.unique_consecutive(ordered, return_counts=True)
    found, sizes = present.tolist(), counts.tolist()
    if found and found[0] < 0:  # NONE comes first
        return order[sizes[0] :], found[1:], sizes[1:]
    return order, found, sizes


def _by_rows(x: Tensor, factors: Factors, chosen: Chosen, out: Tensor) -> Tensor:
    """Lines of many tokens lie together in memory, so that nothing is gathered."""
    dtype = x.dtype
    for line, experts in enumerate(chosen.experts.tolist()):
        rows = slice(line * chosen.tokens, (line + 1) * chosen.tokens)
        for place, expert in enumerate(experts):
            if expert < 0:
                continue
            a, b, scaling = factors(expert)
            hidden = x[rows] @ a.to(dtype).T * (chosen.weights[line, place] * scaling)
            if torch.is_grad_enabled() or out.dtype != dtype:
                out[rows] += hidden.to(dtype) @ b.to(dtype)
            else:
                out[rows].addmm_(hidden.to(dtype), b.to(dtype))
    return out


def _differentiable(x: Tensor, factors: Factors, chosen: Chosen, out: Tensor) -> Tensor:
    order, found, sizes = sorted_pairs(chosen.experts)
    weights = chosen.weights.flatten()
    pairs = torch.split(order, sizes) if found else ()
    for expert, mine in zip(found, pairs, strict=True):
        a, b, scaling = factors(expert)
        if a.shape[0] == 0:
            continue
        token_of = mine // chosen.experts.shape[1]
        hidden = x[token_of] @ a.to(x.dtype).T  # (chosen t, r)
        hidden = (hidden * (weights[mine].unsqueeze(1) * scaling)).to(x.dtype)
        out = out.index_add(0, token_of, (hidden @ b.to(x.dtype)).to(out.dtype))
    return out
