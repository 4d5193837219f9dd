"""Merges by singular vectors: TSV-M and Iso-C, from the experts' factors and never from ΔW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mttl_experts import SpectralForm, spectral_form
from mttl_routing.merges.linear import linear
from mttl_routing.merges.rule import LowRank, Update

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
