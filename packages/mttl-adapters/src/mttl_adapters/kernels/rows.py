"""Sums over experts in plain torch without a loop over them: one over slabs, of which few are.

What a token is multiplied with is a bag of rows, in the words of ``embedding_bag``: B h is a
weighted sum of rows, and A x, a product with each row, is what that function's gradient in the
weights computes. No gradients go through here. The device is waited for only where experts that
came later lie in slabs of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mttl_adapters.chosen import NONE, Chosen
from mttl_adapters.kernels.torch import LINE
from mttl_adapters.slabs import Run

# Tokens whose updates are held at a time.
TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the rows of the experts of one slab lie.

    Attributes:
        a: (R, i), all rows of A.
        b: (R, o), all rows of B's transpose.
        numbers: (e,) int64, which of this slab's each of all experts is, -1 for those that lie
            elsewhere; None where all lie here.
        places: (n, r) int64, the rows of each of this slab's experts, r the largest rank; what pads
            a rank are some of its rows again.
        scalings: (n + 1, r) float, of each of those, and 0 for what pads a rank; the last line is
            all 0, since that is what :data:`NONE`, -1, finds there.
    """

    a: Tensor
    b: Tensor
    numbers: Tensor | None
    places: Tensor
    scalings: Tensor

    @classmethod
    def of(
        cls, slab: int, a: Tensor, b: Tensor, runs: Sequence[Run], scalings: Sequence[float]
    ) -> Rows:
        """Those of the experts that lie in one ``slab``, of rows ``a`` (R, i) and ``b`` (R, o)."""
        here = [expert for expert, run in enumerate(runs) if run.slab == slab]
        numbers = None
        if len(here) < len(runs):
            numbers = torch.full((len(runs),), NONE)
            numbers[here] = torch.arange(len(here))
            numbers = numbers.to(a.device)
        starts = torch.tensor([runs[expert].start for expert in here]).unsqueeze(1)
        ranks = torch.tensor([runs[expert].rank for expert in here]).unsqueeze(1)
        place = torch.arange(int(ranks.max()))
        scaled = torch.tensor([scalings[e] for e in here]).unsqueeze(1) * (place < ranks)
        scaled = torch.cat([scaled, torch.zeros_like(scaled[:1])])
        places = (starts + place.minimum(ranks - 1)).clamp(min=0)
        return cls(a, b, numbers, places.to(a.device), scaled.to(a.device))

    def found(self, experts: Tensor) -> Tensor:
        """Experts as this slab counts them, :data:`NONE` for those that lie elsewhere."""
        if self.numbers is None:
            return experts
        return self.numbers[experts].masked_fill_(experts < 0, NONE)

    def bags(self, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (n, k r) of the experts (n, k), and what each counts; 0 for what pads a rank."""
        scaled = self.scalings[experts] * weights.unsqueeze(2)
        return self.places[experts].flatten(1), scaled.flatten(1)

    def update(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """What the experts (n, k) of each token make of it, (n, o)."""
        bags, scaled = self.bags(experts, weights)
        rows = bags.flatten()
        begin, bag_of = _bounds(*bags.shape, x.device)
        hidden = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, self.a, rows, begin, bag_of, 0
        )
        hidden = (hidden * scaled.flatten()).to(x.dtype)
        return torch.embedding_bag(self.b, rows, begin, False, 0, False, hidden)[0]


@lru_cache(maxsize=16)
def _bounds(bags: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each of so many bags begins, and the bag of each row."""
    with torch.inference_mode(False):  # whoever computes next may want a gradient
        number = torch.arange(bags, device=device)
        return number * width, number.repeat_interleave(width)


def add_to(out: Tensor, x: Tensor, slabs: Sequence[Rows], chosen: Chosen) -> Tensor:
    """``out`` (t, o), in place, with what the chosen experts make of x (t, i)."""
    slabs = [rows for rows in slabs if rows.places.numel()]
    if not slabs or not chosen.experts.numel():
        return out
    if chosen.tokens >= LINE:
        for rows in slabs:
            _by_line(out, x, rows, chosen)
        return out
    chosen = chosen.each()
    if len(out) <= TOKENS:
        _by_token(out, x, chosen.experts, chosen.weights, slabs)
        return out
    for first in range(0, len(out), TOKENS):
        part = slice(first, first + TOKENS)
        _by_token(out[part], x[part], chosen.experts[part], chosen.weights[part], slabs)
    return out


def _by_token(
    out: Tensor, x: Tensor, experts: Tensor, weights: Tensor, slabs: Sequence[Rows]
) -> None:
    """For some tokens, few enough to hold what the experts of one slab make of all of them."""
    most, *others = slabs
    update = most.update(x, most.found(experts), weights)
    for rows in others:
        found = rows.found(experts)
        those = (found >= 0).any(1).nonzero().squeeze(1)
        if len(those):
            update.index_add_(0, those, rows.update(x[those], found[those], weights[those]))
    out.add_(update)


def _by_line(out: Tensor, x: Tensor, rows: Rows, chosen: Chosen) -> None:
    """Tokens of a line share their experts, so a line is one pair of products."""
    bags, scaled = rows.bags(rows.found(chosen.experts), chosen.weights)  # (l, k r)
    lines = (len(bags), chosen.tokens)
    hidden = torch.bmm(x.view(*lines, x.shape[1]), rows.a[bags].transpose(1, 2))
    hidden = (hidden * scaled.unsqueeze(1)).to(x.dtype)
    if out.dtype == x.dtype:
        out.view(*lines, out.shape[1]).baddbmm_(hidden, rows.b[bags])
    else:
        out.add_(torch.bmm(hidden, rows.b[bags]).view(out.shape))
