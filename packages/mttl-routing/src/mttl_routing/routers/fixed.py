"""The same experts for every token, as the caller says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mttl_adapters.chosen import Chosen
from mttl_routing.routers.protocol import Layer, Rows


class Fixed:
    """Gates that never change.

    Args:
        weights: the gate of each expert, by name; others get none. A name alone has gate 1.
    """

    def __init__(self, weights: str | Mapping[str, float]) -> None:
        """Keep the weights."""
        self.weights = {weights: 1.0} if isinstance(weights, str) else dict(weights)

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Chosen:
        """One line for all tokens."""
        unknown = [name for name in self.weights if name not in layer.experts]
        if unknown:
            raise ValueError(
                f"no expert {unknown[0]!r} in this model; there are "
                f"{', '.join(map(repr, layer.experts[:5]))}"
            )
        columns = [layer.experts.index(name) for name in self.weights]
        return Chosen(
            torch.tensor([columns], device=x.device, dtype=torch.long),
            torch.tensor([list(self.weights.values())], device=x.device),
            len(x),
        )
