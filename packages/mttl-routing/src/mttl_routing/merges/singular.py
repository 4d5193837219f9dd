"""Merges by singular vectors, from the experts' factors and never from ΔW: TSV-M and Iso."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mttl_experts import SpectralForm, spectral_form
from mttl_routing.merges.linear import linear
from mttl_routing.merges.rule import LowRank, Update, check_share

_EPSILON = float(torch.finfo(torch.float32).eps)


def rank_of(sigma: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values are more than rounding, of a matrix in float32."""
    if sigma.numel() == 0 or float(sigma[0]) == 0.0:
        return 0
    return int((sigma > float(sigma[0]) * _EPSILON * max(shape)).sum())


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """Factor P·Qᵀ of the singular value decomposition P·D·Qᵀ, (n, k) float64.

    The orthonormal columns nearest to those given (Procrustes), on what these span: where they are
    dependent, as of equal experts, directions of no size are left out, as any could stand there.
    """
    p, sigma, qh = torch.linalg.svd(columns.double(), full_matrices=False)
    rank = rank_of(sigma, (columns.shape[0], columns.shape[1]))
    orthonormal: Tensor = p[:, :rank] @ qh[:rank]
    return orthonormal


def precise_form(a: Tensor, b: Tensor) -> SpectralForm:
    """Singular value decomposition of ``b @ a`` in float64, for what is decomposed once more."""
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return SpectralForm(q_b @ u, sigma, q_a @ vh.T)


def tsv(updates: Sequence[Update]) -> LowRank:
    """Task singular vectors, TSV-M (https://arxiv.org/abs/2412.00081).

    Of each of the T experts that adapt the module the first min(o, i)/T singular triples, rounded
    down, with all left vectors made orthonormal together, and all right ones, before the product.
    The paper's updates have full rank. Here no more triples are taken than an update has, since
    further vectors would be arbitrary, and at least one, where the paper's share of many experts
    would be none. A weight multiplies the expert's singular values. The paper's factor is
    ``scale``.
    """
    share = max(1, min(updates[0].shape) // len(updates))
    forms = []
    for update in updates:
        u, sigma, v = spectral_form(update.factors.a, update.factors.b, update.factors.scaling)
        k = min(share, rank_of(sigma, update.shape))
        forms.append(SpectralForm(u[:, :k], sigma[:k] * update.weight, v[:, :k]))
    u = nearest_orthonormal(torch.cat([form.u for form in forms], dim=1))
    v = nearest_orthonormal(torch.cat([form.v for form in forms], dim=1))
    sigmas = torch.cat([form.sigma for form in forms])
    return LowRank(a=v.T.float(), b=(u * sigmas).float())


def iso(updates: Sequence[Update]) -> LowRank:
    """Isotropic merge, Iso-C (https://arxiv.org/abs/2502.04959).

    The sum of the updates, with each of its singular values replaced by their mean. The paper's sum
    has full rank; that of LoRA experts has Σr at most, and the mean is over those: the others are
    zero, and their vectors arbitrary. Its factor is ``scale``.
    """
    total = linear(updates)
    u, sigma, v = spectral_form(total.a, total.b)
    rank = rank_of(sigma, updates[0].shape)
    return LowRank(a=v[:, :rank].T.contiguous(), b=u[:, :rank] * sigma[:rank].mean())


def iso_cts(updates: Sequence[Update], *, common: float = 0.8) -> LowRank:
    """Isotropic merge in common and task-specific subspaces, Iso-CTS.

    The paper of :func:`iso` (https://arxiv.org/abs/2502.04959). The first singular triples of the
    sum span what is common; each expert adds, of what its update has outside the common left
    vectors, as many first triples as any other. All left vectors are made orthonormal together, and
    all right ones, and each triple gets the mean of all their singular values.

    With r for the rank of the sum (min(o, i) in the paper) and T experts that adapt the module, an
    expert adds (1 - common) r / T triples, rounded as in the authors' code, so that with many
    experts it may be none, which is Iso-C. The rest of the r is common.

    Args:
        updates: of one module.
        common: share of the triples that are common, in (0, 1]; .8 in the paper.
    """
    check_share("common", common)
    total = linear(updates)
    u, sigma, v = precise_form(total.a, total.b)
    rank = rank_of(sigma, updates[0].shape)
    each = round((rank - int(common * rank)) / len(updates))
    first = max(0, rank - each * len(updates))
    forms = [SpectralForm(u[:, :first], sigma[:first], v[:, :first])]
    for update in updates if each else ():
        b = update.scaled_b.double() * update.weight
        outside = b - forms[0].u @ (forms[0].u.T @ b)
        own = precise_form(update.factors.a, outside)
        # By the length of the whole update: one inside the common subspace has rounding outside.
        least = LowRank(update.factors.a, b).norm() * _EPSILON * max(update.shape)
        k = min(each, int((own.sigma > least).sum()))
        forms.append(SpectralForm(own.u[:, :k], own.sigma[:k], own.v[:, :k]))
    left = nearest_orthonormal(torch.cat([form.u for form in forms], dim=1))
    right = nearest_orthonormal(torch.cat([form.v for form in forms], dim=1))
    sigmas = torch.cat([form.sigma for form in forms])
    level = float(sigmas.mean()) if len(sigmas) else 0.0
    return LowRank(a=right.T.float(), b=(left * level).float())
