"""Every merge method, each with its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from mttl_routing.merges.linear import linear
from mttl_routing.merges.rule import LowRank, MergeRule, Update
from mttl_routing.merges.ties import ties

__all__ = ["MERGES", "LowRank", "Merge", "MergeRule", "Update"]


@dataclass(frozen=True)
class Merge:
    """One merge method.

    Attributes:
        rule: from the updates of one module to the merged one.
        paper: where it was published.
        default_weight: an expert's weight, from the number of experts, where none are given; None
            where they must be given.
        takes_weights: whether they may be given.
        options: what else the rule takes, with defaults.
    """

    rule: Callable[..., LowRank | Tensor]
    paper: str
    default_weight: Callable[[int], float] | None = lambda n_experts: 1.0
    takes_weights: bool = True
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


MERGES: Mapping[str, Merge] = MappingProxyType(
    {
        "uniform": Merge(
            linear,
            "https://arxiv.org/abs/2203.05482",
            default_weight=lambda n_experts: 1.0 / n_experts,
            takes_weights=False,
        ),
        "weighted": Merge(linear, "https://arxiv.org/abs/2203.05482", default_weight=None),
        "ties": Merge(
            ties, "https://arxiv.org/abs/2306.01708", options=MappingProxyType({"density": 0.2})
        ),
    }
)
