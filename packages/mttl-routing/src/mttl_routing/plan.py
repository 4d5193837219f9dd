"""What one merge is asked to do, checked and put in one order before any weights are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mttl_experts import Expert, IncompatibleExpertError, recipe_digest
from mttl_routing.merges import MERGES, Merge, MergeRule, bind

Weights = Sequence[float] | Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """One expert of a merge, its digest, and what it weighs."""

    digest: str
    weight: float
    expert: Expert


@dataclass(frozen=True)
class Plan:
    """One merge.

    Attributes:
        method: its name, or where its function is imported from.
        rule: the method with its options in it.
        options: those, as plain data.
        rank: that every module is cut to at most; None for no cut.
        scale: what the result is multiplied by.
        parts: the experts by digest, so that no sum depends on the order in which they came.
    """

    method: str
    rule: MergeRule
    options: dict[str, Any]
    rank: int | None
    scale: float
    parts: tuple[Part, ...]

    @property
    def experts(self) -> list[Expert]:
        """The experts, in the order of the parts."""
        return [part.expert for part in self.parts]

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides the result, as plain data."""
        return {
            "kind": "merge",
            "format": 1,
            "method": self.method,
            "options": self.options,
            "rank": self.rank,
            "experts": [{"digest": part.digest, "weight": part.weight} for part in self.parts],
        } | ({} if self.scale == 1.0 else {"scale": self.scale})

    @property
    def name(self) -> str:
        """What to call the result: the method, and the first digits of the recipe's digest."""
        return f"{re.split(r'[:.]', self.method)[-1]}-{recipe_digest(self.recipe)[:8]}"


def plan_merge(
    experts: Sequence[Expert],
    method: str | MergeRule,
    weights: Weights | None,
    rank: int | None,
    scale: float | None,
    seed: int,
    options: Mapping[str, Any],
) -> Plan:
    """The merge that :func:`mttl_routing.merge` is asked for; it says what each argument means.

    Raises:
        IncompatibleExpertError: more or fewer experts than the method takes.
        TypeError, ValueError: any other argument that the method does not take.
    """
    kind, name = _method(method)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed is {seed!r}; it takes a whole number")
    if kind.n_experts is not None and len(experts) != kind.n_experts:
        raise IncompatibleExpertError(
            f"method {name!r} takes {kind.n_experts} experts, got {len(experts)}; "
            "'multislerp' takes any number"
        )
    rule, chosen, own_scale = bind(kind, name, options, seed, rank)
    scale = _scale(own_scale if scale is None else scale)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}; it takes a whole number from 1, or None for all of it")
    given = _weights(kind, name, experts, weights)
    parts = [Part(e.digest, weight, e) for e, weight in zip(experts, given, strict=True)]
    parts.sort(key=lambda part: (part.digest, part.weight, part.expert.name))
    return Plan(name, rule, chosen, rank, scale, tuple(parts))


def _method(method: str | MergeRule) -> tuple[Merge, str]:
    if not isinstance(method, str):
        if not callable(method):
            raise TypeError(f"method is {method!r}; it takes a name or a function of updates")
        where = type(method) if not hasattr(method, "__qualname__") else method
        return Merge(method, paper=""), f"{where.__module__}:{where.__qualname__}"
    if method not in MERGES:
        raise ValueError(f"no merge method {method!r}; there are {', '.join(map(repr, MERGES))}")
    return MERGES[method], method


def _scale(scale: float) -> float:
    if isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}; it takes a number")
    return float(scale)


def _weights(
    kind: Merge, method: str, experts: Sequence[Expert], weights: Weights | None
) -> list[float]:
    names = [expert.name for expert in experts]
    if weights is None:
        if kind.default_weight is None:
            raise ValueError(f"method {method!r} needs weights, one number an expert")
        return [kind.default_weight(len(experts))] * len(experts)
    if not kind.takes_weights:
        raise ValueError(f"method {method!r} takes no weights; method='weighted' does")
    if isinstance(weights, Mapping):
        if set(weights) != set(names) or len(set(names)) < len(names):
            raise ValueError(
                f"weights are given for {sorted(weights)!r}, the experts are {sorted(names)!r}; "
                "give each expert one"
            )
        weights = [weights[name] for name in names]
    if len(weights) != len(experts):
        raise ValueError(f"got {len(weights)} weights for {len(experts)} experts; give each one")
    for weight, name in zip(weights, names, strict=True):
        if not math.isfinite(weight):
            raise ValueError(f"the weight of expert {name!r} is {weight!r}; it takes a number")
    if not kind.shares:
        return [float(weight) for weight in weights]
    total = math.fsum(weights)
    if min(weights) < 0.0 or total <= 0.0:
        raise ValueError(f"method {method!r} takes weights from zero up, got {list(weights)}")
    return [float(weight) / total for weight in weights]
