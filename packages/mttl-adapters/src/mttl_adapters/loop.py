"""The one training loop: some parameters of a model, one optimiser step a batch.

What a step minimises comes in as a function, so that one adapter, a router, and a router with its
experts train by the same schedule, checks, validation and checkpoints.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mttl_adapters.checkpoint import load_checkpoint, save_checkpoint
from mttl_adapters.errors import CheckpointWarning, DivergedError
from mttl_adapters.losses import IGNORED, labelled_loss
from mttl_adapters.progress import Progress
from mttl_adapters.training_config import TrainingConfig, TrainingReport

Batch = Mapping[str, Any]
"""``input_ids``, ``attention_mask`` and ``labels`` (b, s), and more that has one entry a row."""


def n_labelled(batch: Batch) -> int:
    """How many tokens of a batch a causal language model is to say."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class Objective(NamedTuple):
    """What is minimised: ``loss`` summed over the tokens that ``count`` counts.

    Attributes:
        loss: of a model and some rows of a batch: the sum, and over how many tokens it is. Without
            gradients, at validation, it is the measure by which weights are kept.
        count: of the tokens of a batch, before its rows go through the model.
    """

    loss: Callable[[Any, dict[str, Any]], tuple[Tensor, int]] = labelled_loss
    count: Callable[[Batch], int] = n_labelled


def train_parameters(
    model: Any,
    parameters: Mapping[str, Tensor],
    batches: Sequence[Batch],
    config: TrainingConfig,
    *,
    objective: Objective = Objective(),  # noqa: B008
    rates: Mapping[str, float] = MappingProxyType({}),
    validation: Sequence[Batch] = (),
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 10.0,
    progress: Progress | None = None,
) -> TrainingReport:
    """Move ``parameters`` in place, one optimiser step a batch, to those of best validation loss.

    Interrupted and called again with the same arguments, it goes on from ``checkpoint`` and ends
    with the same numbers as if nothing had happened. The caller seeds (:func:`seeded`), and says in
    which mode the model trains.

    Args:
        model: what the objective is given; it has a ``device``, and modes as a module has.
        parameters: leaf tensors by name; whatever else takes part must want no gradient.
        batches: one a step.
        config: optimiser and schedule.
        objective: what is minimised.
        rates: peak learning rates of those parameters, by name, that do not move at the config's.
        validation: batches whose loss picks the numbers to keep.
        checkpoint: file to save to and to go on from; the caller removes it when done.
        checkpoint_seconds: at least this long lies between two saves.
        progress: told of each step.

    Raises:
        ValueError: there is nothing to train on.
        DivergedError: a loss or a parameter became infinite or no number.
    """
    if not batches:
        raise ValueError("there are no batches to train on; the task has no training rows")
    run = _Run(model, parameters, len(batches), config, objective, rates, validation, checkpoint)
    run.resume()
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


@contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Random numbers from a seed inside the block; those outside go on as if it had not been."""
    with torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed)
        yield


def moved(batch: Batch, device: Any) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


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
        model: Any,
        parameters: Mapping[str, Tensor],
        n_steps: int,
        config: TrainingConfig,
        objective: Objective,
        rates: Mapping[str, float],
        validation: Sequence[Batch],
        checkpoint: Path | None,
    ) -> None:
        from transformers import get_scheduler

        self.model, self.config, self.objective = model, config, objective
        self.validation, self.checkpoint = validation, checkpoint
        self.trained = dict(parameters)
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.trained.items():
            groups.setdefault(rates.get(name, config.learning_rate), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": members, "lr": rate} for rate, members in groups.items()],
            weight_decay=config.weight_decay,
        )
        self.n_steps = n_steps
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
        batch = moved(batch, self.model.device)
        n_labels = self.objective.count(batch)
        rows = len(batch["labels"])
        micro = self.config.micro_batch_size or rows
        total = 0.0
        for first in range(0, rows, micro):
            part = {name: of_rows[first : first + micro] for name, of_rows in batch.items()}
            loss, _ = self.objective.loss(self.model, part)
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
        counted = batch.get("attention_mask")
        self.tokens += batch["input_ids"].numel() if counted is None else int(counted.sum())
        self.seconds += time.monotonic() - start
        every = self.config.evaluate_every or self.n_steps
        if self.validation and (self.step % every == 0 or self.step == self.n_steps):
            self.validate()

    def validate(self) -> None:
        loss = mean_loss(self.model, self.validation, self.objective)
        self.check_finite("validation loss", loss)
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.best = {n: p.detach().clone() for n, p in self.trained.items()}

    def check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            rates = [f"{group['initial_lr']:g}" for group in self.optimizer.param_groups]
            raise DivergedError(
                f"training diverged: the {what} is {value} after {self.step} of {self.n_steps} "
                f"steps at learning rate {' and '.join(rates)}; lower the learning rate, or use a "
                "number format of wider range"
            )

    def save(self, path: Path) -> None:
        tensors = {f"weight/{n}": p.detach() for n, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}/{name}"] = value
        tensors |= {f"best/{n}": p for n, p in self.best.items()}
        tensors["random"] = torch.get_rng_state()
        for device in _devices(self.model):
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
        for index in _devices(self.model):
            torch.cuda.set_rng_state(tensors[f"random.{index}"], index)

    def result(self) -> TrainingReport:
        with torch.no_grad():
            for name, value in self.best.items():
                self.trained[name].copy_(value)
        largest = torch.stack([p.detach().abs().max().float().cpu() for p in self.trained.values()])
        self.check_finite("largest weight", largest.max().item())
        last = self.losses[-max(1, self.n_steps // 10) :]
        return TrainingReport(
            step=self.best_step or self.step,
            train_loss=sum(last) / len(last),
            validation_loss=self.best_loss if self.best else None,
            examples=self.examples,
            tokens=self.tokens,
            seconds=self.seconds,
            resumed_from=self.resumed_from,
        )


_PLAIN_STATE = ("step", "examples", "tokens", "seconds", "losses", "best_step", "best_loss")


def mean_loss(
    model: Any,
    batches: Sequence[Batch],
    objective: Objective = Objective(),  # noqa: B008
) -> float:
    """Mean loss of a causal language model per labelled token of ``batches``, in nats.

    In evaluation mode, without gradients; the model is then back in the mode that it was in.
    """
    total, count = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            loss, n = objective.loss(model, moved(batch, model.device))
            total, count = total + loss.item(), count + n
    model.train(training)
    return total / max(count, 1)


def _devices(model: Any) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
