"""Model Breadcrumbs (https://arxiv.org/abs/2312.06795): keep neither outliers nor small entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mttl_routing.merges.rule import Update, check_share


def masked(delta: Tensor, density: float, gamma: float) -> Tensor:
    """``delta`` with its largest entries set to zero, and all but the next largest ones.

    In falling order of magnitude the first ``gamma`` share goes, the next ``density`` share stays
    and the rest goes. Entries as large as the first or the last of those that stay do so too, so
    nothing depends on the order of equals.
    """
    size = delta.abs()
    outliers = round(gamma * size.numel())
    stay = min(max(1, round(density * size.numel())), size.numel() - outliers)
    largest = size.numel() - outliers - 1  # its place in rising order
    least = largest - stay + 1
    rising = np.partition(size.flatten().numpy(), (least, largest))
    inside = (size >= float(rising[least])) & (size <= float(rising[largest]))
    return torch.where(inside, delta, 0.0)


def breadcrumbs(
    updates: Sequence[Update], *, density: float = 0.15, gamma: float = 0.006
) -> Tensor:
    """Weighted sum of the masked updates, (o, i) float32.

    The paper masks each layer of each task vector apart, and so does this; the authors' code does
    it in each row. The defaults are where their search of both shares starts. Their factor is
    the merge's ``scale``.

    Args:
        updates: of one module.
        density: share of entries kept, in (0, 1].
        gamma: share of largest entries left out, from 0; with ``density`` it is 1 at most.
    """
    check_share("density", density)
    if not 0.0 <= gamma < 1.0 or density + gamma > 1.0:
        raise ValueError(
            f"gamma is {gamma!r} with density {density!r}; both are shares, of 1 together at most"
        )
    merged = torch.zeros(updates[0].shape)
    for update in updates:
        merged.add_(masked(update.dense(), density, gamma), alpha=update.weight)
    return merged
