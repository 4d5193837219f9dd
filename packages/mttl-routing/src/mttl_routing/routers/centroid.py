"""Each token to the experts whose own data it resembles: Arrow's baseline by mean activations.

The centroid of an expert at a layer is the mean input of that layer on the expert's data
(https://arxiv.org/abs/2405.11157, as ``avg_act`` in its code).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from mttl_experts import Expert
from mttl_routing.routers.data import Batch, watch
from mttl_routing.routers.vectors import VectorRouter

RECIPE = {"kind": "input-centroids", "format": 1}


def centroids(base: object, expert: Expert, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean input of each module that an expert adapts, over all tokens of its data that count.

    Args:
        base: the base model, bare or from ``load_base_model``; the expert is put in meanwhile.
        expert: whose modules are looked at.
        batches: its data, at least one; see :data:`~mttl_routing.routers.data.Batch`.

    Returns:
        (i,) float32 by module path.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(module: str, x: Tensor) -> None:
        total = x.double().sum(0)
        sums[module] = total if module not in sums else sums[module] + total
        counts[module] = counts.get(module, 0) + len(x)

    watch(base, expert, batches, see)
    return {module: (sums[module] / max(1, counts[module])).float().cpu() for module in sums}


class Centroid(VectorRouter):
    """Scores ⟨x, c_e⟩/√i of the token and the expert's centroid, both at unit length.

    Args:
        vectors: :func:`centroids` of each expert, by expert name.
        choice: how scores become gates.
    """

    def key(self, vector: Tensor) -> Tensor:
        """The centroid at unit length."""
        return functional.normalize(vector, dim=0)

    def scale(self, x: Tensor) -> Tensor:
        """1/(‖x‖√i)."""
        lengths: Tensor = x.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1])
        return 1.0 / lengths.clamp_min(torch.finfo(torch.float32).tiny)
