"""TIES (https://arxiv.org/abs/2306.01708): trim, elect a sign, and average what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mttl_routing.merges.rule import Update


def trimmed(delta: Tensor, density: float) -> Tensor:
    """``delta`` with all but its ``density`` share of largest entries set to zero.

    Entries as large as the least one kept are kept too, so nothing depends on their order; zeros
    are never counted as kept, so there may be fewer.
    """
    keep = max(1, round(density * delta.numel()))
    magnitude = delta.abs()
    threshold = magnitude.flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(magnitude >= threshold, delta, 0.0)


def ties(updates: Sequence[Update], *, density: float = 0.2) -> Tensor:
    """TIES merge of one module's ΔW, (o, i) float32.

    The paper trims each expert's whole task vector; here each module is trimmed apart, as other
    tools do, so that modules can be streamed. The sign of an entry is that of the weighted sum of
    the trimmed updates, and where that sum is zero so is the result. The result is the weighted
    mean over the experts whose trimmed entry has the elected sign; with equal weights that is the
    paper's disjoint mean. Its λ is 1.

    Args:
        updates: with weights above zero.
        density: share of entries kept, in (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is {density!r}; it takes a share in (0, 1], such as 0.2")
    for update in updates:
        if update.weight <= 0.0:
            raise ValueError(f"ties takes weights above zero, got {update.weight!r}")
    shape = (updates[0].factors.b.shape[0], updates[0].factors.a.shape[1])
    # Sums and total weights of the entries above and below zero: one pass over the experts, and no
    # more memory for more of them.
    above, below, weight_above, weight_below = torch.zeros(4, *shape)
    for update in updates:
        delta = trimmed(update.dense(), density)
        above.add_(delta.clamp(min=0.0), alpha=update.weight)
        below.add_(delta.clamp(max=0.0), alpha=update.weight)
        weight_above.add_(delta > 0.0, alpha=update.weight)
        weight_below.add_(delta < 0.0, alpha=update.weight)
    elected = above + below
    mean_above = above / weight_above.clamp(min=torch.finfo(torch.float32).tiny)
    mean_below = below / weight_below.clamp(min=torch.finfo(torch.float32).tiny)
    merged = torch.where(elected > 0.0, mean_above, mean_below)
    return torch.where(elected == 0.0, 0.0, merged)
