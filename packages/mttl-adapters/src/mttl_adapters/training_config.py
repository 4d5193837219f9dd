"""What a training is told, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TrainingConfig:
    """How an adapter is trained, apart from its data.

    The defaults follow the FLAN recipe of https://arxiv.org/abs/2405.11157: AdamW, linear decay,
    6 % warm-up, the adapter of best validation loss kept.

    Attributes:
        learning_rate: peak of the schedule.
        scheduler: any name that ``transformers.get_scheduler`` knows.
        warmup_proportion: share of the steps over which the rate rises from 0.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        micro_batch_size: rows in one forward pass; None for the whole batch.
        evaluate_every: steps between two validations; None for one after the last step.
        seed: fixes the adapter's initial weights and its dropout.
    """

    learning_rate: float = 1e-4
    scheduler: str = "linear"
    warmup_proportion: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None
    evaluate_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate!r}; it must be above 0")
        if not 0 <= self.warmup_proportion <= 1:
            raise ValueError(f"warmup_proportion is {self.warmup_proportion!r}; it is from 0 to 1")
        for name in ("micro_batch_size", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a training says of itself.

    Attributes:
        step: the step whose weights were kept.
        train_loss: mean loss per labelled token over the last tenth of the steps, in nats.
        validation_loss: of these weights, in nats per labelled token; None without validation.
        examples: rows trained on, repeats counted.
        tokens: tokens of those rows, padding left out.
        seconds: wall time of the steps, the time before an interruption included.
        resumed_from: step of the checkpoint that training went on from, or 0.
    """

    step: int
    train_loss: float
    validation_loss: float | None
    examples: int
    tokens: int
    seconds: float
    resumed_from: int


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter(TrainingReport):
    """What training an adapter gives back.

    Attributes:
        weights: adapter tensors under their PEFT names, on the CPU.
        config: the PEFT adapter config as plain data.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any]
