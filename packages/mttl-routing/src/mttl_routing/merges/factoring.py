"""A merged update as one LoRA: exact, or cut to a rank with the energy lost."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mttl_experts import spectral_form
from mttl_routing.merges.rule import LowRank


class Factored(NamedTuple):
    """One module's merged update, scaling 1, and what cutting its rank cost.

    Attributes:
        a: (r, i) float32.
        b: (o, r) float32.
        energy: squared Frobenius norm of the whole update, or of all experts' updates where they
            were cut before the merge; None where nothing was cut.
        energy_lost: the part of it that was cut away.
    """

    a: Tensor
    b: Tensor
    energy: float | None = None
    energy_lost: float = 0.0

    @property
    def rank(self) -> int:
        """Rows of ``a``."""
        return int(self.a.shape[0])


def factored(update: LowRank | Tensor, rank: int | None = None) -> Factored:
    """Factors of a merged update, of the least rank that is sure to hold it, or of ``rank``.

    Without ``rank`` nothing is lost: factors whose rank is at most min(o, i) stay as they are, and
    anything else is ΔW beside an identity, which is exact where an SVD would round. With it,
    the best approximation of that rank, from two thin QRs and a small SVD where there are factors
    of low rank.

    Args:
        update: factors, or ΔW as (o, i).
        rank: the most the result may have.
    """
    if isinstance(update, LowRank):
        shape = (update.b.shape[0], update.a.shape[1])
        if update.a.shape[0] == 0:  # nothing at all, but a LoRA has one row
            update = LowRank(torch.zeros(1, shape[1]), torch.zeros(shape[0], 1))
        if update.a.shape[0] <= min(*shape, rank or min(shape)):
            energy = None if rank is None else update.energy()
            return Factored(update.a, update.b, *(update.cut or (energy, 0.0)))
        if rank is not None and update.a.shape[0] < min(shape):
            return _cut(*spectral_form(update.a, update.b), rank)
        update = update.b @ update.a
    out_features, in_features = update.shape
    if rank is None or rank >= min(out_features, in_features):
        energy = None if rank is None else float(update.double().square().sum())
        if out_features <= in_features:
            return Factored(update, torch.eye(out_features), energy)
        return Factored(torch.eye(in_features), update, energy)
    return _cut_dense(update, rank)


def _cut(u: Tensor, sigma: Tensor, v: Tensor, rank: int) -> Factored:
    """The ``rank`` largest singular values, shared evenly between the factors."""
    energies = sigma.double().square()
    root = sigma[:rank].sqrt()
    return Factored(
        a=(v[:, :rank] * root).T.contiguous(),
        b=(u[:, :rank] * root).contiguous(),
        energy=float(energies.sum()),
        energy_lost=float(energies[rank:].sum()),
    )


def _cut_dense(update: Tensor, rank: int) -> Factored:
    """The best approximation of a dense (o, i) update, its singular values shared evenly.

    From the eigenvectors of the lesser Gram matrix, in float64: half the time of a singular value
    decomposition in float32, and nearer to the truth, since squaring singular values costs half of
    16 digits.
    """
    if update.shape[0] > update.shape[1]:
        flipped = _cut_dense(update.T, rank)
        return flipped._replace(a=flipped.b.T.contiguous(), b=flipped.a.T.contiguous())
    matrix = update.double()
    energies, vectors = torch.linalg.eigh(matrix @ matrix.T)  # rising
    energies = energies.clamp(min=0.0)
    u = vectors[:, -rank:].flip(1)
    root = energies[-rank:].flip(0).sqrt().sqrt()
    tiny = torch.finfo(torch.float64).tiny
    return Factored(
        a=((u.T @ matrix) / root.clamp(min=tiny)[:, None]).float().contiguous(),
        b=(u * root).float().contiguous(),
        energy=float(energies.sum()),
        energy_lost=float(energies[:-rank].sum()),
    )
