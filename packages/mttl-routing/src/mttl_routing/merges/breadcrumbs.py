"""Model Breadcrumbs (https://arxiv.org/abs/2312.06795): keep neither outliers nor small entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mttl_routing.merges.dense import Matrix, dense_sum
from mttl_routing.merges.rule import Update, check_share
from mttl_routing.merges.selection import nth_largest


def mask(delta: Matrix, density: float, gamma: float) -> None:
    """Set the largest entries of ``delta`` to zero, and all but the next largest ones. In place.

    In falling order of magnitude the first ``gamma`` share goes, the next ``density`` share stays
    and the rest goes. Entries as large as the first or the last of those that stay do so too, so
    nothing depends on the order of equals.
    """
    size = np.abs(delta)
    outliers = round(gamma * delta.size)
    stay = min(max(1, round(density * delta.size)), delta.size - outliers)
    largest = nth_largest(size.ravel(), outliers + 1)
    least = nth_largest(size.ravel(), outliers + stay)
    np.multiply(delta, (size >= least) & (size <= largest), out=delta)


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
    return dense_sum(updates, lambda delta, _: mask(delta, density, gamma))
