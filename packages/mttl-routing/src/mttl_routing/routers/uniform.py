"""Every expert for every token, in equal shares: the baseline that a router must beat."""

from __future__ import annotations

from torch import Tensor

from mttl_routing.routers.protocol import Layer, Rows


class Uniform:
    """Gates 1/N; the same function as the uniform merge, computed expert by expert."""

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        """(t, e), all 1/e, e those switched on. One that leaves the layer alone counts, as zero."""
        share = x.new_ones(()).float().div(len(layer.enabled))
        return share.expand(x.shape[0], len(layer.experts))
