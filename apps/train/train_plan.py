"""What there is to train: each expert's name, rows, and the recipe that decides its weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from train_options import DEFAULT_STEPS, DEFAULT_TASKS, TrainOptions

from mttl_adapters import BaseModel, TrainingConfig, lora_config
from mttl_data import ANSWER_ONLY, EVALUATION_OVERLAP, DatasetLibrary, EmptyTaskError, Row
from mttl_experts import ExpertLibrary, check_expert_name, recipe_digest
from mttl_experts.jobs import say


class TakenNameError(click.ClickException):
    """The library has an expert of that name which was trained otherwise."""


@dataclass(frozen=True)
class Plan:
    """One expert to train.

    Attributes:
        name: Of the expert.
        tasks: Trained on together.
        train: Rows of all of them.
        validation: Rows whose loss picks the weights to keep.
        adapter: PEFT's config.
        training: Optimiser and schedule.
        steps: Optimiser steps.
        recipe: All that decides the weights, as plain data.
    """

    name: str
    tasks: tuple[str, ...]
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    adapter: Any
    training: TrainingConfig
    steps: int
    recipe: dict[str, Any]

    @property
    def digest(self) -> str:
        """Digest of the recipe."""
        return recipe_digest(self.recipe)

    def checkpoint(self, output: Path) -> Path:
        """Where an interrupted training of this recipe goes on from."""
        return output / "checkpoints" / f"{self.name}-{self.digest[:12]}.safetensors"


def plans(options: TrainOptions, data: DatasetLibrary, base: BaseModel) -> list[Plan]:
    """One plan for each expert that the options ask for, in order."""
    return [_plan(options, data, base, tasks) for tasks in _tasks(options, data)]


def mixture_plan(options: TrainOptions, data: DatasetLibrary, base: BaseModel) -> Plan:
    """The plan of a mixture of ``--moe`` experts, which learns all tasks that there are to learn.

    Its experts and their router are one training, with one recipe.
    """
    tasks = tuple(dict.fromkeys(name for names in _tasks(options, data) for name in names))
    plan = _plan(options, data, base, tasks)
    recipe = plan.recipe | {
        "kind": "train-moe",
        "moe": {
            "experts": options.moe,
            "router": options.router,
            "top_k": options.top_k,
            "balance": options.balance,
        }
        | (_of_tasks(options) if options.by_task else {}),
    }
    return replace(plan, name=check_expert_name(options.expert_name or "moe"), recipe=recipe)


def _of_tasks(options: TrainOptions) -> dict[str, Any]:
    return {"combine": options.combine, "router_learning_rate": options.router_learning_rate}


def is_there(plan: Plan, library: ExpertLibrary, replace: bool) -> bool:
    """Whether the library has the expert of this plan already.

    Raises:
        TakenNameError: it has another of that name, and ``replace`` is not set.
    """
    if plan.name not in library:
        return False
    info = library.infos()[plan.name]
    if info.recipe_digest == plan.digest:
        return True
    if replace:
        return False
    differs = _differences(info.training_config or {}, plan.recipe)
    raise TakenNameError(
        f"{library.uri} has an expert {plan.name!r} that was trained otherwise ({differs}); "
        "give --expert-name for a new one, or --replace to put it in its place"
    )


def _tasks(options: TrainOptions, data: DatasetLibrary) -> list[tuple[str, ...]]:
    if not options.all_tasks:
        return [tuple(names.split(",")) for names in options.task or DEFAULT_TASKS]
    names = data.tasks()
    if options.leave_out_evaluation_tasks:
        left_out = sorted(EVALUATION_OVERLAP.intersection(names))
        if left_out:
            say(f"left out, since benchmarks test on them: {', '.join(left_out)}")
        names = [name for name in names if name not in EVALUATION_OVERLAP]
    if not names:
        raise EmptyTaskError(f"{data.uri} has no task left to train on; name one with --task")
    return [(name,) for name in names]


def _plan(
    options: TrainOptions, data: DatasetLibrary, base: BaseModel, tasks: tuple[str, ...]
) -> Plan:
    train = _rows(options, data, tasks, "train", options.train_rows)
    validation: list[Row] = []
    if options.validation_rows:
        with suppress(EmptyTaskError):  # "most" rows: a task may have none
            validation = _rows(options, data, tasks, "validation", options.validation_rows)
    try:
        adapter = lora_config(
            base.model,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            layers=options.layers,
            modules=options.modules,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    training = TrainingConfig(
        learning_rate=options.learning_rate,
        scheduler=options.scheduler,
        warmup_proportion=options.warmup_proportion,
        weight_decay=options.weight_decay,
        micro_batch_size=options.micro_batch_size,
        evaluate_every=options.evaluate_every,
        seed=options.seed,
    )
    steps = options.steps or DEFAULT_STEPS
    if options.epochs:
        steps = options.epochs * -(-len(train) // options.batch_size)
    recipe = {
        "kind": "train",
        "format": 1,
        "data": {task: data.info(task).digest for task in tasks},
        "rows": {"train": len(train), "validation": len(validation)},
        "filters": {
            "task_source": sorted(options.task_source),
            "template_type": sorted(options.template_type),
        },
        "instruction": ANSWER_ONLY,
        "max_input_length": options.max_input_length,
        "max_output_length": options.max_output_length,
        "base": base.fingerprint,
        "dtype": str(base.model.dtype),
        "adapter": {
            "kind": "lora",
            "rank": options.rank,
            "alpha": options.alpha,
            "dropout": options.dropout,
            "layers": options.layers,
            "modules": options.modules,
        },
        "steps": steps,
        "batch_size": options.batch_size,
        "training": asdict(training),
    }
    name = check_expert_name(options.expert_name or "+".join(tasks))
    return Plan(name, tasks, tuple(train), tuple(validation), adapter, training, steps, recipe)


def _rows(
    options: TrainOptions,
    data: DatasetLibrary,
    tasks: Sequence[str],
    split: str,
    most: int | None,
) -> list[Row]:
    """At most ``most`` rows of each task, so that no task crowds out another."""
    return [
        row
        for task in tasks
        for row in data.rows(task, split, options.task_source, options.template_type)[:most]
    ]


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """The first few settings in which two recipes differ, as ``rank 8, here 16``."""
    found = []
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            inner = _differences(before, value, f"{path}{key}.")
            found += [inner] if inner else []
        elif before != value:
            found.append(f"{path}{key} {before!r}, here {value!r}")
    return "; ".join(found[:3])
