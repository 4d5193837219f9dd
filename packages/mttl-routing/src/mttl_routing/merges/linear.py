"""Weighted sums of updates: model soups (https://arxiv.org/abs/2203.05482) of LoRA experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mttl_experts import IncompatibleExpertError
from mttl_routing.merges.rule import LowRank, Update


def linear(updates: Sequence[Update]) -> LowRank:
    """Σ_e w_e ΔW_e, exactly: the experts' factors stacked, so its rank is the sum of theirs.

    The weights and scalings go into B; A and B are never averaged apart, which would add products
    of one expert's B with another's A.
    """
    out_features, _ = updates[0].shape
    b, end = torch.empty(out_features, sum(u.factors.rank for u in updates)), 0
    for u in updates:
        start, end = end, end + u.factors.rank
        torch.mul(u.factors.b.float(), u.weight * u.factors.scaling, out=b[:, start:end])
    return LowRank(a=torch.cat([u.factors.a.float() for u in updates]), b=b)


def linear_factors(updates: Sequence[Update]) -> LowRank:
    """(Σ_e w_e s_e B_e)(Σ_e w_e A_e): A and B apart, which is no mean of updates.

    LoraHub (https://arxiv.org/abs/2307.13269) composes experts so, and older libraries average
    so. It adds products of one expert's B with another's A, and depends on how each update is
    split into its factors. It is here to compare with numbers published for it; ``uniform`` and
    ``weighted`` are what it is taken for. The scaling, one for all in LoraHub,
    goes with B.

    Raises:
        IncompatibleExpertError: for experts of different ranks, whose factors do not add up.
    """
    ranks = sorted({u.factors.rank for u in updates})
    if len(ranks) > 1:
        raise IncompatibleExpertError(
            f"linear_factors adds A and B apart, so it needs equal ranks; there are {ranks} in "
            f"module {updates[0].module!r}; 'uniform' takes any"
        )
    a, b = torch.zeros(updates[0].factors.a.shape), torch.zeros(updates[0].factors.b.shape)
    for u in updates:
        a.add_(u.factors.a.float(), alpha=u.weight)
        b.add_(u.factors.b.float(), alpha=u.weight * u.factors.scaling)
    return LowRank(a, b)


def sparse_uniform(updates: Sequence[Update]) -> Tensor:
    """Mean, entry by entry, over the updates that are not zero there; (o, i) float32.

    The uniform merge of sparse adapters (https://arxiv.org/abs/2507.07140, by the authors' code),
    which divides by the overlap of their masks. The ΔW of a LoRA has few zeros: rows whose B is
    zero, and modules left alone. Where there are none it is the mean over those that adapt the
    module.
    """
    total, overlap = torch.zeros(2, *updates[0].shape)
    for update in updates:
        delta = update.dense()
        total.add_(delta)
        overlap.add_(delta != 0.0)
    mean: Tensor = total / overlap.clamp(min=1.0)
    return mean
