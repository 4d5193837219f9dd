"""Training one adapter over a frozen base model: tensors in, tensors out.

The adapter is any PEFT tuner. One batch is one optimiser step; what the rows mean, and whether the
result is any good, is for others to say.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mttl_adapters.checkpoint import load_checkpoint, save_checkpoint
from mttl_adapters.errors import CheckpointWarning, DivergedError
from mttl_adapters.losses import IGNORED, labelled_loss
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
    if not batches:
        raise ValueError("there are no batches to train on; the task has no training rows")
    from peft import get_peft_model

    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(config.seed)
        with warnings.catch_warnings():
            # PEFT asks transformers' models under a name that they are about to drop.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            peft_model = get_peft_model(model, adapter)
        try:
            run = _Run(peft_model, batches, config, validation, checkpoint)
            run.resume()
            peft_model.train()
            saved = time.monotonic()
            for step in range(run.step, len(batches)):
                run.take_step(batches[step])
                if progress:
                    progress("", step + 1, len(batches))
                last = step + 1 == len(batches)
                if checkpoint and (last or time.monotonic() - saved > checkpoint_seconds):
                    _save_or_warn(run, checkpoint)
                    saved = time.monotonic()
            return run.result()
        finally:
            peft_model.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config
            model.eval()


def _save_or_warn(run: _Run, checkpoint: Path) -> None:
    """A checkpoint is a courtesy: without room for one, training goes on all the same."""
    try:
        run.save(checkpoint)
    except OSError as error:
        warnings.warn(
            f"cannot write the checkpoint {str(checkpoint)!r} ({error.strerror or error}); "
            "training goes on, and if interrupted it begins from the last one that was written",
            CheckpointWarning,
            stacklevel=3,
        )


class _Run:
    """The state of one training: what a checkpoint holds, and the steps that change it."""

    def __init__(
        self,
        peft_model: Any,
        batches: Sequence[Batch],
        config: TrainingConfig,
        validation: Sequence[Batch],
        checkpoint: Path | None,
    ) -> None:
        from transformers import get_scheduler

        self.peft_model, self.config = peft_model, config
        self.base = peft_model.get_base_model()
        self.validation, self.checkpoint = validation, checkpoint
        self.trained = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.n_steps = len(batches)
        self.schedule = get_scheduler(
            config.scheduler,
            self.optimizer,
            num_warmup_steps=round(config.warmup_proportion * self.n_steps),
            num_training_steps=self.n_steps,
        )
        self.step = self.resumed_from = self.examples = self.tokens = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.best_step, self.best_loss = 0, float("inf")

    def take_step(self, batch: Batch) -> None:
        start = time.monotonic()
        device = next(iter(self.trained.values())).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        n_labels = int((batch["labels"][:, 1:] != IGNORED).sum())
        rows = len(batch["labels"])
        micro = self.config.micro_batch_size or rows
        total = 0.0
        for first in range(0, rows, micro):
            part = {name: tensor[first : first + micro] for name, tensor in batch.items()}
            loss, _ = labelled_loss(self.base, part)
            loss = loss / max(n_labels, 1)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        self.check_finite("loss", total)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        self.losses.append(total)
        self.examples += rows
        self.tokens += int(batch["attention_mask"].sum())
        self.seconds += time.monotonic() - start
        every = self.config.evaluate_every or self.n_steps
        if self.validation and (self.step % every == 0 or self.step == self.n_steps):
            self.validate()

    def validate(self) -> None:
        loss = mean_loss(self.base, self.validation)
        self.check_finite("validation loss", loss)
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.best = {n: p.detach().clone() for n, p in self.trained.items()}
        self.peft_model.train()

    def check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergedError(
                f"training diverged: the {what} is {value} after {self.step} of {self.n_steps} "
                f"steps at learning rate {self.config.learning_rate:g}; lower the learning rate, "
                "or use a number format of wider range"
            )

    def save(self, path: Path) -> None:
        tensors = {f"weight/{n}": p.detach() for n, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}/{name}"] = value
        tensors |= {f"best/{n}": p for n, p in self.best.items()}
        tensors["random"] = torch.get_rng_state()
        for device in _devices(self.base):
            tensors[f"random.{device}"] = torch.cuda.get_rng_state(device)
        state = {name: getattr(self, name) for name in _PLAIN_STATE}
        save_checkpoint(path, tensors, state | {"schedule": self.schedule.state_dict()})

    def resume(self) -> None:
        found = load_checkpoint(self.checkpoint) if self.checkpoint else None
        if found is None:
            return
        tensors, state = found
        self.schedule.load_state_dict(state.pop("schedule"))
        for name, value in state.items():
            setattr(self, name, value)
        self.resumed_from = self.step
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"weight/{name}"])
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind.startswith("optimizer."):
                parameter = self.trained[name]
                field = kind.removeprefix("optimizer.")
                # Adam counts its steps on the CPU.
                device = "cpu" if field == "step" else parameter.device
                self.optimizer.state[parameter][field] = value.to(device)
            elif kind == "best":
                self.best[name] = value.to(self.trained[name].device)
        for group, rate in zip(
            self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        torch.set_rng_state(tensors["random"])
        for device in _devices(self.base):
            torch.cuda.set_rng_state(tensors[f"random.{device}"], device)

    def result(self) -> TrainedAdapter:
        from peft import get_peft_model_state_dict

        if self.best:
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(self.best[name])
        weights = get_peft_model_state_dict(self.peft_model)
        largest = torch.stack([w.abs().max().float().cpu() for w in weights.values()]).max()
        self.check_finite("largest weight", largest.item())
        last = self.losses[-max(1, self.n_steps // 10) :]
        return TrainedAdapter(
            weights={n: w.detach().to("cpu", copy=True) for n, w in weights.items()},
            config=plain_config(self.peft_model.peft_config["default"]),
            step=self.best_step or self.step,
            train_loss=sum(last) / len(last),
            validation_loss=self.best_loss if self.best else None,
            examples=self.examples,
            tokens=self.tokens,
            seconds=self.seconds,
            resumed_from=self.resumed_from,
        )


_PLAIN_STATE = ("step", "examples", "tokens", "seconds", "losses", "best_step", "best_loss")


def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean loss of a causal language model per labelled token of ``batches``, in nats."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
            loss, n = labelled_loss(model, moved)
            total, count = total + loss.item(), count + n
    return total / max(count, 1)


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


def _devices(model: Any) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
