"""Compress then Merge (https://arxiv.org/abs/2606.03723): the rank is cut before the merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mttl_routing.merges.rule import Cut, LowRank, MergeRule, Update
from mttl_routing.merges.spaces import bases, lifted, projected

_MOST_ROUNDS = 1000
_TOLERANCE = 1e-6  # change of the relative error at which the rounds end, as in the authors' code

_Factors = list[tuple[Tensor, Tensor]]


def leading(pieces: list[Tensor], rank: int) -> Tensor:
    """First ``rank`` left singular vectors of all pieces beside each other, float64."""
    gram = torch.zeros(pieces[0].shape[0], pieces[0].shape[0], dtype=torch.float64)
    for piece in pieces:
        gram.addmm_(piece, piece.T)
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].flip(1)


def shared_subspaces(cores: _Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Tucker-2 subspaces of a stack of matrices b @ a, by HOSVD and then HOOI, float64.

    U (k, rank) and V (l, rank) with orthonormal columns, for which Σ ‖Uᵀ b a V‖² is as large as
    alternating can make it.
    """
    # Each matrix up to a rotation of the other side, which leading() does not see.
    lefts = [b @ torch.linalg.qr(a.T, mode="r").R.T for b, a in cores]
    rights = [a.T @ torch.linalg.qr(b, mode="r").R.T for b, a in cores]
    total = float(sum(left.square().sum() for left in lefts))
    u, v = leading(lefts, rank), leading(rights, rank)
    error = None
    for _ in range(_MOST_ROUNDS):
        u = leading([b @ (a @ v) for b, a in cores], rank)
        v = leading([a.T @ (b.T @ u) for b, a in cores], rank)
        kept = float(sum(((u.T @ b) @ (a @ v)).square().sum() for b, a in cores))
        before, error = error, max(0.0, 1.0 - kept / total) ** 0.5
        if before is not None and abs(before - error) < _TOLERANCE:
            break
    return u, v


def compress_then_merge(
    updates: Sequence[Update], *, inside: MergeRule, rank: int | None = None, beta: float = 0.0
) -> LowRank:
    """Compress then Merge: a rule on the (r, r) coordinates Uᵀ ΔW V of shared subspaces U and V.

    The subspaces are those of a Tucker-2 decomposition of the updates, each scaled to the length
    β‖ΔW‖ + (1-β)·mean so that no expert is drowned; the coordinates are of the updates as they are.
    Found in Core Space, where nothing is lost. β is 0 if not given, as in the authors' code.
    What the subspaces leave out of the updates is the result's ``cut``.

    Args:
        updates: of one module.
        inside: what merges the coordinates.
        rank: of the result, r in the paper; the largest of the experts' ranks if None.
        beta: share of an update's own length in what the subspaces are found from, in [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta!r}; it takes a share in [0, 1], such as 0.5")
    u, v = bases(updates)
    cores: _Factors = []
    for update in updates:
        inner = projected(update, u, v).factors
        cores.append((inner.b.double(), inner.a.double()))
    norms = [LowRank(a, b).norm() for b, a in cores]
    mean = sum(norms) / len(norms)
    if mean > 0.0:
        asked = max(update.factors.rank for update in updates) if rank is None else rank
        scaled = [
            (b * (beta + (1.0 - beta) * mean / norm), a)
            for (b, a), norm in zip(cores, norms, strict=True)
            if norm > 0.0
        ]
        left, right = shared_subspaces(scaled, min(asked, u.shape[1], v.shape[1]))
        u, v = u @ left, v @ right
    compressed = [projected(update, u, v) for update in updates]
    before = sum(norm * norm for norm in norms)
    after = sum(LowRank(update.factors.a, update.scaled_b).energy() for update in compressed)
    return lifted(inside(compressed), u, v)._replace(cut=Cut(before, max(0.0, before - after)))
