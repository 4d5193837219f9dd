"""What the caller of a routed model may set for its router, and what one kind of router is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mttl_adapters.progress import Progress
from mttl_experts import Expert, ExpertLibrary
from mttl_routing.routers.choice import Choice
from mttl_routing.routers.data import Batch
from mttl_routing.routers.embedding import Example
from mttl_routing.routers.protocol import AnyRouter, Router

Batches = Mapping[str, Iterable[Batch]] | Callable[[Expert], Iterable[Batch]]
"""Data of each expert: by its name, or by a function that is asked for one expert at a time."""


@dataclass(frozen=True)
class RouterOptions:
    """What the caller of a routed model may set; a router reads what it has a use for.

    Attributes:
        top_k: experts a token gets, for routers that choose; this and the next four are those of
            :class:`Choice`.
        temperature: of a softmax over scores.
        top_p: share of the softmax over all experts that is enough.
        threshold: least share of an expert.
        null: whether the base itself stands to choice.
        weights: the expert, or the gate of each expert by name, for ``fixed``.
        seed: of the initial parameters of routers that learn.
        hidden: size of what such a router compares, or has between two maps.
        tasks: that ``poly`` and ``mhr`` learn of; None is those of the experts.
        heads: of ``mhr``; they divide the features of each layer.
        batches: data of each expert, for routers that learn from it.
        examples: prompts of each expert, or of each task (``lorauter``), by its name, for routers
            that are fitted on them.
        gate_steps: optimiser steps of each expert's gates, for ``phatgoose`` (100 by default); of
            the whole router, for those that learn and are given ``batches`` (100, or as many as
            there are experts).
        progress: told of each of those steps.
        then: name of a router for tokens, or one, that shares each token among the experts that
            ``retrieval`` found for its row; None is equal shares.
        base_model: what data and prompts are shown to.
        library: keeps what is derived from the experts and the data; None computes it anew.
    """

    top_k: int = 4
    temperature: float = 1.0
    top_p: float | None = None
    threshold: float | None = None
    null: bool = False
    weights: str | Mapping[str, float] | None = None
    seed: int = 0
    hidden: int = 64
    tasks: Sequence[str] | None = None
    heads: int = 4
    batches: Batches | None = None
    examples: Mapping[str, Iterable[Example]] | None = None
    gate_steps: int | None = None
    progress: Progress | None = None
    then: str | Router | None = None
    base_model: Any = None
    library: ExpertLibrary | None = None

    @property
    def choice(self) -> Choice:
        """How scores become gates."""
        return Choice(self.top_k, self.temperature, self.top_p, self.threshold, self.null)


@dataclass(frozen=True)
class RouterKind:
    """One router: how it is built from the experts, and where it was published.

    Attributes:
        build: makes it.
        paper: its address.
        learned: whether it means nothing before it was trained.
    """

    build: Callable[[Sequence[Expert], RouterOptions], AnyRouter]
    paper: str
    learned: bool = False
