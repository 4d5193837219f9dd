"""Sums over experts in plain torch, on any device, differentiable by autograd.

Factors come as A (r, i) and B by rows, (r, o), one pair an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mttl_adapters.chosen import Chosen

Factors = Callable[[int], tuple[Tensor, Tensor, float]]

# Numbers that the copies of the sorted tokens may hold at a time, 24 MB of float32.
GATHERED = 6 * 2**20


def dense(x: Tensor, a: Tensor, b: Tensor, per_rank: Tensor) -> Tensor:
    """Two products over all ranks: x (t, i), A (R, i), B (R, o), gates of ranks (t, R or 1)."""
    hidden = x @ a.to(x.dtype).T  # (t, R)
    return (hidden * per_rank).to(x.dtype) @ b.to(x.dtype)


def before(x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scalings: Tensor) -> Tensor:
    """(Σ g s B)(Σ g A) x for experts of one rank: A (e r, i), B (e r, o), gates (t, e)."""
    hidden = (x @ a.to(x.dtype).T).unflatten(1, (gates.shape[1], -1))  # (t, e, r)
    mixed = (hidden * gates.unsqueeze(2)).sum(dim=1, keepdim=True)  # (t, 1, r)
    hidden = (mixed * (gates * scalings).unsqueeze(2)).flatten(1)  # (t, e r)
    return hidden.to(x.dtype) @ b.to(x.dtype)


def grouped(x: Tensor, factors: Factors, chosen: Chosen, out: Tensor) -> Tensor:
    """``out`` (t, o), added to by one pair of products for each expert that some token chose."""
    if chosen.tokens >= 16 and not out.requires_grad:
        return _by_rows(x, factors, chosen, out)
    chosen = chosen.each()
    if torch.is_grad_enabled():
        return _differentiable(x, factors, chosen, out)
    k = max(1, chosen.experts.shape[1])
    step = max(1, GATHERED // (k * max(x.shape[1], out.shape[1])))
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        _sorted(x[part], factors, chosen.experts[part], chosen.weights[part], out[part])
    return out


def sorted_pairs(experts: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Pairs (line, place) by expert: their flat indices, the experts met, and how many each has."""
    flat = experts.flatten()
    ordered, order = torch.sort(flat, stable=True)
    present, counts = torch.unique_consecutive(ordered, return_counts=True)
    found, sizes = present.tolist(), counts.tolist()
    if found and found[0] < 0:  # NONE comes first
        return order[sizes[0] :], found[1:], sizes[1:]
    return order, found, sizes


def _sorted(x: Tensor, factors: Factors, experts: Tensor, weights: Tensor, out: Tensor) -> None:
    order, found, sizes = sorted_pairs(experts)
    if not found:
        return
    dtype, token_of = x.dtype, order // experts.shape[1]
    scaled = weights.flatten()[order].unsqueeze(1)
    taken, start = x[token_of], 0
    updates = x.new_empty(len(order), out.shape[1])
    for expert, size in zip(found, sizes, strict=True):
        a, b, scaling = factors(expert)
        rows = slice(start, start := start + size)
        hidden = torch.mm(taken[rows], a.to(dtype).T)
        torch.mm((hidden * (scaled[rows] * scaling)).to(dtype), b.to(dtype), out=updates[rows])
    out.index_add_(0, token_of, updates.to(out.dtype))


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
