"""Merges on the sphere of directions: slerp of two updates, and the average of any number.

The direction and the length of the result are found apart. Both need no more than the inner
products of the updates, so ΔW is never formed, and the result is a sum of the updates as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mttl_experts import IncompatibleExpertError
from mttl_routing.merges.linear import linear
from mttl_routing.merges.rule import LowRank, Update

_EPSILON = float(torch.finfo(torch.float32).eps)
# The angle to the opposite under which float32 leaves less than half of a direction's digits.
_LEAST_ANGLE = math.sqrt(_EPSILON)
_MOST_ROUNDS = 10_000
_TOLERANCE = 1e-10  # radians

# From cosines (e, e) and shares (e,) of one, both float64, to what each direction counts.
Average = Callable[[Tensor, Tensor], Tensor]


class _NoAverageError(Exception):
    """Why there is no average direction."""


def slerp(updates: Sequence[Update]) -> LowRank:
    """Spherical linear interpolation of one or two updates, at the mean of their lengths.

    Shoemake 1985 (https://doi.org/10.1145/325334.325242) for the direction, a point on the arc
    between the two; the second one's share is how far. The length is Σ w_e ‖ΔW_e‖, so that updates
    of one direction give their weighted mean. A ΔW of zero has no direction; the other's is kept.

    Args:
        updates: of one module, with shares of one as weights.

    Raises:
        IncompatibleExpertError: for opposite updates, between which no way is the shortest.
    """
    return _at_mean_length(updates, "slerp", arc_point)


def multislerp(updates: Sequence[Update]) -> LowRank:
    """Spherical average of the updates' directions, at the mean of their lengths.

    The point with the least weighted sum of squared distances along the sphere, by Algorithm A1 of
    Buss and Fillmore 2001 (https://doi.org/10.1145/502122.502124). It is unique where all
    directions are within one half of the sphere; elsewhere it is the one that the algorithm comes
    to. Of two updates it is :func:`slerp`, whose lengths it has too.

    Args:
        updates: of one module, with shares of one as weights.

    Raises:
        IncompatibleExpertError: for directions that cancel out, or of which one is opposite to the
            average of all.
    """
    return _at_mean_length(updates, "multislerp", average_point)


def gram(updates: Sequence[Update]) -> Tensor:
    """Inner products ⟨ΔW_e, ΔW_f⟩, (e, e) float64, from (r, r) products of their factors."""
    a = torch.cat([update.factors.a.double() for update in updates])  # (Σr, i)
    b = torch.cat([update.scaled_b.double() for update in updates], dim=1).T  # (Σr, o)
    ranks = torch.tensor([update.factors.a.shape[0] for update in updates])
    owner = torch.repeat_interleave(torch.arange(len(updates)), ranks)
    upper = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    start = 0
    for row, rank in zip(upper, ranks.tolist(), strict=True):
        own = slice(start, start + rank)
        products = (b[own] @ b[start:].T) * (a[own] @ a[start:].T)
        row.index_add_(0, owner[start:], products.sum(dim=0))
        start += rank
    return upper.triu(1).T + upper


def arc_point(cosines: Tensor, shares: Tensor) -> Tensor:
    """Slerp of two directions in terms of both: sin(w_e θ) / sin θ for each.

    As a quotient of two sinc(x) = sin(x)/x it has its limit at θ = 0, the shares, without a branch.
    """
    angles = _angles(cosines[0, 1])
    counts: Tensor = shares * torch.sinc(shares * angles / math.pi) / torch.sinc(angles / math.pi)
    return counts


def average_point(cosines: Tensor, shares: Tensor) -> Tensor:
    """Spherical average in terms of the directions.

    Args:
        cosines: of the angles between them, (e, e) float64.
        shares: (e,) float64.
    """
    values, vectors = torch.linalg.eigh(cosines)
    points = vectors * values.clamp(min=0.0).sqrt()  # (e, e): a row for each, in their span
    counts: Tensor = shares.clone()
    if float((counts @ points).norm()) < _LEAST_ANGLE:
        raise _NoAverageError("cancel out")
    for _ in range(_MOST_ROUNDS):
        counts = counts / (counts @ points).norm()
        heights = points @ (counts @ points)
        # Each point as seen from the average: log_q(p) = (p - (p·q) q) θ / sin θ.
        pulls = shares / torch.sinc(_angles(heights) / math.pi)
        step = pulls - (pulls @ heights) * counts
        length = (step @ points).norm()
        if float(length) < _TOLERANCE:
            return counts
        counts = length.cos() * counts + torch.sinc(length / math.pi) * step
    raise _NoAverageError("have no average that could be found")


def _angles(cosines: Tensor) -> Tensor:
    angles = torch.arccos(cosines.clamp(-1.0, 1.0))
    if float(angles.max()) > math.pi - _LEAST_ANGLE:
        raise _NoAverageError("are opposite")
    return angles


def _at_mean_length(updates: Sequence[Update], method: str, average: Average) -> LowRank:
    products = gram(updates)
    lengths = products.diagonal().clamp(min=0.0).sqrt()
    weights = torch.tensor([update.weight for update in updates], dtype=torch.float64)
    length = weights @ lengths
    chosen = torch.nonzero(weights * lengths).flatten()  # those that have a direction, and a say
    coefficients = torch.zeros_like(weights)
    if len(chosen) == 1:
        coefficients[chosen] = weights[chosen]
    elif len(chosen) > 1:
        lengths, shares = lengths[chosen], weights[chosen] / weights[chosen].sum()
        cosines = products[chosen][:, chosen] / lengths.outer(lengths)
        try:
            coefficients[chosen] = length * average(cosines, shares) / lengths
        except _NoAverageError as why:
            raise IncompatibleExpertError(
                f"{method}: directions {why} in module {updates[0].module!r}; give other weights, "
                "or take 'uniform'"
            ) from None
    return linear(
        [
            replace(update, weight=coefficient)
            for update, coefficient in zip(updates, coefficients.tolist(), strict=True)
        ]
    )
