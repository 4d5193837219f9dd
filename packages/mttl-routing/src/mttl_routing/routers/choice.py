"""From scores to gates: which experts a token gets, and how much of each.

The one place where routers that compare scores turn them into gates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mttl_adapters.chosen import NONE, Chosen


@dataclass(frozen=True)
class Choice:
    """The ``top_k`` experts of the highest scores, weighted by a softmax over those kept.

    Attributes:
        top_k: experts a token gets at most; all, where there are fewer.
        temperature: scores are divided by it first; the higher, the more equal the weights.
        top_p: keep only the fewest best experts whose softmax over all experts reaches this.
        threshold: then leave out experts whose share is smaller than this, and share anew among
            the others; the best one stays in any case.
        null: put in the base itself, as one more expert whose score is 0. It is kept or left out,
            and takes its share, as any other; its share goes to nobody.
    """

    top_k: int = 4
    temperature: float = 1.0
    top_p: float | None = None
    threshold: float | None = None
    null: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k!r}; it takes a whole number from 1")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature is {self.temperature!r}; it takes a number above 0")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p!r}; it takes a number above 0 and up to 1")
        if self.threshold is not None and not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"threshold is {self.threshold!r}; it takes 0 to below 1")

    def of(self, scores: Tensor, columns: Tensor | None = None) -> Chosen:
        """Gates from the scores of the experts that stand to choice.

        Args:
            scores: (t, n), the higher the better, in float32 at least.
            columns: (n,) int64, which expert each score is for; None is the first n.

        Returns:
            (t, k) experts, the best first. The weights of a token sum to 1, less the share of the
            base where ``null`` is set; there are none where n is 0. Gradients go into the scores of
            the experts kept.
        """
        top = scores.topk(min(self.top_k, scores.shape[1]), dim=1)
        return self.among(top.values, top.indices, columns, scores if self.needs_all else None)

    def among(
        self,
        best: Tensor,
        indices: Tensor,
        columns: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Chosen:
        """:meth:`of`, from the ``top_k`` best scores alone.

        Args:
            best: (t, k), falling.
            indices: (t, k), which of the n scores they are.
            columns: (n,), as for :meth:`of`.
            scores: (t, n), all of them; wanted where :attr:`needs_all`.
        """
        experts = indices if columns is None else columns[indices]
        if self.temperature != 1.0:
            best = best / self.temperature
        if not (self.null or self.top_p or self.threshold):  # all k are kept
            return Chosen(experts, best.softmax(dim=1))
        if self.null:
            best, experts = self._with_base(best, experts)
        if self.top_p is not None and best.shape[1]:
            if scores is None:
                raise ValueError("top_p rests on the softmax over all scores; give scores")
            best = self._nucleus(best, scores / self.temperature, self.top_p)
        weights = best.softmax(dim=1)
        if self.threshold is not None and best.shape[1]:
            small = weights < self.threshold
            small[:, 0] = False
            best = best.masked_fill(small, -torch.inf)
            weights = best.softmax(dim=1)
        return Chosen(experts.masked_fill(best == -torch.inf, NONE), weights)

    @property
    def needs_all(self) -> bool:
        """Whether the gates rest on the scores of experts that are not chosen, too."""
        return self.top_p is not None

    def _with_base(self, best: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The best with the base among them, again falling and at most ``top_k``."""
        best = torch.cat([best, best.new_zeros(len(best), 1)], dim=1)
        experts = torch.cat([experts, experts.new_full((len(best), 1), NONE)], dim=1)
        top = best.topk(min(self.top_k, best.shape[1]), dim=1)
        return top.values, experts.gather(1, top.indices)

    def _nucleus(self, best: Tensor, scores: Tensor, top_p: float) -> Tensor:
        """The best with -inf for those that the better ones make unnecessary."""
        if self.null:
            scores = torch.cat([scores, scores.new_zeros(len(scores), 1)], dim=1)
        shares = (best - scores.logsumexp(dim=1, keepdim=True)).exp()
        before = shares.cumsum(dim=1) - shares
        before[:, 0] = 0.0  # exactly, so that the first stays
        return best.masked_fill(before >= top_p, -torch.inf)
