"""Kinds of adapters: PEFT's own configs, chosen by names of the layers that they adapt."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def lora_config(
    model: Any,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    layers: str = ".*",
    modules: str = ".*",
) -> Any:
    """PEFT config of a LoRA (https://arxiv.org/abs/2106.09685) over some linear layers of a model.

    Args:
        model: the base; its output head is never adapted.
        rank: r, the columns of A and B.
        alpha: the update is scaled by alpha / r.
        dropout: share of the adapter's inputs that training drops.
        layers: regular expression for the last part of a layer's name, such as ``q_proj|v_proj``.
        modules: regular expression for the rest of it, such as ``.*self_attn``.

    Raises:
        ValueError: no linear layer of the model has such a name, with the names there are.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    linear = linear_layers(model)
    chosen = [
        name
        for name in linear
        if re.fullmatch(layers, name.rpartition(".")[2])
        and re.fullmatch(modules, name.rpartition(".")[0])
    ]
    if not chosen:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"no layer matches layers={layers!r} and modules={modules!r}, so the adapter would "
            f"attach to nothing; the linear layers are called {', '.join(known)}"
        )
    ends = {name.rpartition(".")[2] for name in chosen}
    whole = [name for name in linear if name.rpartition(".")[2] in ends]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # Short names where they say it all, since every loader understands those.
        target_modules=sorted(ends) if len(whole) == len(chosen) else chosen,
        fan_in_fan_out=isinstance(model.get_submodule(chosen[0]), Conv1D),
    )


def linear_layers(model: Any) -> list[str]:
    """Names of the layers that a LoRA can adapt: linear ones and Conv1D, but not the head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
