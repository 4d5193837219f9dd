"""What one training command is asked to do, checked before anything slow begins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mttl_experts.jobs import say

# Trained when no task is named: chosen by measuring (docs/log.md), chance-level tasks left out.
DEFAULT_TASKS = ("decimal_chain_sum", "family_relationships", "products", "word_sequence_reversal")
DEFAULT_STEPS = 40
ROUTER, TOP_K, BALANCE = "softmax", 2, 0.01
# Routers of a mixture that blend by a row's task, as their papers do: factors first.
BY_TASK = ("poly", "mhr")
# Those that give every expert to every token, so that there is nothing to even out.
DENSE = ("mlp", *BY_TASK)


@dataclass(frozen=True)
class TrainOptions:
    """One training command; the fields are the options of ``apps/train``."""

    task: tuple[str, ...]
    all_tasks: bool
    moe: int | None
    router: str
    top_k: int
    balance: float
    model: str
    dataset: str
    library: str
    destination: str | None
    expert_name: str | None
    replace: bool
    output: Path
    rank: int
    alpha: float
    dropout: float
    layers: str
    modules: str
    steps: int | None
    epochs: int | None
    batch_size: int
    micro_batch_size: int | None
    learning_rate: float
    warmup_proportion: float
    weight_decay: float
    scheduler: str
    evaluate_every: int | None
    max_input_length: int | None
    max_output_length: int | None
    precision: str
    checkpoint_seconds: float
    seed: int
    train_rows: int | None
    validation_rows: int
    test_rows: int | None
    metric: str | None
    predict_batch_size: int
    benchmarks: tuple[str, ...]
    data_dir: str | None
    task_source: tuple[str, ...]
    template_type: tuple[str, ...]
    leave_out_evaluation_tasks: bool

    @property
    def by_task(self) -> bool:
        """Whether the router of the mixture goes by the task of a row."""
        return bool(self.moe) and self.router in BY_TASK

    @property
    def combine(self) -> str:
        """How experts of the mixture are combined."""
        return "before" if self.by_task else "after"

    @property
    def router_learning_rate(self) -> float | None:
        """Peak rate of the router of the mixture, where it is not that of its experts."""
        from mttl_routing import Poly

        return Poly.learning_rate if self.by_task else None


def check(**options: Any) -> TrainOptions:
    """The options as one object.

    Raises:
        click.UsageError: two of them contradict each other.
    """
    options["task"] = tuple(options["task"])
    for name in ("benchmarks", "task_source", "template_type"):
        options[name] = _split(options[name])
    options["output"] = Path(options["output"])
    if options["alpha"] is None:
        options["alpha"] = 2.0 * options["rank"]
    _check_mixture(options)
    job = TrainOptions(**options)
    for option, pattern in (("--layers", job.layers), ("--modules", job.modules)):
        try:
            re.compile(pattern)
        except re.error as error:
            raise click.UsageError(
                f"{option} {pattern!r} is no regular expression: {error}"
            ) from None
    check_metric(job.metric)
    check_scheduler(job.scheduler)
    if len(set(job.task)) < len(job.task):
        raise click.UsageError(f"a --task is named twice: {', '.join(job.task)}")
    if job.task and job.all_tasks:
        raise click.UsageError("--all trains every task, so --task does not go with it; give one")
    if job.moe and job.benchmarks:
        raise click.UsageError(
            "--benchmarks measures experts one by one, and --moe makes one model of them; leave it "
            "out, and give the library to `apps/eval`"
        )
    if job.expert_name and len(job.task) != 1 and not job.moe:
        raise click.UsageError(
            f"--expert-name {job.expert_name!r} names one expert, but there are "
            f"{'many' if job.all_tasks else len(job.task) or len(DEFAULT_TASKS)} tasks; "
            "give one --task (of several tasks as 'a,b')"
        )
    if job.steps and job.epochs:
        raise click.UsageError("--steps and --epochs both say how long to train; give one")
    return job


def _check_mixture(options: dict[str, Any]) -> None:
    """Give the settings of ``--moe`` their defaults, and refuse those that would do nothing."""
    if not options["moe"]:
        # top_k may be meant for apps/eval, in a config file for both.
        for name in ("router", "balance"):
            if options[name] is not None:
                raise click.UsageError(f"--{name} is for --moe")
    dense = options["router"] in DENSE
    if dense and options["balance"]:
        raise click.UsageError(
            f"--router {options['router']} gives every expert to every token, so --balance has "
            "nothing to even out; leave it out"
        )
    if dense and options["top_k"]:
        say(f"--top-k is for a router that chooses; {options['router']} gives every expert a share")
    defaults = {"router": ROUTER, "top_k": TOP_K, "balance": 0.0 if dense else BALANCE}
    for name, default in defaults.items():
        if options[name] is None:
            options[name] = default


def check_metric(name: str | None) -> None:
    """Refuse a metric that nobody knows, before anything slow begins."""
    from mttl_data import METRICS

    if name is not None and name not in METRICS:
        raise click.UsageError(f"--metric {name!r} is not known; there are {', '.join(METRICS)}")


def check_scheduler(name: str) -> None:
    """Refuse a schedule that transformers does not have."""
    from transformers.trainer_utils import SchedulerType

    names = [each.value for each in SchedulerType]
    if name not in names:
        raise click.UsageError(f"--scheduler {name!r} is not known; there are {', '.join(names)}")


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
