"""Product keys, as in PEER (https://arxiv.org/abs/2407.04153): two short searches for a long one.

The experts stand in a grid; the score of the one in line a and column b is q₁·k_a + q₂·k'_b for the
two halves q₁, q₂ of a token's query. The best k of all then lie among the best k lines and columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mttl_adapters.chosen import Chosen
from mttl_experts import Expert
from mttl_routing.routers.learned import Draw, Parameters, ScoringRouter, together
from mttl_routing.routers.protocol import Layer, Rows


class ProductKey(ScoringRouter):
    """Scores of experts in a grid of ⌈√N⌉ columns: expert n in line n // ⌈√N⌉, column n % ⌈√N⌉.

    N need not be a square: the last line is then cut short, and searched by itself. One query a
    token; PEER's normalisation of queries over a batch is left out, for a token's gates may not
    rest on its neighbours. ``hidden`` is the size of a query, which is even.
    """

    def begin(self, widths: Mapping[str, int], hidden: int, draw: Draw) -> None:
        """Draw W_q (d, i), and the keys (lines, d/2) and (columns, d/2)."""
        if hidden < 2 or hidden % 2:
            raise ValueError(f"hidden is {hidden!r}; a query has two halves, so it is even")
        self.side = math.isqrt(max(0, len(self.names) - 1)) + 1
        n_lines, half = -(-len(self.names) // self.side), hidden // 2
        self.query = Parameters({path: draw(hidden, width) for path, width in widths.items()})
        self.first = Parameters({path: draw(n_lines, half) for path in widths})
        self.second = Parameters({path: draw(self.side, half) for path in widths})

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Chosen:
        """(t, k) experts, the best first, and their weights."""
        whole = len(layer.present) == len(self.names)
        if self.choice.needs_all or not whole:  # a grid with holes
            return super().gates(x, layer, rows)
        best, places = self._best(*self._halves(x, layer, rows))
        return self.choice.among(best, places, self._columns_of_places(layer, x.device))

    def scores(self, x: Tensor, layer: Layer) -> Tensor:
        """(t, n)."""
        return self._all(*self._of_halves(x, layer), self.lines(layer, x.device))

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """As for every learned router, but that no expert can leave the grid."""
        gone = set(removed) - {expert.name for expert in added}
        if gone:
            raise ValueError(
                f"expert {min(gone)!r} has a place in the grid of product keys, which would have a "
                "hole without it; disable() it, or make the routed model anew"
            )
        super().follow(added, removed)

    def _scores(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        return self._all(*self._halves(x, layer, rows), self.lines(layer, x.device))

    def _halves(self, x: Tensor, layer: Layer, rows: Rows) -> tuple[Tensor, Tensor]:
        return rows.once((self, "halves", layer.module), lambda: self._of_halves(x, layer))

    def _of_halves(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        """Scores (t, lines) and (t, columns) of the halves of the queries."""
        here = layer.module
        x, query, first, second = together(
            x, self.query.of(here), self.first.of(here), self.second.of(here)
        )
        one, two = (x @ query.T).chunk(2, dim=1)
        return one @ first.T, two @ second.T

    def _all(self, one: Tensor, two: Tensor, places: Tensor) -> Tensor:
        return one[:, places // self.side] + two[:, places % self.side]

    def _best(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        """The ``top_k`` best scores (t, k), falling, and their places: exactly those of all."""
        k, full = self.choice.top_k, len(self.names) // self.side  # lines that are not cut short
        found = []
        for first, start, n_columns in (
            (one[:, :full], 0, self.side),
            (one[:, full:], full, len(self.names) - full * self.side),
        ):
            if first.shape[1] and n_columns:
                a = first.topk(min(k, first.shape[1]), dim=1)
                b = two[:, :n_columns].topk(min(k, n_columns), dim=1)
                scores = a.values.unsqueeze(2) + b.values.unsqueeze(1)
                places = (a.indices + start).unsqueeze(2) * self.side + b.indices.unsqueeze(1)
                found.append((scores.flatten(1), places.flatten(1)))
        scores = torch.cat([each for each, _ in found], dim=1)
        places = torch.cat([each for _, each in found], dim=1)
        best = scores.topk(min(k, scores.shape[1]), dim=1)
        return best.values, places.gather(1, best.indices)

    def _columns_of_places(self, layer: Layer, device: torch.device) -> Tensor:
        def made() -> Tensor:
            return self.columns(layer, device)[self.lines(layer, device).argsort()]

        return layer.once((self, "columns of places", device), made)
