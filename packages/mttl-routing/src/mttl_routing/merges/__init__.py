"""Every merge method, each with its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from mttl_routing.merges.dare import dare_linear, dare_ties
from mttl_routing.merges.linear import linear
from mttl_routing.merges.rule import LowRank, MergeRule, Update
from mttl_routing.merges.ties import ties

__all__ = ["MERGES", "LowRank", "Merge", "MergeRule", "Update", "bind"]


@dataclass(frozen=True)
class Merge:
    """One merge method.

    Attributes:
        rule: from the updates of one module to the merged one.
        paper: where it was published.
        default_weight: an expert's weight, from the number of experts, where none are given; None
            where they must be given.
        takes_weights: whether they may be given.
        scale: what the result is multiplied by (λ in most papers) where nothing else is asked for.
        options: what else the rule takes, with defaults.
        draws: whether it draws at random, so that it takes a seed.
    """

    rule: Callable[..., LowRank | Tensor]
    paper: str
    default_weight: Callable[[int], float] | None = lambda n_experts: 1.0
    takes_weights: bool = True
    scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    draws: bool = False


def _mean(n_experts: int) -> float:
    return 1.0 / n_experts


MERGES: Mapping[str, Merge] = MappingProxyType(
    {
        "uniform": Merge(
            linear,
            "https://arxiv.org/abs/2203.05482",
            default_weight=_mean,
            takes_weights=False,
        ),
        "weighted": Merge(linear, "https://arxiv.org/abs/2203.05482", default_weight=None),
        # 0.4 is what its authors advise where no validation data chooses it.
        "task_arithmetic": Merge(linear, "https://arxiv.org/abs/2212.04089", scale=0.4),
        "ties": Merge(
            ties, "https://arxiv.org/abs/2306.01708", options=MappingProxyType({"density": 0.2})
        ),
        "dare_linear": Merge(
            dare_linear,
            "https://arxiv.org/abs/2311.03099",
            scale=0.4,  # as for the task arithmetic that follows it
            options=MappingProxyType({"density": 0.5}),
            draws=True,
        ),
        "dare_ties": Merge(
            dare_ties,
            "https://arxiv.org/abs/2311.03099",
            options=MappingProxyType({"density": 0.5}),
            draws=True,
        ),
    }
)


def bind(
    kind: Merge, name: str, given: Mapping[str, Any], seed: int
) -> tuple[MergeRule, dict[str, Any]]:
    """A method's rule with its options in it, and those options as plain data.

    Args:
        kind: the method.
        name: its name, for errors.
        given: options by name; None stands for the default.
        seed: of what it draws; left out of the options where it draws nothing.

    Raises:
        ValueError: for an option that the method does not take.
    """
    options = dict(kind.options)
    for option, value in given.items():
        if value is None:
            continue
        if option not in options:
            takes = ", ".join(options) or "no options"
            raise ValueError(
                f"method {name!r} takes no {option}, got {option}={value!r}; it takes {takes}"
            )
        options[option] = value
    if kind.draws:
        options["seed"] = seed
    return partial(kind.rule, **options), options
