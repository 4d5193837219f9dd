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
from mttl_routing.routers.poly import Poly
from mttl_routing.training import TASKS, learning_rate_of, train

if TYPE_CHECKING:
    from mttl_routing.routed_model import RoutedModel

# What a router is made with that decides what it learns.
_DECIDING = (
    "top_k", "temperature", "top_p", "threshold", "null", "seed", "hidden", "tasks", "heads",
    "gate_steps",
)  # fmt: skip


def learn(routed: RoutedModel, name: str, options: RouterOptions) -> None:
    """Give the router of a routed model what it learns from the data of all its experts.

    Each of ``options.gate_steps`` optimiser steps takes one batch of one expert, and all experts
    take turns, in an order that ``options.seed`` decides. Where the library has what such a
    training gave, that is loaded.

    Args:
        routed: a model whose router, of that name, has learned nothing yet.
        name: of the router.
        options: with ``batches``; of those for ``poly`` and ``mhr``, ones without ``task_names``
            are of their expert's task.

    Raises:
        ValueError: an expert has no batches, or several tasks and batches that name none.
    """
    experts = [routed.expert(each) for each in routed.experts]
    by_task = isinstance(routed.router, Poly)
    data = {expert.name: _batches(expert, options, by_task) for expert in experts}
    config = TrainingConfig(learning_rate=learning_rate_of(routed.router), seed=options.seed)
    recipe = {
        "kind": "trained-router",
        "format": 1,
        "router": name,
        "options": {each: getattr(options, each) for each in _DECIDING},
        "training": asdict(config),
        "combine": routed.combine,
        "granularity": routed.granularity,
        "base": fingerprint_of(options.base_model),
        "experts": list(data),
        "data": [data_digest(batches) for batches in data.values()],
    }

    def tell(_: str, done: int, total: int | None) -> None:
        if options.progress is not None:
            options.progress(f"training router {name}", done, total)

    def made() -> Mapping[str, Tensor]:
        mixture = list(islice(_in_turn(list(data.values()), options.seed), options.gate_steps))
        train(routed, mixture, config, progress=tell)
        return {key: value.cpu().clone() for key, value in routed.router.state_dict().items()}

    routed.router.load_state_dict(dict(kept(options.library, experts, recipe, made)))


def _batches(expert: Expert, options: RouterOptions, by_task: bool) -> list[dict[str, Any]]:
    """An expert's data; with the task of each row, for a router that goes by it."""
    given = options.batches or {}
    batches = [dict(batch) for batch in (given(expert) if callable(given) else given[expert.name])]
    if not batches:
        raise ValueError(f"no batches were given for expert {expert.name!r}; a router needs some")
    tasks = expert.expert_info.tasks
    for batch in batches if by_task else ():
        if TASKS not in batch and len(tasks) != 1:
            raise ValueError(
                f"expert {expert.name!r} has {len(tasks)} tasks, and its batches do not say which "
                "row is of which; give each its task_names"
            )
        batch.setdefault(TASKS, tasks * len(batch["input_ids"]))
    return batches


def _in_turn(data: Sequence[Sequence[Any]], seed: int) -> Iterator[Any]:
    """Endless batches, round after round one of each expert, in an order of the seed."""
    order = random.Random(seed)  # noqa: S311
    turns = list(range(len(data)))
    number = 0
    while True:
        order.shuffle(turns)
        for turn in turns:
            yield data[turn][number % len(data[turn])]
        number += 1
