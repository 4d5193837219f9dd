"""Weighted sums of updates: model soups (https://arxiv.org/abs/2203.05482) of LoRA experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mttl_routing.merges.rule import LowRank, Update


def linear(updates: Sequence[Update]) -> LowRank:
    """Σ_e w_e ΔW_e, exactly: the experts' factors stacked, so its rank is the sum of theirs.

    The weights and scalings go into B; A and B are never averaged apart, which would add products
    of one expert's B with another's A.
    """
    scaled = [u.factors.b.float() * (u.weight * u.factors.scaling) for u in updates]
    return LowRank(
        a=torch.cat([u.factors.a.float() for u in updates]),
        b=torch.cat(scaled, dim=1),
    )
