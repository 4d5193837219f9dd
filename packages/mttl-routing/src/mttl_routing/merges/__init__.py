"""Every merge method, each with its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from mttl_routing.merges.breadcrumbs import breadcrumbs
from mttl_routing.merges.compress import compress_then_merge
from mttl_routing.merges.dare import dare_linear, dare_ties
from mttl_routing.merges.della import della
from mttl_routing.merges.linear import linear, linear_factors, sparse_uniform
from mttl_routing.merges.pico import pico
from mttl_routing.merges.rule import LowRank, MergeRule, Update
from mttl_routing.merges.singular import iso, iso_cts, tsv
from mttl_routing.merges.spaces import core, knots
from mttl_routing.merges.spherical import multislerp, slerp
from mttl_routing.merges.ties import ties
from mttl_routing.merges.wudi import wudi

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
        scale: what the result is multiplied by (λ in most papers) where nothing else is asked for;
            None for that of the method inside, if any, or for 1.
        options: what else the rule takes, with defaults.
        draws: whether it draws at random, so that it takes a seed.
        shares: whether the weights are shares of one, so that they are divided by their sum.
        n_experts: how many it takes; None for any number.
        inside: methods that it may have inside, the first by default.
        takes_rank: whether the rule makes the rank that is asked for.
        by_entry: whether it looks at single entries, so that another basis is another result.
        tells_by_entry: whether the rule is told that of the method inside.
    """

    rule: Callable[..., LowRank | Tensor]
    paper: str
    default_weight: Callable[[int], float] | None = lambda n_experts: 1.0
    takes_weights: bool = True
    scale: float | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    draws: bool = False
    shares: bool = False
    n_experts: int | None = None
    inside: tuple[str, ...] = ()
    takes_rank: bool = False
    by_entry: bool = True
    tells_by_entry: bool = False


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
        # The paper chooses λ by validation; without it a sum of many experts needs one below 1.
        "task_arithmetic": Merge(
            linear, "https://arxiv.org/abs/2212.04089", scale=0.4, by_entry=False
        ),
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
            options=MappingProxyType({"density": 0.5, "ties_density": 0.2}),
            draws=True,
        ),
        "della": Merge(
            della,
            "https://arxiv.org/abs/2406.11617",
            options=MappingProxyType({"density": 0.7, "epsilon": None}),
            draws=True,
        ),
        "breadcrumbs": Merge(
            breadcrumbs,
            "https://arxiv.org/abs/2312.06795",
            scale=0.4,  # as for task arithmetic, which it is but for the masks
            options=MappingProxyType({"density": 0.15, "gamma": 0.006}),
        ),
        "sparse_uniform": Merge(
            sparse_uniform,
            "https://arxiv.org/abs/2507.07140",
            takes_weights=False,
        ),
        "linear_factors": Merge(
            linear_factors, "https://arxiv.org/abs/2307.13269", default_weight=_mean
        ),
        "slerp": Merge(
            slerp,
            "https://doi.org/10.1145/325334.325242",
            default_weight=_mean,
            shares=True,
            n_experts=2,
        ),
        "multislerp": Merge(
            multislerp,
            "https://doi.org/10.1145/502122.502124",
            default_weight=_mean,
            shares=True,
        ),
        "tsv": Merge(tsv, "https://arxiv.org/abs/2412.00081", by_entry=False),
        "iso": Merge(iso, "https://arxiv.org/abs/2502.04959", by_entry=False),
        "iso_cts": Merge(
            iso_cts,
            "https://arxiv.org/abs/2502.04959",
            options=MappingProxyType({"common": 0.8}),
            by_entry=False,
        ),
        "core": Merge(
            core,
            "https://arxiv.org/abs/2509.17786",
            inside=("tsv", "iso", "iso_cts", "ties", "task_arithmetic"),
            tells_by_entry=True,
        ),
        "knots": Merge(
            knots,
            "https://arxiv.org/abs/2410.19735",
            inside=("ties", "dare_ties", "task_arithmetic"),
        ),
        "compress_then_merge": Merge(
            compress_then_merge,
            "https://arxiv.org/abs/2606.03723",
            options=MappingProxyType({"beta": 0.0}),
            inside=("ties", "dare_ties", "task_arithmetic"),
            takes_rank=True,
        ),
        "pico": Merge(
            pico,
            "https://arxiv.org/abs/2604.16826",
            scale=1.0,
            inside=("task_arithmetic", "ties", "tsv"),
        ),
        "wudi": Merge(
            wudi,
            "https://arxiv.org/abs/2503.08099",
            takes_weights=False,
            options=MappingProxyType({"steps": 300, "learning_rate": 1e-5}),
        ),
    }
)


def bind(
    kind: Merge, name: str, given: Mapping[str, Any], seed: int, rank: int | None
) -> tuple[MergeRule, dict[str, Any], float]:
    """A method's rule with its options in it, those options as plain data, and its own scale.

    Args:
        kind: the method.
        name: its name, for errors.
        given: options by name; None stands for the default. ``inside`` names the method inside,
            where there is one; the options of that one go along with the others.
        seed: of what it draws; left out of the options where it draws nothing.
        rank: asked for.

    Raises:
        ValueError: for an option that the method does not take.
    """
    given = {option: value for option, value in given.items() if value is not None}
    inner, options = None, dict(kind.options)
    if kind.inside:
        chosen = given.get("inside", kind.inside[0])
        if chosen not in kind.inside:
            raise ValueError(
                f"method {name!r} takes inside={', '.join(map(repr, kind.inside))}, got {chosen!r}"
            )
        inner = MERGES[chosen]
        options = {"inside": chosen, **options, **inner.options}
    for option, value in given.items():
        if option not in options:
            within = f" with {options['inside']!r} inside" if inner else ""
            raise ValueError(
                f"method {name!r}{within} takes no {option}, got {option}={value!r}; it takes "
                f"{', '.join(options) or 'no options'}"
            )
    options |= given
    if kind.draws or (inner is not None and inner.draws):
        options["seed"] = seed

    def of(part: Merge) -> dict[str, Any]:
        own = {option: options[option] for option in part.options}
        return own | ({"seed": seed} if part.draws else {})

    arguments = of(kind)
    if inner is not None:
        arguments["inside"] = partial(inner.rule, **of(inner))
        if kind.tells_by_entry:
            arguments["by_entry"] = inner.by_entry
    if kind.takes_rank:
        arguments["rank"] = rank
    scale = inner.scale if kind.scale is None and inner is not None else kind.scale
    return partial(kind.rule, **arguments), options, 1.0 if scale is None else scale
