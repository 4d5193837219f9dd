"""How like one another two experts are, from their exact inner products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mttl_experts.spectral import LoraFactors

# Two ΔW whose difference is at most this share of their size are one, written down twice: half
# precision alone makes a quarter of it.
SAME = 0.01
# From this cosine on, which any copy has, float32 is too coarse to tell.
_NEAR = 0.9999


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
    """One expert's ΔW, ready to be compared with many, in several threads if need be."""

    def __init__(self, modules: Mapping[str, LoraFactors], norm: float) -> None:
        """Keep its factors, as ``lora_modules`` gives them, and its exact ‖ΔW‖, which is not 0."""
        self.norm = norm
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for path, factors in modules.items():
            by_shape.setdefault((*factors.a.shape, *factors.b.shape), []).append(path)
        self._stacks = [(paths, _Stack.of(modules, paths)) for paths in by_shape.values()]

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
        cosine = self._product(modules, torch.float32) / scale  # enough to rank by
        if abs(cosine) < _NEAR:
            return Likeness(cosine, size, None)
        cosine = self._product(modules, torch.float64) / scale
        cosine = max(-1.0, min(1.0, cosine))
        distance = math.sqrt(max(0.0, 1 - 2 * cosine * size + size**2))  # ‖x - q‖ / ‖q‖
        if distance <= SAME:
            return Likeness(cosine, size, "same")
        return Likeness(cosine, size, "scaled" if 1 - cosine**2 <= SAME**2 else None)

    def _product(self, modules: Mapping[str, LoraFactors], dtype: torch.dtype) -> float:
        """⟨ΔW, ΔW⟩, the modules of one shape at once, with products of that precision."""
        total = 0.0
        for paths, stack in self._stacks:
            by_rank: dict[int, list[int]] = {}
            for row, path in enumerate(paths):
                factors = modules.get(path)
                if factors is not None and stack.is_like(factors):
                    by_rank.setdefault(factors.rank, []).append(row)
            for rows in by_rank.values():
                other = _Stack.of(modules, [paths[row] for row in rows])
                total += stack.rows(rows).product(other, dtype)
        return total


class _Stack(NamedTuple):
    """Factors of m modules of one shape and rank: A (m, r, i), B (m, o, r), scaling (m,)."""

    a: Tensor
    b: Tensor
    scaling: Tensor

    @classmethod
    def of(cls, modules: Mapping[str, LoraFactors], paths: Sequence[str]) -> _Stack:
        factors = [modules[path] for path in paths]
        return cls(
            torch.stack([each.a for each in factors]),
            torch.stack([each.b for each in factors]),
            torch.tensor([each.scaling for each in factors], dtype=torch.float64),
        )

    def is_like(self, factors: LoraFactors) -> bool:
        """Whether a module has the same (o, i), whatever its rank."""
        return self.b.shape[1] == factors.b.shape[0] and self.a.shape[2] == factors.a.shape[1]

    def rows(self, rows: Sequence[int]) -> _Stack:
        if len(rows) == len(self.scaling):  # mostly: nothing is copied
            return self
        return _Stack(self.a[rows], self.b[rows], self.scaling[rows])

    def product(self, other: _Stack, dtype: torch.dtype) -> float:
        """Sum of s₁s₂·tr((A₂A₁ᵀ)(B₁ᵀB₂)) over the modules."""
        inputs = other.a.to(dtype) @ self.a.to(dtype).mT  # (m, r2, r1)
        outputs = other.b.to(dtype).mT @ self.b.to(dtype)  # (m, r2, r1)
        traces = (inputs * outputs).sum((1, 2), dtype=torch.float64)
        return float(traces @ (self.scaling * other.scaling))
