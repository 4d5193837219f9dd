"""What differs between two experts: their facts, and module by module their ΔW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mttl_experts.errors import IncompatibleExpertError, UnsupportedAdapterError
from mttl_experts.expert import Expert
from mttl_experts.spectral import (
    LoraFactors,
    SpectralForm,
    distance,
    inner_product,
    lora_modules,
    principal_angles,
    spectral_form,
)


@dataclass(frozen=True)
class ModuleDifference:
    """How far apart two experts are in one module, whatever the factors they are kept as.

    Attributes:
        norms: ‖ΔW‖ of each, 0 where an expert leaves the module alone.
        distance: ‖ΔW_1 - ΔW_2‖.
        cosine: between the two as flat vectors; None where one is zero.
        input_angles: principal angles in degrees, rising, between the inputs that they react to.
        output_angles: likewise, between the outputs that they write.
    """

    norms: tuple[float, float]
    distance: float
    cosine: float | None
    input_angles: tuple[float, ...]
    output_angles: tuple[float, ...]


@dataclass(frozen=True)
class ExpertDifference:
    """What differs between two experts.

    Attributes:
        facts: facts that differ, by path such as ``"metrics.loss"``: the first's and the second's;
            None where one has none.
        same_weights: whether weights and config are equal, byte for byte.
        modules: how far apart they are, by module path, sorted.
        not_compared: why there are no modules, where an adapter is more than ΔW; else empty.
    """

    facts: dict[str, tuple[Any, Any]]
    same_weights: bool
    modules: dict[str, ModuleDifference]
    not_compared: str = ""

    @property
    def distance(self) -> float:
        """‖ΔW_1 - ΔW_2‖ over all modules."""
        return math.hypot(*(module.distance for module in self.modules.values()))


def difference(one: Expert, other: Expert) -> ExpertDifference:
    """What differs in ``other`` from ``one``. ΔW is never formed."""
    facts = changed_facts(one.expert_info.to_dict(), other.expert_info.to_dict())
    same = one.digest == other.digest
    if one.expert_weights is None or other.expert_weights is None:
        return ExpertDifference(facts, same, {}, "one of them has no weights yet")
    try:
        first, second = lora_modules(one), lora_modules(other)
        modules = {
            path: _module(path, first.get(path), second.get(path))
            for path in sorted(first.keys() | second.keys())
        }
    except UnsupportedAdapterError as error:
        return ExpertDifference(facts, same, {}, str(error))
    return ExpertDifference(facts, same, modules)


def changed_facts(
    one: Mapping[str, Any], other: Mapping[str, Any], path: str = ""
) -> dict[str, tuple[Any, Any]]:
    """What differs between two tables of plain data, by path."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(one.keys() | other.keys()):
        before, after = one.get(key), other.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= changed_facts(before, after, f"{path}{key}.")
        elif before != after:
            found[f"{path}{key}"] = (before, after)
    return found


def _module(path: str, one: LoraFactors | None, other: LoraFactors | None) -> ModuleDifference:
    shapes = [(f.b.shape[0], f.a.shape[1]) for f in (one, other) if f is not None]
    if len(set(shapes)) > 1:
        raise IncompatibleExpertError(
            f"module {path!r} is {shapes[0]} (out, in) in one expert and {shapes[1]} in the other; "
            "they have different bases"
        )
    norms = (distance(one, None), distance(None, other))
    cosine: float | None = None
    angles: list[tuple[float, ...]] = [(), ()]
    if one is not None and other is not None and all(norms):
        cosine = inner_product({path: one}, {path: other}) / (norms[0] * norms[1])
        forms = [spectral_form(f.a, f.b, f.scaling) for f in (one, other)]
        angles = [_degrees(*(side(form) for form in forms)) for side in (_inputs, _outputs)]
    return ModuleDifference(norms, distance(one, other), cosine, angles[0], angles[1])


def _degrees(one: Tensor, other: Tensor) -> tuple[float, ...]:
    return tuple(math.degrees(angle) for angle in principal_angles(one, other).tolist())


def _inputs(form: SpectralForm) -> Tensor:
    return form.v[:, _counts(form)]


def _outputs(form: SpectralForm) -> Tensor:
    return form.u[:, _counts(form)]


def _counts(form: SpectralForm) -> Tensor:
    """Which directions ΔW has; the others are there for their number alone."""
    size = max(form.u.shape[0], form.v.shape[0])
    return form.sigma > form.sigma[0] * torch.finfo(form.sigma.dtype).eps * size
