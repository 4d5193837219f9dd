"""Random draws that depend on what they are for, and on nothing else.

Philox is counter-based: its stream is a pure function of a key and a position. The key is the seed,
the expert's digest and the module's path, the position is the element's, so no draw depends on the
order of experts, on batching, or on what else was drawn. NumPy keeps the streams of its bit
generators the same from version to version.
"""

from __future__ import annotations

import hashlib
import math
import sys

import numpy as np
import numpy.typing as npt

_WORD = 2.0**32


def draws(shape: tuple[int, ...], seed: int, source: str) -> npt.NDArray[np.uint32]:
    """Whole numbers below 2**32, uniform and independent, one an element.

    Args:
        shape: of the result.
        seed: any whole number.
        source: what the draws are for; each has a stream of its own.
    """
    key = hashlib.sha256(f"{seed}/{source}".encode()).digest()[:16]
    stream = np.random.Philox(key=int.from_bytes(key, "little"))
    count = math.prod(shape)
    words = stream.random_raw((count + 1) // 2)
    if sys.byteorder == "big":
        words.byteswap(inplace=True)
    return words.view("<u4")[:count].reshape(shape)


def kept(
    share: float | npt.NDArray[np.float64], shape: tuple[int, ...], seed: int, source: str
) -> npt.NDArray[np.bool_]:
    """Which elements stay where each does with a probability: bool of ``shape``.

    Args:
        share: the probability, one for all or one an element.
        shape: of the result.
        seed: and ``source``: as for :func:`draws`.
    """
    words = draws(shape, seed, source)
    if isinstance(share, float):
        return words < np.uint32(min(round(share * _WORD), 2**32 - 1))
    return words < share * _WORD
