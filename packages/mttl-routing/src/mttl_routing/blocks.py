"""Which layers of a model share one decision."""

from __future__ import annotations

import re
from typing import Any

GRANULARITIES = ("layer", "block", "model")

# Up to the first number: "model.layers.3" of "model.layers.3.self_attn.q_proj".
_BLOCK = re.compile(r"^(?:[^.]*\.)*?\d+(?=\.|$)")


def group_of(path: str, model: Any, granularity: str) -> str | None:
    """What layers that decide together have in common; None for one that decides by itself.

    ``layer``: every layer decides on its own input. ``block``: the layers of a transformer block
    take the decision of the first adapted one among them. ``model``: all take that of the model's
    first, in an encoder-decoder model the encoder's and the decoder's apart. What is in no block,
    such as the head, decides by itself: it may be given other tokens than the blocks.
    """
    block = _BLOCK.match(path)
    if granularity == "layer" or block is None:
        return None
    if granularity == "block":
        return block[0]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return re.sub(r"\.?\d+$", "", block[0])
    return ""
