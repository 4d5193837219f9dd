"""Next-token loss that pays for the language head at labelled positions only, a chunk at a time.

Most positions of a fine-tuning row are prompt and carry no label. With a small model the head is
most of the work of a training step, so it is applied to the labelled positions alone, and in
chunks, so that the logits of a whole batch are never held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from mttl_adapters.errors import BaseModelError

IGNORED = -100
"""Label of a position that has no loss, as in ``torch.nn.functional.cross_entropy``."""


def labelled_loss(model: Any, batch: dict[str, Tensor], chunk: int = 256) -> tuple[Tensor, int]:
    """Summed cross-entropy of a causal language model over the labelled tokens of a batch.

    Equal to the model's own loss times the number of labelled tokens. A model that does more than
    a linear map after its last hidden state (a scale or a soft cap on the logits) does so here too.

    Args:
        model: a transformers causal language model, possibly with adapters injected.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (b, s).
        chunk: positions whose logits are held at once.

    Returns:
        The loss in nats, a float32 scalar, and how many tokens it is summed over.
    """
    labels = batch["labels"][:, 1:]
    rows, places = torch.nonzero(labels != IGNORED, as_tuple=True)
    targets = labels[rows, places]
    hidden = last_hidden_state(model, batch["input_ids"], batch["attention_mask"])
    head = model.get_output_embeddings()
    loss = linear_cross_entropy(
        hidden[rows, places], head.weight, getattr(head, "bias", None), targets, chunk
    )
    return loss, targets.numel()


def last_hidden_state(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states (b, s, i) that the model's head would turn into logits.

    Raises:
        BaseModelError: the model scales or caps its logits after the head, which this would skip.
    """
    if name := scales_logits(model.config):
        raise BaseModelError(
            f"{type(model).__name__} applies {name!r} to its logits, which the chunked loss "
            f"does not; train it with a model class that has a plain linear head"
        )
    output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return output[0]  # type: ignore[no-any-return]


def scales_logits(config: Any) -> str | None:
    """What a model of this config does to its logits after the head; None for nothing."""
    for name in _AFTER_HEAD:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return name
    return None


# Config entries by which transformers' models change logits after the head
# (Cohere, Gemma 2 and 3, Granite, MiniCPM).
_AFTER_HEAD = ("logit_scale", "final_logit_softcapping", "logits_scaling")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int = 256
) -> Tensor:
    """Summed cross-entropy of ``hidden @ weight.T + bias`` against ``targets``.

    The gradient with respect to ``hidden`` is found in the forward pass, chunk by chunk, so that
    (t, o) logits are never held, nor computed twice (as in https://arxiv.org/abs/2410.10989).

    Args:
        hidden: (t, i), any float dtype.
        weight: (o, i), the head; trained only if it requires a gradient.
        bias: (o,) or None.
        targets: (t,) int64, each in [0, o).
        chunk: rows of logits held at once.

    Returns:
        float32 scalar, in nats; 0 for no rows.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        wanted = [ctx.needs_input_grad[n] for n in range(3)]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wanted[2] else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = nn.functional.linear(hidden[part], weight, bias).to(exact)  # (t, o)
            chosen = targets[part, None]
            log_z = logits.logsumexp(1, keepdim=True)
            loss += (log_z - logits.gather(1, chosen)).sum()
            if not any(wanted):
                continue
            d_logits = logits.sub_(log_z).exp_()
            d_logits.scatter_add_(1, chosen, torch.full_like(log_z, -1.0))
            low = d_logits.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = low @ weight
            if d_weight is not None:
                d_weight += low.T @ hidden[part]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.grads = (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, *outer: Any) -> Any:
        (scale,) = outer
        grads = [None if g is None else g * scale.to(g.dtype) for g in ctx.grads]  # type: ignore[attr-defined]
        return (*grads, None, None)
