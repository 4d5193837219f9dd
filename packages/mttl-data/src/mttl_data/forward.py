"""A causal model's forward pass with a cache, whatever arguments the model takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# What configs call the most tokens that a model takes at once.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def context_length(model: Any) -> int | None:
    """The most tokens that a model takes at once; None where its config sets no bound."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    for name in _CONTEXT_NAMES:
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


class Forward:
    """Runs a model on token ids, given the arguments that it takes.

    Args:
        model: Any causal language model of transformers, or one of PEFT around it.
    """

    def __init__(self, model: Any) -> None:
        """Find out what the model takes."""
        self.model = model
        self.device = getattr(model, "device", None) or next(model.parameters()).device
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        takes = inspect.signature(inner.forward).parameters
        self.takes_positions = "position_ids" in takes
        self._takes_last = "logits_to_keep" in takes

    def __call__(
        self, input_ids: Tensor, cache: Any, mask: Tensor, positions: Tensor, last: int = 1
    ) -> tuple[Tensor, Any]:
        """Logits after the ``last`` tokens, and the cache with the tokens in it.

        Args:
            input_ids: (b, s).
            cache: What an earlier call gave back for the tokens before, or None.
            mask: (b, all tokens so far), 0 at padding.
            positions: (b, s), the place of each token in its own text.
            last: How many positions meet the language head.

        Returns:
            (b, last, vocabulary) logits, and the cache.
        """
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if self._takes_last:
            options["logits_to_keep"] = last
        if self.takes_positions:
            options["position_ids"] = positions
        output = self.model(input_ids=input_ids, attention_mask=mask, **options)
        return output.logits[:, -last:], output.past_key_values


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode and without gradients, and back as it was afterwards."""
    was_training = bool(getattr(model, "training", False))
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()
