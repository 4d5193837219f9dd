"""Every expert for every token, in equal shares: the baseline that a router must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from mttl_adapters.chosen import Chosen
from mttl_routing.routers.protocol import Layer, Rows


class Uniform:
    """Gates 1/N; the same function as the uniform merge, computed expert by expert."""

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Chosen:
        """One line for all tokens. An expert that leaves the layer alone counts, with ΔW zero."""
        experts = torch.tensor([layer.enabled], device=x.device, dtype=torch.long)
        weights = torch.full(experts.shape, 1.0 / max(1, experts.shape[1]), device=x.device)
        return Chosen(experts, weights, len(x))
