"""Model Breadcrumbs (https://arxiv.org/abs/2312.06795): leave out the outliers and the small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mttl_routing.merges.rule import Update, check_share


def without_extremes(delta: Tensor, density: float, gamma: float) -> Tensor:
    """``delta`` without its ``gamma`` share of largest entries and without the smallest.

    Entries as large as the largest kept, or as small as the smallest kept, are kept too, so that
    nothing depends on their order.
    """
    count = delta.numel()
    outliers = min(round(gamma * count), count - 1)
    keep = max(1, min(round(density * count), count - outliers))
    magnitude = delta.abs()
    places = (count - outliers - keep, count - outliers - 1)  # of the least and the most kept
    rising = np.partition(magnitude.flatten().numpy(), places)
    least, most = (float(rising[place]) for place in places)
    return torch.where((magnitude >= least) & (magnitude <= most), delta, 0.0)


def breadcrumbs(updates: Sequence[Update], *, density: float = 0.15, gamma: float = 0.01) -> Tensor:
    """Weighted sum of masked updates, (o, i) float32.

    The masks are layer by layer, as in the paper: they zero a share of the largest entries,
    and of the smallest. Here, as in mergekit, the share between them is given. The paper's factor
    is the merge's ``scale``.

    Args:
        updates: of one module.
        density: share of entries kept, in (0, 1].
        gamma: share of largest entries left out, in [0, 1).
    """
    check_share("density", density)
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma is {gamma!r}; it takes a share in [0, 1), such as 0.01")
    merged = torch.zeros(updates[0].shape)
    for update in updates:
        merged.add_(without_extremes(update.dense(), density, gamma), alpha=update.weight)
    return merged
