"""A dense gate by a small network: every expert gets its share of every token.

The head of X-LoRA (https://arxiv.org/abs/2402.07148) is such a network, but it reads the hidden
states of a first pass through the base alone. Each new token would then take two passes and two
caches, so here the network reads the layer's own input: one pass, and the cache changes nothing.
It is another function than X-LoRA's, and so it does not bear that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mttl_routing.routers.choice import Choice
from mttl_routing.routers.learned import Draw, Parameters, ScoringRouter, together
from mttl_routing.routers.protocol import Layer


class Mlp(ScoringRouter):
    """Scores W_2 relu(W_1 x + b_1) + b_2, apart for each layer, and a softmax over all experts.

    Args:
        names: of the experts.
        widths: size of the input of each module that they adapt, by module path.
        temperature: of the softmax.
        hidden: size between the two maps.
        seed: of the initial values.
    """

    per_expert = ("second", "second_bias")

    def __init__(
        self,
        names: Sequence[str],
        widths: Mapping[str, int],
        temperature: float = 1.0,
        *,
        hidden: int = 64,
        seed: int = 0,
    ) -> None:
        """Have a choice of all of them."""
        every = Choice(max(1, len(names)), temperature)
        super().__init__(names, widths, every, hidden=hidden, seed=seed)

    def begin(self, widths: Mapping[str, int], hidden: int, draw: Draw) -> None:
        """Draw W_1 (d, i) and W_2 (e, d); the biases are zeros."""
        self.first = Parameters({path: draw(hidden, width) for path, width in widths.items()})
        self.first_bias = Parameters({path: torch.zeros(hidden) for path in widths})
        self.second = Parameters({path: draw(len(self.names), hidden) for path in widths})
        self.second_bias = Parameters({path: torch.zeros(len(self.names)) for path in widths})

    def scores(self, x: Tensor, layer: Layer) -> Tensor:
        """(t, n)."""
        here = layer.module
        x, first, first_bias, second, second_bias = together(
            x,
            self.first.of(here),
            self.first_bias.of(here),
            self.second.of(here),
            self.second_bias.of(here),
        )
        lines = self.lines(layer, x.device)
        hidden = nn.functional.linear(x, first, first_bias).relu()  # (t, d)
        return nn.functional.linear(hidden, second[lines], second_bias[lines])
