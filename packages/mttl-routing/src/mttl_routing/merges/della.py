"""DELLA (https://arxiv.org/abs/2406.11617): drop small entries more often than large ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mttl_routing.merges.dense import Matrix
from mttl_routing.merges.drawing import kept
from mttl_routing.merges.rule import Update, check_share
from mttl_routing.merges.ties import agreement


def chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """MagPrune's probability that each entry stays, (o, i).

    It rises in even steps with the magnitude's rank in its row, from ``density - epsilon`` to
    ``density + epsilon``. Equal magnitudes are ranked from left to right.
    """
    columns = delta.shape[1]
    # Magnitude and column in one whole number: several times faster to sort than a stable argsort.
    keys = delta.abs().contiguous().view(torch.int32).long() << 32 | torch.arange(columns)
    order = torch.from_numpy(np.sort(keys.numpy(), axis=1)) & 0xFFFFFFFF
    steps = torch.linspace(-1.0, 1.0, columns) if columns > 1 else torch.zeros(1)
    ranked = torch.empty_like(delta).scatter_(1, order, steps.expand_as(delta))
    return density + epsilon * ranked


def della(
    updates: Sequence[Update], *, density: float = 0.7, epsilon: float | None = None, seed: int = 0
) -> Tensor:
    """DELLA merge of one module's ΔW, (o, i) float32.

    Drop by MagPrune, divide what stays by its probability to stay, elect a sign and take the mean
    of what agrees, as TIES does. Rows are the layer's output neurons, as in the authors' code,
    whose example gives the defaults.

    Args:
        updates: with weights above zero.
        density: mean share of entries kept, 1 - p in the paper.
        epsilon: half the width of the window of probabilities around ``density``; 0.07 if not
            given, or as much as leaves them in (0, 1].
        seed: of the draws.
    """
    check_share("density", density)
    if epsilon is None:
        epsilon = min(0.07, density / 2, 1.0 - density)
    if not 0.0 <= epsilon < density or density + epsilon > 1.0:
        raise ValueError(
            f"epsilon is {epsilon!r} with density {density!r}; density - epsilon and density + "
            "epsilon must be in (0, 1]"
        )

    def sample(delta: Matrix, update: Update) -> None:
        if density < 1.0:
            chance = chances(torch.from_numpy(delta), density, epsilon).numpy()
            stays = kept(chance.astype(np.float64), update.shape, seed, update.source)
            np.multiply(delta, stays, out=delta)
            np.divide(delta, chance, out=delta)

    return agreement(updates, "della", sample)
