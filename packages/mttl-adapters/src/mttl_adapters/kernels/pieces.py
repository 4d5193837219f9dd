"""Products of float32 quality on hardware that multiplies bfloat16, whatever torch may round to.

A float32 product on a GPU is slow, or, with ``allow_tf32`` or ``set_float32_matmul_precision``,
one of numbers rounded to 11 bits, which chooses other experts. A float32 number is a sum of three
bfloat16 numbers exactly, and products of those are exact in float32: no setting changes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of these bits of significand a bfloat16 number holds 8.
_COUNT = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def split(tensor: Tensor) -> Tensor:
    """(n, r, i) bfloat16 whose sum over n is ``tensor`` (r, i) exactly, the largest first.

    Cut off rather than rounded, so that no piece overflows. Of what is not finite the further
    pieces are 0; of numbers under 1e-30 they may be lost.
    """
    pieces, rest = [], tensor.float()
    for _ in range(_COUNT[tensor.dtype]):
        piece = (rest.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32)
        rest = torch.where(piece.isfinite(), rest - piece, 0.0)
        pieces.append(piece.bfloat16())
    return torch.stack(pieces)


def parts(x: Tensor, keys: Tensor) -> Tensor:
    """(m, t, n, e) float32, the products of m pieces of x (t, i) with n of the keys (n, e, i).

    Their sum over m and n is the product of x and the keys.
    """
    given = split(x)
    m, t, i = given.shape
    n, e, _ = keys.shape
    given, others = given.view(m * t, i), keys.reshape(n * e, i).T
    if given.is_cuda:
        products = torch.mm(given, others, out_dtype=torch.float32)
    else:
        products = given.float() @ others.float()
    return products.view(m, t, n, e)


def product(x: Tensor, keys: Tensor) -> Tensor:
    """(t, e) float32, the product of x (t, i) with keys of these pieces (n, e, i)."""
    if x.is_cuda and not hasattr(torch.ops.aten.mm, "dtype"):  # torch before 2.8
        return (x.double() @ keys.double().sum(0).T).float()
    found = parts(x, keys)
    m, n = found.shape[0], found.shape[2]
    total = torch.zeros_like(found[0, :, 0])
    for both in range(m + n - 2, -1, -1):  # the small ones first
        for of_x in range(max(0, both - n + 1), min(m, both + 1)):
            total += found[of_x, :, both - of_x]
    return total
