"""Training one adapter over a frozen base model: tensors in, tensors out.

The adapter is any PEFT tuner. One batch is one optimiser step; what the rows mean, and whether the
result is any good, is for others to say.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mttl_adapters.loop import seeded, train_parameters
from mttl_adapters.progress import Progress
from mttl_adapters.training_config import TrainedAdapter, TrainingConfig

Batch = Mapping[str, Tensor]


def train_adapter(
    model: Any,
    adapter: Any,
    batches: Sequence[Batch],
    config: TrainingConfig,
    *,
    validation: Sequence[Batch] = (),
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 10.0,
    progress: Progress | None = None,
) -> TrainedAdapter:
    """Train one adapter on ``batches``, one optimiser step each, and give the model back untouched.

    Interrupted and called again with the same arguments, it goes on from ``checkpoint`` and ends
    with the same weights as if nothing had happened.

    Args:
        model: a transformers causal language model; its own weights stay frozen.
        adapter: a PEFT config.
        batches: each with ``input_ids``, ``attention_mask`` and ``labels`` (b, s); -100 = no loss.
        config: optimiser and schedule.
        validation: batches whose loss picks the weights to keep.
        checkpoint: file to save to and to go on from; the caller removes it when done.
        checkpoint_seconds: at least this long lies between two saves.
        progress: told of each step.

    Raises:
        ValueError: there is nothing to train on, or the adapter attaches to no layer.
        DivergedError: a loss or a weight became infinite or no number.
    """
    with _adapted(model, adapter, config.seed) as peft_model:
        peft_model.train()
        report = train_parameters(
            peft_model.get_base_model(),
            {n: p for n, p in peft_model.named_parameters() if p.requires_grad},
            batches,
            config,
            validation=validation,
            checkpoint=checkpoint,
            checkpoint_seconds=checkpoint_seconds,
            progress=progress,
        )
        return TrainedAdapter(
            weights=_weights(peft_model),
            config=plain_config(peft_model.peft_config["default"]),
            **{field.name: getattr(report, field.name) for field in fields(report)},
        )


def fresh_adapter(model: Any, adapter: Any, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An untrained adapter of a model: its tensors under their PEFT names, and its plain config.

    Args:
        model: a transformers model, which is given back untouched.
        adapter: a PEFT config.
        seed: of the initial weights.
    """
    with _adapted(model, adapter, seed) as peft_model:
        return _weights(peft_model), plain_config(peft_model.peft_config["default"])


@contextmanager
def _adapted(model: Any, adapter: Any, seed: int) -> Iterator[Any]:
    """The model as PEFT adapts it, for as long as the block lasts, with random numbers of its own.

    The model is then in evaluation mode.
    """
    from peft import get_peft_model

    with seeded(model, seed):
        with warnings.catch_warnings():
            # PEFT asks transformers' models under a name that they are about to drop.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            peft_model = get_peft_model(model, adapter)
        try:
            yield peft_model
        finally:
            peft_model.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config
            model.eval()


def _weights(peft_model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(peft_model)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}


def plain_config(config: Any) -> dict[str, Any]:
    """A PEFT config as JSON-able data, as PEFT writes it to ``adapter_config.json``.

    Sets become sorted lists, so that equal configs give equal bytes.
    """
    plain: dict[str, Any] = config.to_dict()
    for key, value in plain.items():
        if isinstance(value, set):
            plain[key] = sorted(value)
        elif hasattr(value, "value"):
            plain[key] = value.value
    plain["inference_mode"] = True
    return plain
