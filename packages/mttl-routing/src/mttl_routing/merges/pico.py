"""Pico (https://arxiv.org/abs/2604.16826): damp the output directions that all experts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mttl_experts import LoraFactors
from mttl_routing.merges.rule import LowRank, MergeRule, Update


def calibrated(updates: Sequence[Update]) -> list[Update]:
    """The updates with crowded directions of B damped.

    The left singular vectors of all B beside each other are these directions. Each is multiplied by
    1 / (1 + (T-1) c) in each of the T experts, c being its share of the squared singular values.
    """
    stacked = torch.cat([update.scaled_b for update in updates], dim=1).double()
    u, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
    energy = sigma.square()
    crowding = energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    change = 1.0 / (1.0 + (len(updates) - 1) * crowding) - 1.0  # (k,)
    out = []
    for update in updates:
        b = update.scaled_b.double()
        b = b + u @ (change[:, None] * (u.T @ b))
        out.append(replace(update, factors=LoraFactors(update.factors.a, b.float(), 1.0)))
    return out


def pico(updates: Sequence[Update], *, inside: MergeRule) -> LowRank | Tensor:
    """Pico before a rule: calibrate B, merge, and give the result the experts' mean length.

    The paper writes ΔW = BA, so the scaling is taken to be in B; with one scaling for all experts
    that changes nothing. T and the mean are over the experts that adapt the module. Since the
    length of the result is set at the end, a factor in the rule inside has no effect.
    """
    factors = [LowRank(update.factors.a.float(), update.scaled_b) for update in updates]
    wanted = sum(factor.norm() for factor in factors) / len(factors)
    merged = inside(calibrated(updates) if len(updates) > 1 else updates)
    if isinstance(merged, LowRank):
        length = merged.norm()
        return LowRank(merged.a, merged.b * (wanted / length)) if length > 0.0 else merged
    length = float(merged.double().norm())
    return merged * (wanted / length) if length > 0.0 else merged
