"""What a merge method is: from one module's updates to its merged update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from mttl_experts import LoraFactors


@dataclass(frozen=True, eq=False)
class Update:
    """What one expert changes in one module, and its weight in the merge.

    Attributes:
        factors: its LoRA in the module.
        weight: as asked for.
        source: the expert's digest and the module's path, by which random draws are keyed.
    """

    factors: LoraFactors
    weight: float
    source: str = ""

    @property
    def module(self) -> str:
        """The module's path."""
        return self.source.partition("/")[2]

    @property
    def shape(self) -> tuple[int, int]:
        """Of ΔW: (o, i)."""
        return int(self.factors.b.shape[0]), int(self.factors.a.shape[1])

    @property
    def scaled_b(self) -> Tensor:
        """B with the scaling in it, (o, r) float32, so that ΔW is ``scaled_b @ a``."""
        return self.factors.b.float() * self.factors.scaling

    def dense(self) -> Tensor:
        """ΔW = s·B·A, (o, i) float32, without the weight."""
        return self.scaled_b @ self.factors.a.float()


class Cut(NamedTuple):
    """Squared Frobenius norms: of what there was, and of what was lost when its rank was cut."""

    energy: float
    lost: float


class LowRank(NamedTuple):
    """A merged update as ``b @ a``: a (r, i), b (o, r), float32.

    ``cut`` says what a rule lost that cuts the updates to a rank before it merges them.
    """

    a: Tensor
    b: Tensor
    cut: Cut | None = None

    def energy(self) -> float:
        """‖b a‖² = tr((a aᵀ)(bᵀ b)), without forming ``b @ a``."""
        a, b = self.a.double(), self.b.double()
        return max(0.0, float(((a @ a.T) * (b.T @ b)).sum()))

    def norm(self) -> float:
        """‖b a‖."""
        return math.sqrt(self.energy())


class MergeRule(Protocol):
    """A merge method; any function that keeps this can be given as ``method``."""

    def __call__(self, updates: Sequence[Update], /) -> LowRank | Tensor:
        """Merged update of one module, as factors or as ΔW itself, (o, i) float32.

        Args:
            updates: one for each expert that adapts the module, in an order that does not depend
                on the order in which the experts were given. Other experts have ΔW zero here.
        """
        ...


def check_share(name: str, value: float) -> None:
    """Refuse a share that is not in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} is {value!r}; it takes a share in (0, 1], such as 0.2")
