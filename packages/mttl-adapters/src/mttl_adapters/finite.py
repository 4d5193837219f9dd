"""Whether factors are finite: an expert of others would spoil tokens that never chose it.

Dense products multiply what nobody chose by 0, and so do shorter lines and ranks where they are
padded; 0 times infinity is no number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; entries are read once, and nothing is written."""
    values = tensor.detach()
    if math.isfinite(float(values.sum())):
        return True
    # Numbers that are finite may still add up to infinity, in float16 soon.
    return all(math.isfinite(float(end)) for end in torch.aminmax(values))
