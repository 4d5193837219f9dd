"""TIES (https://arxiv.org/abs/2306.01708): trim, elect a sign, and average what agrees with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mttl_routing.merges.rule import Update, check_share


def trimmed(delta: Tensor, density: float) -> Tensor:
    """``delta`` with all but its ``density`` share of largest entries set to zero.

    Entries as large as the least one kept are kept too, so nothing depends on their order; zeros
    are never counted as kept, so there may be fewer.
    """
    keep = max(1, round(density * delta.numel()))
    magnitude = delta.abs()
    threshold = magnitude.flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(magnitude >= threshold, delta, 0.0)


def agreement(
    updates: Sequence[Update], method: str, thinned: Callable[[Update], Tensor]
) -> Tensor:
    """Mean, entry by entry, of the updates that have the elected sign there; (o, i) float32.

    The sign of an entry is that of the weighted sum of the thinned updates, and where that sum is
    zero so is the result. The result is the weighted mean over the experts whose thinned entry has
    the elected sign; with equal weights that is the TIES paper's disjoint mean.

    Args:
        updates: with weights above zero.
        method: its name, for errors.
        thinned: an update's ΔW with some entries set to zero.
    """
    for update in updates:
        if update.weight <= 0.0:
            raise ValueError(f"{method} takes weights above zero, got {update.weight!r}")
    # Sums and total weights of the entries above and below zero: one pass over the experts, and no
    # more memory for more of them.
    above, below, weight_above, weight_below = torch.zeros(4, *updates[0].shape)
    for update in updates:
        delta = thinned(update)
        above.add_(delta.clamp(min=0.0), alpha=update.weight)
        below.add_(delta.clamp(max=0.0), alpha=update.weight)
        weight_above.add_(delta > 0.0, alpha=update.weight)
        weight_below.add_(delta < 0.0, alpha=update.weight)
    elected = above + below
    mean_above = above / weight_above.clamp(min=torch.finfo(torch.float32).tiny)
    mean_below = below / weight_below.clamp(min=torch.finfo(torch.float32).tiny)
    merged = torch.where(elected > 0.0, mean_above, mean_below)
    return torch.where(elected == 0.0, 0.0, merged)


def ties(updates: Sequence[Update], *, density: float = 0.2) -> Tensor:
    """TIES merge of one module's ΔW, (o, i) float32.

    The paper trims each expert's whole task vector; here each module is trimmed apart, as other
    tools do, so that modules can be streamed. Its λ is the merge's ``scale``.

    Args:
        updates: with weights above zero.
        density: share of entries kept, in (0, 1].
    """
    check_share("density", density)
    return agreement(updates, "ties", lambda update: trimmed(update.dense(), density))
