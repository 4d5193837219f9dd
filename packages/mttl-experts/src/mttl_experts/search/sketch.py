"""Short fixed sketches of ΔW: inner products of experts, nearly, from a few thousand bytes each.

A sketch is a fixed random projection of all entries of all modules: entry (p, q) of a module is
added, with the sign s_p·t_q, to coordinate (h_p + g_q) mod width. Its inner product with another is
⟨ΔW₁, ΔW₂⟩ in the mean over all choices of h, g, s and t. Since the projection is linear in ΔW, it
knows nothing of how ΔW was factored; since it is a convolution of two hashed vectors for each rank,
it is computed from A and B alone (https://arxiv.org/abs/1108.1320).

All choices come from SHAKE-256 of the module's path, so they are the same everywhere, for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from mttl_experts.spectral import LoraFactors

WIDTH = 2048
"""Numbers in a sketch, a power of two. The error of a cosine is about 1/√width."""


def sketch(modules: Mapping[str, LoraFactors], width: int = WIDTH) -> Tensor:
    """Sketch of an expert: linear in its ΔW, and the same for every factorisation of it.

    Args:
        modules: as ``lora_modules`` gives them.
        width: numbers in the sketch, a power of two up to 65536.

    Returns:
        (width,) float32.
    """
    spectrum = torch.zeros(width // 2 + 1, dtype=torch.complex128)
    for path, factors in modules.items():
        outputs = torch.fft.rfft(_hashed(factors.b.T, f"{path} out", width))  # (r, width/2+1)
        inputs = torch.fft.rfft(_hashed(factors.a, f"{path} in", width))
        spectrum += factors.scaling * (outputs * inputs).sum(0)
    row: Tensor = torch.fft.irfft(spectrum, width)
    return row.float()


def _hashed(rows: Tensor, label: str, width: int) -> Tensor:
    """(r, n) to (r, width): each column, with its sign, added to the coordinate it hashes to."""
    places, signs = _choices(label, rows.shape[1], width)
    return torch.zeros(rows.shape[0], width).index_add_(1, places, rows.float() * signs)


@lru_cache(maxsize=4096)
def _choices(label: str, length: int, width: int) -> tuple[Tensor, Tensor]:
    """Coordinate and sign of each of ``length`` places: (length,) int64, (length,) float32."""
    stream = hashlib.shake_256(f"mttl sketch 1 {label}".encode()).digest(3 * length)
    numbers = torch.frombuffer(bytearray(stream), dtype=torch.uint8).view(3, length).long()
    return (numbers[0] * 256 + numbers[1]) % width, (numbers[2] % 2 * 2 - 1).float()
