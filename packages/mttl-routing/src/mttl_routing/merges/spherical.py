"""Interpolation on a sphere: directions and lengths of updates are averaged apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mttl_experts import IncompatibleExpertError, inner_product
from mttl_routing.merges.linear import linear
from mttl_routing.merges.rule import LowRank, Update

_PARALLEL = 0.9995  # cosines beyond it are interpolated linearly, as other tools do
_SMALL = 1e-8


def product(one: Update, other: Update) -> float:
    """⟨ΔW_1, ΔW_2⟩ in float64, without forming either."""
    return inner_product({"": one.factors}, {"": other.factors})


def combined(updates: Sequence[Update], coefficients: Sequence[float]) -> LowRank:
    """Σ c_e ΔW_e; the weights are left out."""
    pairs = zip(updates, coefficients, strict=True)
    return linear([replace(update, weight=c) for update, c in pairs])


def slerp(updates: Sequence[Update]) -> LowRank:
    """Spherical linear interpolation of two experts (https://doi.org/10.1145/325334.325242).

    (sin(w_1 θ) ΔW_1 + sin(w_2 θ) ΔW_2) / sin θ for weights that sum to 1, θ being the angle between
    the updates. As in mergekit the angle is that of the directions while the updates keep their
    lengths, and updates that are nearly parallel are interpolated linearly; so is one with nothing,
    which has no direction. Each module has its own angle.

    Args:
        updates: two, or one where the other expert leaves the module alone; weights sum to 1.
    """
    if len(updates) == 2:
        one, other = updates
        norms = math.sqrt(product(one, one) * product(other, other))
        cosine = product(one, other) / norms if norms > 0.0 else 1.0
        if abs(cosine) <= _PARALLEL:
            angle = math.acos(cosine)
            return combined(
                updates, [math.sin(u.weight * angle) / math.sin(angle) for u in updates]
            )
    return linear(updates)


def multislerp(updates: Sequence[Update]) -> LowRank:
    """Multi-SLERP (https://goddard.blog/posts/multislerp-wow-what-a-cool-idea), as in mergekit.

    The weighted mean of the directions, at the weighted mean of the lengths. The definition goes on
    to average, in the tangent space at that mean, what is left of each direction; this average is
    zero, as tangent parts around a mean are, so that step changes nothing and is left out. Each
    module is merged apart. Where the directions cancel out two experts are interpolated linearly.

    Args:
        updates: with weights that sum to 1 over all experts.

    Raises:
        IncompatibleExpertError: where the directions of three or more cancel out.
    """
    norms = [math.sqrt(max(product(u, u), 0.0)) for u in updates]
    units = [u.weight / n if n > 0.0 else 0.0 for u, n in zip(updates, norms, strict=True)]
    mean = combined(updates, units)
    length = sum(u.weight * n for u, n in zip(updates, norms, strict=True))
    if length == 0.0:
        return mean
    mean_norm = mean.norm()
    if mean_norm < _SMALL:
        if len(updates) <= 2:
            return linear(updates)
        raise IncompatibleExpertError(
            f"multislerp: the directions of the experts cancel out in module "
            f"{updates[0].module!r}; give other weights"
        )
    return LowRank(mean.a, mean.b * (length / mean_norm))
