"""Which experts each token gets, and how much of each: gates without the zeros.

A router that chose k of e experts says so in k numbers a token; nothing of size (t, e) is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1
"""In place of an expert's index: nothing. Lines with fewer experts than others have some."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Experts and their weights for each line, a line being one token or several in succession.

    Attributes:
        experts: (l, k) int64, indices into a bank; :data:`NONE` is no expert.
        weights: (l, k) float, finite, what each is multiplied by, its own scaling aside. Gradients
            reach every one of them that has an expert, those of 0 as well.
        tokens: how many tokens each line speaks for. Tokens follow one another, so the rows of a
            batch that share a sequence length are lines of that many tokens.
    """

    experts: Tensor
    weights: Tensor
    tokens: int = 1

    def __post_init__(self) -> None:
        """Check shapes and dtypes; the bank that computes checks the indices."""
        if self.experts.dim() != 2 or self.experts.shape != self.weights.shape:
            raise ValueError(
                f"got experts {tuple(self.experts.shape)} and weights {tuple(self.weights.shape)}; "
                "both want the same (lines, k)"
            )
        if self.experts.dtype != torch.int64 or not self.weights.dtype.is_floating_point:
            raise TypeError(
                f"got experts of {self.experts.dtype} and weights of {self.weights.dtype}; "
                "they want torch.int64 and a float"
            )
        if self.tokens < 0:
            raise ValueError(f"a line speaks for {self.tokens!r} tokens; it takes 0 or more")

    @classmethod
    def from_dense(cls, gates: Tensor) -> Chosen:
        """The gates (t, e) that are not 0, k as many as the fullest line has."""
        counts = torch.count_nonzero(gates, dim=1)
        k = int(counts.max()) if counts.numel() else 0
        kept = torch.topk((gates != 0).to(torch.int8), k, dim=1).indices.sort(dim=1).values
        weights = gates.gather(1, kept)
        return cls(kept.masked_fill(weights == 0, NONE), weights)

    @classmethod
    def for_rows(
        cls, experts: Tensor | list[int], tokens: int, weights: Tensor | None = None
    ) -> Chosen:
        """One line a row of a batch, every row of ``tokens`` tokens: a batch of named experts.

        Args:
            experts: (b,) or (b, k).
            tokens: tokens of each row.
            weights: of the shape of ``experts``; 1 by default.
        """
        experts = torch.as_tensor(experts, dtype=torch.int64)
        experts = experts.unsqueeze(1) if experts.dim() == 1 else experts
        if weights is None:
            weights = torch.ones(experts.shape, device=experts.device)
        return cls(experts, weights.view(experts.shape), tokens)

    @property
    def n_tokens(self) -> int:
        """Tokens of all lines together."""
        return self.experts.shape[0] * self.tokens

    def each(self) -> Chosen:
        """The same with one line a token."""
        if self.tokens == 1:
            return self
        return Chosen(
            self.experts.repeat_interleave(self.tokens, dim=0),
            self.weights.repeat_interleave(self.tokens, dim=0),
        )

    def dense(self, n_experts: int) -> Tensor:
        """Gates (t, e), 0 for every expert left out; an expert named twice has the sum."""
        lines = self.weights.new_zeros(self.experts.shape[0], n_experts + 1)
        column = torch.where(self.experts < 0, n_experts, self.experts)
        lines = lines.scatter_add(1, column, self.weights)[:, :n_experts]
        return lines if self.tokens == 1 else lines.repeat_interleave(self.tokens, dim=0)
