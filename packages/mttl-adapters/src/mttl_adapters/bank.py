"""Many low-rank experts of one layer as two stacked matrices, applied by one gate for each token.

Pure functions over tensors: nothing here knows a model, a library or a router. Which experts a
token gets, and how much of each, is the caller's business and comes in as ``gates``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

# What the two ways of `Bank.apply` cost, in multiply-adds of the dense one. Fitted to timings on 2
# CPU cores, float32, layers of 576 to 2048 features, rank 16, 8 to 128 experts, 8 to 1024 tokens:
# dense is then ahead up to 8 to 16 experts in prefill, up to 32 to 64 when 8 rows decode.
DENSE_TOKENS = 24  # fewer tokens cost as much: the stacks must be read once
GATHER_RANKS = 48  # fetching a chosen token and adding its result costs as much as these ranks
GROUP_COST = 2_500_000  # what one expert's pair of small products costs beside its arithmetic


@dataclass(frozen=True)
class Bank:
    """Rank-stacked factors of ``e`` experts for one layer; their ranks may differ, and may be 0.

    An expert that leaves the layer alone is an expert of rank 0: it keeps its column in the gates
    and costs nothing.

    Attributes:
        a: (R, i), the rows of every expert's A below one another, R the sum of the ranks.
        b: (o, R), the columns of every expert's B side by side, without the scaling.
        scalings: s_e of every expert.
        ranks: rank of every expert, in the order of the gates' columns.
    """

    a: Tensor
    b: Tensor
    scalings: tuple[float, ...]
    ranks: tuple[int, ...]

    @classmethod
    def from_factors(
        cls,
        factors: Sequence[tuple[Tensor, Tensor, float]],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Bank:
        """Bank of experts given as ``(a (r, i), b (o, r), scaling)``, in that order.

        Args:
            factors: at least one expert.
            dtype: what to keep the stacks in; ``None`` is the widest dtype among the factors.
            device: where to keep them; ``None`` is where the first expert lies.
        """
        if not factors:
            raise ValueError("a bank needs at least one expert, got none")
        features = (factors[0][1].shape[0], factors[0][0].shape[1])
        for index, (a, b, _) in enumerate(factors):
            if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != features:
                raise ValueError(
                    f"expert {index} has A {tuple(a.shape)} and B {tuple(b.shape)}; "
                    f"this bank wants A (r, {features[1]}) and B ({features[0]}, r)"
                )
        if dtype is None:
            dtype = factors[0][0].dtype
            for a, b, _ in factors:
                dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
        device = factors[0][0].device if device is None else device
        return cls(
            a=torch.cat([a.to(device, dtype) for a, _, _ in factors]),
            # Stacked as (R, o), so that one expert's columns are one run of memory.
            b=torch.cat([b.to(device, dtype).T for _, b, _ in factors]).T,
            scalings=tuple(float(scaling) for _, _, scaling in factors),
            ranks=tuple(a.shape[0] for a, _, _ in factors),
        )

    def __len__(self) -> int:
        """How many experts it holds."""
        return len(self.ranks)

    @property
    def in_features(self) -> int:
        """Size of the layer's input."""
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return self.b.shape[0]

    def to(self, device: torch.device | str) -> Bank:
        """The same bank on ``device``; itself where it is there already."""
        if self.a.device == torch.device(device):
            return self
        return replace(self, a=self.a.to(device), b=self.b.T.to(device).T)

    def factors(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Every expert's ``(a (r, i), b (o, r), scaling)``, as views of the stacks."""
        bounds = pairwise(accumulate(self.ranks, initial=0))
        for (start, end), scaling in zip(bounds, self.scalings, strict=True):
            yield self.a[start:end], self.b[:, start:end], scaling

    def apply(self, x: Tensor, gates: Tensor) -> Tensor:
        """What the experts add to the layer's output: Σ_e g_e s_e B_e A_e x for each token.

        Two dense products over all ranks where there are few experts or most of them are chosen,
        else :meth:`apply_grouped`, which costs what the chosen experts cost.

        Args:
            x: (t, i). Computed in the wider of its dtype and the bank's, so a bfloat16 input
                meets float32 factors in float32.
            gates: (t, e); 0 leaves an expert out. Its gate then gets no gradient on the grouped
                path, as with any router that chooses.

        Returns:
            (t, o) in the wider of the two dtypes, for the caller to add before rounding.
        """
        self._check(x, gates)
        tokens = x.shape[0]
        # Counting what was chosen waits for the device, so only where one choice each would pay.
        if self._grouped_pays(tokens, chosen=tokens) and self._grouped_pays(
            tokens, chosen=int(torch.count_nonzero(gates))
        ):
            return self.apply_grouped(x, gates)
        return self.apply_dense(x, gates)

    def apply_dense(self, x: Tensor, gates: Tensor) -> Tensor:
        """:meth:`apply` by two products over all ranks, the gates repeated for each rank."""
        self._check(x, gates)
        dtype = torch.promote_types(x.dtype, self.a.dtype)
        hidden = x.to(dtype) @ self.a.to(dtype).T  # (t, R)
        hidden = (hidden * self._per_rank(gates)).to(dtype)
        return hidden @ self.b.to(dtype).T

    def apply_grouped(self, x: Tensor, gates: Tensor) -> Tensor:
        """:meth:`apply` by one pair of products for each expert that some token chose.

        The sums over experts are kept in float32 at least.
        """
        self._check(x, gates)
        dtype = torch.promote_types(x.dtype, self.a.dtype)
        x = x.to(dtype)
        out = x.new_zeros(
            (x.shape[0], self.out_features), dtype=torch.promote_types(dtype, torch.float32)
        )
        # Transposed, so that the pairs come out sorted by expert and each token at most once in
        # each group: the sums below meet no two writes to one row, and their order is fixed.
        expert_of, token_of = torch.nonzero(gates.T, as_tuple=True)
        counts = torch.bincount(expert_of, minlength=len(self)).tolist()
        groups = torch.split(token_of, counts)
        for index, ((a, b, scaling), tokens) in enumerate(zip(self.factors(), groups, strict=True)):
            if tokens.numel() == 0 or a.shape[0] == 0:
                continue
            gate = gates[tokens, index].unsqueeze(1) * scaling
            hidden = x[tokens] @ a.to(dtype).T  # (chosen t, r)
            update = (hidden * gate).to(dtype) @ b.to(dtype).T
            out.index_add_(0, tokens, update.to(out.dtype))
        return out.to(dtype)

    def apply_before(self, x: Tensor, gates: Tensor) -> Tensor:
        """(Σ_e g_e s_e B_e)(Σ_e g_e A_e) x: factors averaged before they are multiplied.

        Not the mean of the experts' outputs: it adds the cross terms B_e A_f. Kept for comparison
        with numbers published for it; :meth:`apply` is the right one everywhere else. The experts
        must be of one rank, those of rank 0 aside.

        Shapes and dtypes are those of :meth:`apply`.
        """
        self._check(x, gates)
        present = [index for index, rank in enumerate(self.ranks) if rank > 0]
        ranks = {self.ranks[index] for index in present}
        if len(ranks) > 1:
            raise ValueError(
                f"combine='before' averages factors, so it wants experts of one rank; "
                f"these have ranks {sorted(ranks)!r}: use combine='after'"
            )
        dtype = torch.promote_types(x.dtype, self.a.dtype)
        if not present:
            return x.new_zeros((x.shape[0], self.out_features), dtype=dtype)
        gates = gates[:, present]
        scalings = gates.new_tensor([self.scalings[index] for index in present])
        hidden = x.to(dtype) @ self.a.to(dtype).T
        hidden = hidden.view(x.shape[0], len(present), ranks.pop())  # (t, e, r)
        mixed = (hidden * gates.unsqueeze(2)).sum(dim=1, keepdim=True)  # (t, 1, r)
        hidden = (mixed * (gates * scalings).unsqueeze(2)).flatten(1)  # (t, R)
        out: Tensor = hidden.to(dtype) @ self.b.to(dtype).T
        return out

    def _grouped_pays(self, tokens: int, chosen: int) -> bool:
        """Whether sort-and-group is cheaper for so many tokens, and so many choices among them."""
        features = self.in_features + self.out_features
        dense = max(tokens, DENSE_TOKENS) * self.a.shape[0] * features
        mean_rank = self.a.shape[0] / len(self)
        arithmetic = chosen * (mean_rank + GATHER_RANKS) * features
        return arithmetic + min(chosen, len(self)) * GROUP_COST < dense

    def _per_rank(self, gates: Tensor) -> Tensor:
        """(t, e) gates as (t, R), times the scalings."""
        scaled = gates * gates.new_tensor(self.scalings)
        if len(self) == 1:
            return scaled  # broadcasts over the ranks
        ranks = torch.tensor(self.ranks, device=gates.device)
        return scaled.repeat_interleave(ranks, dim=1, output_size=self.a.shape[0])

    def _check(self, x: Tensor, gates: Tensor) -> None:
        if x.shape != (gates.shape[0], self.in_features) or gates.shape[1:] != (len(self),):
            raise ValueError(
                f"got x {tuple(x.shape)} and gates {tuple(gates.shape)}; "
                f"this bank wants x (t, {self.in_features}) and gates (t, {len(self)})"
            )
