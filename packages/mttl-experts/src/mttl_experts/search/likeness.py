"""How like one another two experts are, from their exact inner products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mttl_experts.spectral import LoraFactors, inner_product

# Two ΔW whose difference is at most this share of their size are one, written down twice: half
# precision alone makes a quarter of it.
SAME = 0.01
# From this cosine on, float32 is too coarse to tell copies apart.
_NEAR = 0.999


@dataclass(frozen=True)
class Likeness:
    """What an expert's ΔW is to that of a query.

    Attributes:
        cosine: of the angle between the two, all modules taken as one vector.
        size: its ‖ΔW‖ as a multiple of the query's.
        copy: "same" if the two are one ΔW, whatever their factors; "scaled" if one is a multiple of
            the other (a negative one if the cosine is negative); None else.
    """

    cosine: float
    size: float
    copy: Literal["same", "scaled"] | None


class Query:
    """One expert's ΔW, ready to be compared with many."""

    def __init__(self, modules: Mapping[str, LoraFactors], norm: float) -> None:
        """Keep its factors, as ``lora_modules`` gives them, and its exact ‖ΔW‖, which is not 0."""
        self._modules = modules
        self._ready = {
            path: (_float(factors.a).T.contiguous(), _float(factors.b), factors.scaling)
            for path, factors in modules.items()
        }
        self.norm = norm

    def likeness(self, modules: Mapping[str, LoraFactors], norm: float) -> Likeness:
        """What an expert is to this one.

        Modules that only one has, or that have other shapes in the two, have nothing in common.

        Args:
            modules: its factors.
            norm: its exact ‖ΔW‖.
        """
        scale, size = self.norm * norm, norm / self.norm
        if scale == 0:
            return Likeness(0.0, size, None)
        cosine = self._product(modules) / scale
        if abs(cosine) < _NEAR:
            return Likeness(cosine, size, None)
        shared = self._shared(modules)
        cosine = inner_product({path: self._modules[path] for path in shared}, shared) / scale
        cosine = max(-1.0, min(1.0, cosine))
        distance = math.sqrt(max(0.0, 1 - 2 * cosine * size + size**2))  # ‖x - q‖ / ‖q‖
        if distance <= SAME:
            return Likeness(cosine, size, "same")
        return Likeness(cosine, size, "scaled" if 1 - cosine**2 <= SAME**2 else None)

    def _product(self, modules: Mapping[str, LoraFactors]) -> float:
        """⟨ΔW, ΔW⟩ in float32, which is enough to rank by: tr((A₂A₁ᵀ)(B₁ᵀB₂)) of each module."""
        parts = []
        for path, factors in self._shared(modules).items():
            a, b, scaling = self._ready[path]
            inputs = _float(factors.a) @ a  # (r2, r1)
            outputs = _float(factors.b).T @ b  # (r2, r1)
            part = torch.dot(inputs.flatten(), outputs.flatten())
            parts.append(part * (scaling * factors.scaling))
        return float(torch.stack(parts).double().sum()) if parts else 0.0

    def _shared(self, modules: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
        return {
            path: factors
            for path, factors in modules.items()
            if (own := self._modules.get(path)) is not None
            and own.a.shape[1] == factors.a.shape[1]
            and own.b.shape[0] == factors.b.shape[0]
        }


def _float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()
