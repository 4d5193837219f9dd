"""Merges inside a space that all experts share: Core Space and KnOTS, each with a rule inside.

The rule sees each expert's update in the coordinates of the space, as factors like any other, and
what it gives is carried back. Nothing is lost on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mttl_experts import LoraFactors
from mttl_routing.merges.rule import LowRank, MergeRule, Update
from mttl_routing.merges.singular import rank_of


def left_vectors(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of (n, m) columns, (n, min(n, m)), and singular values, float64.

    Where the columns are many, from the eigenvectors of their Gram matrix, which are orthonormal
    whatever its condition: squared singular values of float32 columns fit into 16 digits.
    """
    matrix = columns.double()
    if matrix.shape[1] < matrix.shape[0]:
        u, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
        return u, sigma
    energies, vectors = torch.linalg.eigh(matrix @ matrix.T)  # rising
    return vectors.flip(1), energies.clamp(min=0.0).sqrt().flip(0)


def bases(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """Core Space's reference bases: of all B beside each other, and of all A on each other.

    Returns:
        U (o, min(o, Σr)) and V (i, min(i, Σr)) float64, orthonormal columns: every ΔW is
        U Uᵀ ΔW V Vᵀ.
    """
    return (
        left_vectors(torch.cat([update.scaled_b for update in updates], dim=1))[0],
        left_vectors(torch.cat([update.factors.a.float() for update in updates]).T)[0],
    )


def projected(update: Update, u: Tensor | None, v: Tensor | None) -> Update:
    """Uᵀ ΔW V as an update; None stands for the identity."""
    a, b = update.factors.a, update.scaled_b
    if u is not None:
        b = (u.T @ b.double()).float()
    if v is not None:
        a = (a.double() @ v).float()
    return replace(update, factors=LoraFactors(a, b, 1.0))


def lifted(core: LowRank | Tensor, u: Tensor | None, v: Tensor | None) -> LowRank:
    """U core Vᵀ as factors, whose rank is not above the core's lesser side."""
    if isinstance(core, LowRank) and core.a.shape[0] > min(core.b.shape[0], core.a.shape[1]):
        core = core.b.double() @ core.a.double()
    if isinstance(core, LowRank):
        a, b = core.a.double(), core.b.double()
    elif core.shape[0] <= core.shape[1]:
        a, b = core.double(), torch.eye(core.shape[0], dtype=torch.float64)
    else:
        a, b = torch.eye(core.shape[1], dtype=torch.float64), core.double()
    b = b if u is None else u @ b
    a = a if v is None else a @ v.T
    return LowRank(a.float().contiguous(), b.float().contiguous())


def core(updates: Sequence[Update], *, inside: MergeRule, by_entry: bool = True) -> LowRank:
    """Core Space merge (https://arxiv.org/abs/2509.17786): any rule on the cores Uᵀ ΔW V.

    U and V are the left singular vectors of all B beside each other and the right ones of all A on
    each other. The paper writes ΔW = BA, so the scaling is taken to be in B; with one scaling for
    all experts that changes nothing. ``iso`` and ``task_arithmetic`` give here what they give
    outside, and so does ``tsv`` where each expert keeps all its triples in both. ``ties`` does not,
    as it goes entry by entry; here it depends on how each update is split into its factors, as in
    the paper.

    Args:
        updates: of one module.
        inside: what merges the cores.
        by_entry: whether ``inside`` looks at single entries. If not, and if the core is no smaller
            than the lesser side of ΔW, it is left alone: a turn there and back changes nothing.
    """
    shape, ranks = updates[0].shape, sum(update.factors.rank for update in updates)
    if not by_entry and ranks >= min(shape):
        merged = inside(updates)
        return merged if isinstance(merged, LowRank) else lifted(merged, None, None)
    u, v = bases(updates)
    return lifted(inside([projected(update, u, v) for update in updates]), u, v)


def knots(updates: Sequence[Update], *, inside: MergeRule) -> LowRank:
    """KnOTS (https://arxiv.org/abs/2410.19735): a rule on the updates in their shared output basis.

    U Σ [V_1ᵀ … V_Tᵀ] is the singular value decomposition of all ΔW beside each other; the rule
    merges the Σ V_tᵀ = Uᵀ ΔW_t, as in the authors' code, and U carries the result back. U is found
    from the factors. The authors trim over all layers together, here each module is apart.
    """
    sides = []
    for update in updates:
        r = torch.linalg.qr(update.factors.a.double().T, mode="r").R  # (k, r)
        sides.append(update.scaled_b.double() @ r.T)  # (o, k): ΔW up to a rotation of its input
    u, sigma = left_vectors(torch.cat(sides, dim=1))
    u = u[:, : max(1, rank_of(sigma, updates[0].shape))]
    return lifted(inside([projected(update, u, None) for update in updates]), u, None)
