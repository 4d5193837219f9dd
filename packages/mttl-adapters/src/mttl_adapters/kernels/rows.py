"""Sums over experts in plain torch without a loop over them, where all lie in one slab.

What a token is multiplied with is a bag of rows, in the words of ``embedding_bag``: B h is a
weighted sum of rows, and A x, a product with each row, is what that function's gradient in the
weights computes. No gradients go through here, and the device is never waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mttl_adapters.chosen import Chosen
from mttl_adapters.kernels.torch import LINE

# Tokens whose updates are held at a time.
TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the rows of each expert lie.

    Attributes:
        a: (R, i), all rows of A.
        b: (R, o), all rows of B's transpose.
        starts: (e,) int64, the first row of each expert.
        ranks: (e,) int64; None where all are the widest.
        scalings: (e,) float.
        widest: the largest rank.
    """

    a: Tensor
    b: Tensor
    starts: Tensor
    ranks: Tensor | None
    scalings: Tensor
    widest: int

    def bags(self, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (n, k r) of the experts (n, k), and what each counts; 0 for what pads a rank."""
        place = torch.arange(self.widest, device=experts.device)
        starts = self.starts[experts].unsqueeze(2)
        scaled = torch.where(experts < 0, 0, weights * self.scalings[experts]).unsqueeze(2)
        rows = starts + place  # (n, k, r)
        if self.ranks is not None:
            ranks = self.ranks[experts].unsqueeze(2)
            rows = rows.minimum((starts + ranks - 1).clamp(min=0))
            scaled = torch.where(place < ranks, scaled, 0)
        return rows.flatten(1), scaled.expand(rows.shape).flatten(1)

    def update(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """What the experts (n, k) of each token make of it, (n, o)."""
        bags, scaled = self.bags(experts, weights)
        tokens = torch.arange(len(bags), device=x.device)
        hidden = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, self.a, bags.flatten(), tokens, tokens.repeat_interleave(bags.shape[1]), 0
        )
        hidden = (hidden.view(bags.shape) * scaled).to(x.dtype)
        return functional.embedding_bag(bags, self.b, per_sample_weights=hidden, mode="sum")


def add_to(out: Tensor, x: Tensor, rows: Rows, chosen: Chosen) -> Tensor:
    """``out`` (t, o), in place, with what the chosen experts make of x (t, i)."""
    if not rows.widest or not chosen.experts.numel():
        return out
    if chosen.tokens >= LINE:
        return _by_line(out, x, rows, chosen)
    chosen = chosen.each()
    for some in range(0, len(out), TOKENS):
        part = slice(some, some + TOKENS)
        out[part].add_(rows.update(x[part], chosen.experts[part], chosen.weights[part]))
    return out


def _by_line(out: Tensor, x: Tensor, rows: Rows, chosen: Chosen) -> Tensor:
    """Tokens of a line share their experts, so a line is one pair of products."""
    bags, scaled = rows.bags(chosen.experts, chosen.weights)  # (l, k r)
    lines = (len(bags), chosen.tokens)
    hidden = torch.bmm(x.view(*lines, x.shape[1]), rows.a[bags].transpose(1, 2))
    hidden = (hidden * scaled.unsqueeze(1)).to(x.dtype)
    if out.dtype == x.dtype:
        out.view(*lines, out.shape[1]).baddbmm_(hidden, rows.b[bags])
        return out
    return out.add_(torch.bmm(hidden, rows.b[bags]).view(out.shape))
