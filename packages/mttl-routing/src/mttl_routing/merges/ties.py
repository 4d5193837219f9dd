"""TIES (https://arxiv.org/abs/2306.01708): trim, elect a sign, and average what agrees with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mttl_routing.merges.dense import Matrix, Thin, blocks, dense_batches
from mttl_routing.merges.rule import Update, check_share
from mttl_routing.merges.selection import nth_largest


def trim(delta: Matrix, density: float) -> None:
    """Set all but the ``density`` share of largest entries to zero, in place.

    Entries as large as the least one kept are kept too, so nothing depends on their order; zeros
    are never counted as kept, so there may be fewer.
    """
    magnitude = np.abs(delta)
    least = nth_largest(magnitude.ravel(), max(1, round(density * delta.size)))
    np.multiply(delta, magnitude >= least, out=delta)


def agreement(updates: Sequence[Update], method: str, thin: Thin) -> Tensor:
    """Mean, entry by entry, of the updates that have the elected sign there; (o, i) float32.

    The sign of an entry is that of the weighted sum of the thinned updates, and where that sum is
    zero so is the result. The result is the weighted mean over the experts whose thinned entry has
    the elected sign; with equal weights that is the TIES paper's disjoint mean.

    Args:
        updates: with weights above zero.
        method: its name, for errors.
        thin: sets some entries of an update's ΔW to zero, in place.
    """
    for update in updates:
        if update.weight <= 0.0:
            raise ValueError(f"{method} takes weights above zero, got {update.weight!r}")
    # Sums and total weights of the entries above and below zero: one pass over the experts, and no
    # more memory for more of them.
    sums = torch.zeros(4, math.prod(updates[0].shape))
    for weights, delta in dense_batches(updates, thin):
        for columns, part in blocks(delta):
            above, weight_above, below, weight_below = sums[:, columns]
            side = part.clamp(min=0.0)
            above.addmv_(side.T, weights)
            weight_above.addmv_(side.sign_().T, weights)
            torch.clamp(part, max=0.0, out=side)
            below.addmv_(side.T, weights)
            weight_below.addmv_(side.sign_().T, weights)
    above, weight_above, below, weight_below = sums
    weight_below.neg_()
    tiny = torch.finfo(torch.float32).tiny
    elected = above + below
    merged = torch.where(
        elected > 0.0, above / weight_above.clamp(min=tiny), below / weight_below.clamp(min=tiny)
    )
    return torch.where(elected == 0.0, 0.0, merged).view(updates[0].shape)


def ties(updates: Sequence[Update], *, density: float = 0.2) -> Tensor:
    """TIES merge of one module's ΔW, (o, i) float32.

    The paper trims each expert's whole task vector; here each module is trimmed apart, as other
    tools do, so that modules can be streamed. Its λ is the merge's ``scale``.

    Args:
        updates: with weights above zero.
        density: share of entries kept, in (0, 1].
    """
    check_share("density", density)
    return agreement(updates, "ties", lambda delta, _: trim(delta, density))
