"""The usual gate of a mixture of experts: a softmax over products of token and expert.

Scores are (W_h x)·(W_e e_e) with a learned embedding e_e of each expert, top-k of a softmax as in
https://arxiv.org/abs/1701.06538. Called rkhs in older libraries.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mttl_routing.routers.learned import Draw, Parameters, ScoringRouter, together
from mttl_routing.routers.protocol import Layer


class Softmax(ScoringRouter):
    """Scores (W_h x)·(W_e e_e) of the token and the expert, apart for each layer.

    ``hidden`` is the size of the embeddings.
    """

    per_expert = ("embeddings",)

    def begin(self, widths: Mapping[str, int], hidden: int, draw: Draw) -> None:
        """Draw W_h (d, i), W_e (d, d) and the embeddings (e, d)."""
        self.of_token = Parameters({path: draw(hidden, width) for path, width in widths.items()})
        self.of_expert = Parameters({path: draw(hidden, hidden) for path in widths})
        self.embeddings = Parameters({path: draw(len(self.names), hidden) for path in widths})

    def scores(self, x: Tensor, layer: Layer) -> Tensor:
        """(t, n)."""
        here = layer.module
        x, of_token, of_expert, embeddings = together(
            x, self.of_token.of(here), self.of_expert.of(here), self.embeddings.of(here)
        )
        keys = embeddings[self.lines(layer, x.device)] @ of_expert.T  # (n, d)
        return x @ of_token.T @ keys.T
