"""DARE (https://arxiv.org/abs/2311.03099): drop entries at random, and rescale the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mttl_routing.merges.dense import Matrix, dense_sum
from mttl_routing.merges.drawing import kept
from mttl_routing.merges.rule import Update, check_share
from mttl_routing.merges.ties import agreement, trim


def drop(delta: Matrix, update: Update, density: float, seed: int) -> None:
    """Each entry stays with probability ``density``, divided by it; else it is zero. In place."""
    if density < 1.0:
        stays = kept(density, update.shape, seed, update.source)
        np.multiply(delta, stays, out=delta)
        np.divide(delta, np.float32(density), out=delta)


def dare_linear(updates: Sequence[Update], *, density: float = 0.5, seed: int = 0) -> Tensor:
    """Weighted sum of the updates after DARE, (o, i) float32.

    DARE is a step before a merge: this one has task arithmetic after it, and :func:`dare_ties` has
    TIES. The paper finds drop rates from .1 to .9 by validation; half is kept here if not asked.

    Args:
        updates: of one module.
        density: share of entries kept, 1 - p in the paper, in (0, 1].
        seed: of the draws.
    """
    check_share("density", density)
    return dense_sum(updates, lambda delta, update: drop(delta, update, density, seed))


def dare_ties(
    updates: Sequence[Update], *, density: float = 0.5, ties_density: float = 0.2, seed: int = 0
) -> Tensor:
    """TIES of the updates after DARE, (o, i) float32.

    The whole of TIES, its trimming included, as the paper's authors have it
    (https://github.com/yule-BUAA/MergeLM/issues/38). The share trimmed to is of all entries, so
    where DARE keeps fewer than that nothing more is trimmed.

    Args:
        updates: with weights above zero.
        density: share of entries that DARE keeps, in (0, 1].
        ties_density: share of entries that TIES keeps, in (0, 1].
        seed: of the draws.
    """
    check_share("density", density)
    check_share("ties_density", ties_density)

    def thin(delta: Matrix, update: Update) -> None:
        drop(delta, update, density, seed)
        trim(delta, ties_density)

    return agreement(updates, "dare_ties", thin)
