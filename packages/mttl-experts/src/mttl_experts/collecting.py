"""What goes with experts that are gone for good: the artifacts and scores made from them."""

from __future__ import annotations

import dataclasses
import time
from datetime import datetime

from mttl_experts.artifacts import PREFIX
from mttl_experts.selection import EXPERTS
from mttl_storage import Batch, Collected, Item, Repository

GRACE = 7 * 86400.0
"""Seconds for which what nothing needs is kept all the same, for readers and writers in flight."""


def collect(repository: Repository, grace: float) -> Collected:
    """Delete what nothing has needed for ``grace`` seconds; see ``ExpertLibrary.gc``."""
    cutoff = time.time() - grace
    orphans = [
        item for item in made_from_gone(repository, cutoff=cutoff) if _seconds(item) <= cutoff
    ]
    if orphans:
        with repository.batch("gc: what was made from experts that are gone") as batch:
            for item in orphans:
                remove_for_good(batch, item)
    collected = repository.gc(grace)
    return dataclasses.replace(collected, items=collected.items + len(orphans))


def made_from_gone(
    repository: Repository, without: str | None = None, cutoff: float = 0.0
) -> list[Item]:
    """Artifacts made from an expert that is neither there nor to be restored.

    Args:
        repository: of the library.
        without: item that is taken for gone.
        cutoff: and so is what was removed before this time.
    """
    live = repository.items(EXPERTS).values()
    gone = (item for item in repository.removed(EXPERTS).values() if _seconds(item) > cutoff)
    kept = {item.digest for item in [*live, *gone] if item.name != without}
    return [
        item
        for item in repository.items(PREFIX).values()
        if not kept.issuperset(item.info.get("experts") or ())
    ]


def remove_for_good(batch: Batch, item: Item) -> None:
    """Remove an item so that it cannot be restored."""
    batch.remove(item.name)
    batch.forget(item)


def _seconds(item: Item) -> float:
    return datetime.fromisoformat(item.time).timestamp()
