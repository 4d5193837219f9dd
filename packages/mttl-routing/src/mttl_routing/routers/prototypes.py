"""Arrow's prototypes: the input direction that each expert's own update amplifies most.

Exact, and made for hundreds of experts: the modules of one shape go together, ΔW is never formed,
and what is left of a module after two Gram matrices is an (r, r) problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mttl_experts import Expert, LoraFactors, lora_modules

# How many modules go together; more would leave the processor's caches.
_TOGETHER = 64
# Added to the diagonal of A Aᵀ, relative to its trace, so that a factor of less than full rank has
# a Cholesky form; the rounding of float64 is as large.
_JITTER = 1e-14
# ‖A‖²‖B‖² against ‖ΔW‖²: with more cancellation than this between A and B, Gram matrices have lost
# too many digits, and QR takes their place.
_CANCELLED = 1e6
# A trace of 0 has no jitter of its own.
_LEAST = 1e-280


def arrow_prototypes(expert: Expert) -> dict[str, Tensor]:
    """First right singular vector of an expert's ΔW, by module path.

    ‖ΔW v‖ is ‖ΔW‖ to one part in a million, also where several directions reach it.

    Returns:
        (i,) float32 of unit norm for each module that the expert adapts; the sign means nothing.
        Zeros where ΔW is zero.

    Raises:
        ValueError: naming a module that has a weight that is NaN or infinite.
    """
    modules = lora_modules(expert)
    prototypes = dict.fromkeys(modules, torch.empty(0))
    for names in _of_one_shape(modules):
        factors = [modules[name] for name in names]
        directions = top_directions([f.a for f in factors], [f.b for f in factors])
        prototypes.update(zip(names, directions, strict=True))
    for name, direction in prototypes.items():
        if not math.isfinite(float(direction[0])):  # all of it is NaN, or none
            raise ValueError(
                f"expert {expert.name!r}: module {name!r} has a weight that is NaN or infinite"
            )
    return prototypes


def top_directions(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Unit vectors v that maximise ‖B A v‖, each for one A and B.

    With A Aᵀ = L Lᵀ and y the first eigenvector of Lᵀ(BᵀB)L, whose eigenvalue is ‖ΔW‖², v is in the
    direction of Aᵀ BᵀB L y. That takes no inverse, so factors of less than full rank do no harm.

    Args:
        a: (r, i) each, all of one shape, any float dtype.
        b: (o, r) each, all of one shape.

    Returns:
        (i,) float32 each; zeros where B A is zero, NaN where a weight is not finite.
    """
    room = torch.empty(2, max(_size(a), _size(b)), dtype=torch.float64)
    of_a, stack = _grams(a, room[0])
    of_b, _ = _grams([each.T for each in b], room[1])
    finite = (of_a.isfinite() & of_b.isfinite()).all(2).all(1)
    if not finite.all():
        of_a, of_b = (torch.where(finite[:, None, None], gram, 0.0) for gram in (of_a, of_b))
    jitter = _JITTER * _trace(of_a).clamp_min(_LEAST)[:, None, None]
    eye = torch.eye(of_a.shape[1], dtype=torch.float64)
    lower, failed = torch.linalg.cholesky_ex(of_a + jitter * eye)
    values, vectors = torch.linalg.eigh(lower.mT @ of_b @ lower)
    weights = of_b @ (lower @ vectors[:, :, -1:])  # (n, r, 1)
    lengths = (weights.mT @ of_a @ weights).clamp_min(0.0).sqrt()
    weights = torch.where(lengths > 0.0, weights / lengths, 0.0)
    directions = list((weights.mT @ stack).squeeze(1).float())
    doubtful = finite & ((failed != 0) | (_trace(of_a) * _trace(of_b) > _CANCELLED * values[:, -1]))
    for index in torch.nonzero(doubtful).flatten().tolist():
        directions[index] = _by_qr(a[index], b[index])
    for index in torch.nonzero(~finite).flatten().tolist():
        directions[index] = torch.full((a[0].shape[1],), torch.nan)
    return directions


def _grams(factors: Sequence[Tensor], room: Tensor) -> tuple[Tensor, Tensor]:
    """(n, r, r) products of each (r, w) with its own transpose, and the factors as (n, r, w).

    All in float64; the factors are copied into ``room``, which stays in the caches.
    """
    stack = room[: _size(factors)].view(len(factors), *factors[0].shape)
    for place, factor in zip(stack, factors, strict=True):
        place.copy_(factor)
    return stack @ stack.mT, stack


def _size(factors: Sequence[Tensor]) -> int:
    return len(factors) * factors[0].numel()


def _by_qr(a: Tensor, b: Tensor) -> Tensor:
    """The same of one module from QR in float64, which squares nothing."""
    q_a, r_a = torch.linalg.qr(a.double().T)
    core = torch.linalg.qr(b.double()).R @ r_a.T
    _, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    return (q_a @ vh[0]).float() if sigma[0] > 0.0 else torch.zeros(a.shape[1])


def _trace(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=1, dim2=2).sum(1)


def _of_one_shape(modules: dict[str, LoraFactors]) -> Iterator[list[str]]:
    """Names of modules whose factors are of one shape, not too many at a time."""
    groups: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, factors in modules.items():
        groups.setdefault((factors.a.shape, factors.b.shape), []).append(name)
    for names in groups.values():
        for start in range(0, len(names), _TOGETHER):
            yield names[start : start + _TOGETHER]
