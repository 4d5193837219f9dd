"""Every router, each with its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from mttl_experts import Expert
from mttl_routing.routers.arrow import Arrow, arrow_prototypes
from mttl_routing.routers.protocol import (
    AnyRouter,
    FollowsExperts,
    Layer,
    Prompt,
    Router,
    Rows,
    SequenceRouter,
    Tasks,
)
from mttl_routing.routers.task import Task
from mttl_routing.routers.uniform import Uniform

__all__ = [
    "ROUTERS",
    "AnyRouter",
    "Arrow",
    "FollowsExperts",
    "Layer",
    "Prompt",
    "Router",
    "RouterKind",
    "RouterOptions",
    "Rows",
    "SequenceRouter",
    "Task",
    "Tasks",
    "Uniform",
    "arrow_prototypes",
]

Prototypes = Callable[[Sequence[Expert]], Mapping[str, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class RouterOptions:
    """What the caller of a routed model may set; a router reads what it has a use for.

    Attributes:
        top_k: experts a token gets, for routers that choose.
        temperature: of a softmax over scores, for routers that have one.
        prototypes: gives each expert's Arrow prototypes, by expert name.
    """

    top_k: int
    temperature: float
    prototypes: Prototypes


@dataclass(frozen=True)
class RouterKind:
    """One router: how it is built from the experts, and where it was published."""

    build: Callable[[Sequence[Expert], RouterOptions], AnyRouter]
    paper: str


def _arrow(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return Arrow(options.prototypes(experts), top_k=options.top_k, temperature=options.temperature)


def _task(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return Task({expert.name: expert.expert_info.tasks for expert in experts})


def _uniform(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return Uniform()


# The two baselines are described where Arrow is.
ROUTERS: Mapping[str, RouterKind] = MappingProxyType(
    {
        "arrow": RouterKind(_arrow, "https://arxiv.org/abs/2405.11157"),
        "oracle": RouterKind(_task, "https://arxiv.org/abs/2405.11157"),
        "task": RouterKind(_task, "https://arxiv.org/abs/2405.11157"),
        "uniform": RouterKind(_uniform, "https://arxiv.org/abs/2405.11157"),
    }
)
