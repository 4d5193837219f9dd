"""A router that learns, trained on the data of the experts that it chooses among.

What it learned is kept in the experts' library, by the experts, the data and all that decides it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mttl_adapters import TrainingConfig
from mttl_experts import Expert
from mttl_routing.routers import RouterOptions
from mttl_routing.routers.data import data_digest, fingerprint_of
from mttl_routing.routers.kept import kept
from mttl_routing.routers.learned import ScoringRouter
from mttl_routing.routers.poly import Poly
from mttl_routing.training import TASKS, learning_rate_of, train

if TYPE_CHECKING:
    from mttl_routing.routed_model import RoutedModel

# The fewest steps of a training that is told no number.
STEPS = 100
# What such a router is made with, and made again when it is loaded.
_SETTINGS = (
    "top_k", "temperature", "top_p", "threshold", "null", "seed", "hidden", "tasks", "heads",
)  # fmt: skip


def learn(routed: RoutedModel, options: RouterOptions) -> None:
    """Give the router of a routed model what it learns from the data of all its experts.

    Each of ``options.gate_steps`` optimiser steps takes one batch of one expert, and all experts
    take turns, in an order that ``options.seed`` decides; by default there are 100, or as many as
    experts. Where the library has what such a training gave, that is loaded.

    Args:
        routed: a model whose router has learned nothing yet.
        options: with ``batches``; of those for ``poly`` and ``mhr``, ones without ``task_names``
            are of their expert's task.

    Raises:
        ValueError: an expert has no batches, or several tasks and batches that name none; or there
            is nothing to learn from.
    """
    router = routed.router
    experts = [routed.expert(each) for each in routed.experts]
    steps = max(STEPS, len(experts)) if options.gate_steps is None else options.gate_steps
    if steps < 1:
        raise ValueError(f"gate_steps is {steps!r}; it must be at least 1")
    by_task = isinstance(router, Poly)
    data = [_batches(expert, options, by_task) for expert in experts]
    config = TrainingConfig(learning_rate=learning_rate_of(router), seed=options.seed)
    recipe = {
        "kind": "trained-router",
        "format": 1,
        "router": type(router).__name__,
        "begins": data_digest([router.state_dict()]),
        "choice": asdict(router.choice) if isinstance(router, ScoringRouter) else None,
        "tasks": list(router.tasks) if by_task else None,
        "steps": steps,
        "training": asdict(config),
        "combine": routed.combine,
        "granularity": routed.granularity,
        "base": fingerprint_of(options.base_model),
        "dtypes": _dtypes(routed),
        # Each line of the router is of one of them, so whose weights they are matters.
        "experts": [[expert.name, expert.digest] for expert in experts],
        "data": [data_digest(batches) for batches in data],
    }

    def tell(_: str, done: int, total: int | None) -> None:
        if options.progress is not None:
            options.progress("training the router", done, total)

    def made() -> Mapping[str, Tensor]:
        train(routed, list(islice(in_turn(data, options.seed), steps)), config, progress=tell)
        return {key: value.cpu().clone() for key, value in router.state_dict().items()}

    router.load_state_dict(dict(kept(options.library, experts, recipe, made)))


def settings_of(router: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that make a router of the same shape, also when experts were removed."""
    settings = {name: options[name] for name in _SETTINGS if name in options}
    return settings | ({"tasks": list(router.tasks)} if isinstance(router, Poly) else {})


def in_turn(data: Sequence[Sequence[Any]], seed: int) -> Iterator[Any]:
    """Endless batches: round after round one of each expert, in an order that the seed decides."""
    order = random.Random(seed)  # noqa: S311
    turns = list(range(len(data)))
    number = 0
    while True:
        order.shuffle(turns)
        for turn in turns:
            yield data[turn][number % len(data[turn])]
        number += 1


def _batches(expert: Expert, options: RouterOptions, by_task: bool) -> list[dict[str, Any]]:
    """An expert's data; with the task of each row, for a router that goes by it."""
    given = options.batches or {}
    own = given(expert) if callable(given) else given.get(expert.name, ())
    batches = [dict(batch) for batch in own]
    if not batches:
        raise ValueError(f"no batches were given for expert {expert.name!r}; a router needs some")
    tasks = expert.expert_info.tasks
    for batch in batches if by_task else ():
        if TASKS not in batch and len(tasks) != 1:
            raise ValueError(
                f"expert {expert.name!r} has {len(tasks)} tasks, and its batches do not say which "
                "row is of which; give each its task_names"
            )
        names = batch.get(TASKS, *tasks[:1])
        rows = len(batch["input_ids"])
        batch[TASKS] = (names,) * rows if isinstance(names, str) else tuple(names)
        if len(batch[TASKS]) != rows:
            raise ValueError(
                f"a batch of expert {expert.name!r} has {rows} rows and {len(batch[TASKS])} "
                "task_names; give one a row"
            )
    return batches


def _dtypes(routed: RoutedModel) -> list[str]:
    """Of the base, and of the experts' factors."""
    banks = routed._hooks.roster.banks.values()
    return [str(routed.model.dtype), *sorted({str(bank.dtype) for bank in banks})]
