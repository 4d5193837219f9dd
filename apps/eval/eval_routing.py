"""Whether a router sends the tokens of a task to the task's own expert, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from mttl_adapters.loop import moved
from mttl_experts.jobs import percent
from mttl_routing import RoutedModel


@torch.no_grad()
def routing_accuracy(
    routed: RoutedModel, batches: Iterable[Mapping[str, Any]], own: Collection[str]
) -> dict[str, float]:
    """Share of the tokens, by layer, whose highest weight is that of one of a task's own experts.

    Args:
        routed: all experts.
        batches: the task's rows, prompt and answer; padding does not count.
        own: names of the task's experts.
    """
    with routed.trace() as trace:
        for batch in batches:
            routed(**moved(batch, routed.device))
    return {layer: sum(best[name] for name in own) for layer, best in trace.best().items()}


def over_tasks(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of the tasks' shares, by layer."""
    found = [row["routing"] for row in rows if "routing" in row]
    return {layer: sum(row[layer] for row in found) / len(found) for layer in found[0]}


def in_words(shares: Mapping[str, float]) -> str:
    """One line for people."""
    least, *_, most = sorted(shares, key=lambda layer: shares[layer]) * 2
    mean = sum(shares.values()) / len(shares)
    return (
        f"tokens sent most to their own task's expert: {percent(mean)} % in the mean of "
        f"{len(shares)} layers, from {percent(shares[least])} ({least}) to "
        f"{percent(shares[most])} ({most})"
    )
