"""The history of one expert, and of one score: who changed what, and in which commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mttl_experts.difference import changed_facts
from mttl_experts.errors import ExpertError, expert_not_found
from mttl_experts.lineage import Known, Node
from mttl_experts.scores import Score
from mttl_experts.selection import EXPERTS
from mttl_storage import Change, Commit

if TYPE_CHECKING:
    from mttl_experts.changing import LibraryWriter


@dataclass(frozen=True)
class Event:
    """One change of an expert.

    Attributes:
        generation: number of the commit.
        time: of the commit, ISO 8601 in UTC.
        message: of the commit.
        kind: add, replace, info, rename, remove, restore or forget.
        name: of the expert after it.
        digest: of its weights after it; None if it has none.
        source: old name, of a rename.
        facts: those that changed, before and after, where they were asked for.
    """

    generation: int
    time: str
    message: str
    kind: str
    name: str
    digest: str | None
    source: str | None = None
    facts: dict[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Blame:
    """Where a score came from.

    Attributes:
        score: itself.
        generation: number of the commit that keeps it.
        time: of that commit.
        experts: what the model was made of, as it stands now; none for the base alone.
        method: how they were put together; empty for one expert.
        base: fingerprint of the base.
    """

    score: Score
    generation: int
    time: str
    experts: tuple[Node, ...]
    method: dict[str, Any]
    base: str | None


class ScoreNotFoundError(ExpertError, LookupError):
    """The library has no such score."""


def log(library: LibraryWriter, name: str, facts: bool = False) -> list[Event]:
    """Changes of one expert, newest first; see ``ExpertLibrary.log``."""
    found: list[tuple[Commit, Change]] = []
    current = EXPERTS + name
    for commit in reversed(library.repository.history()):
        for change in reversed(commit.changes):
            if change.name == current:
                found.append((commit, change))
                current = change.source or current
            elif change.source == current:  # another had the name, and gave it up
                found.append((commit, change))
    if not found:
        raise expert_not_found(library.uri, name, library.keys())
    before = [change.info or {} for _, change in found[1:]] + [{}]
    return [
        _event(commit, change, changed_facts(info, change.info or {}) if facts else {})
        for (commit, change), info in zip(found, before, strict=True)
    ]


def blame(library: LibraryWriter, score: Score | str) -> Blame:
    """Where a score came from; see ``ExpertLibrary.blame``."""
    if isinstance(score, str):
        score = _find(library, score)
    item = library.scores.item(score)
    known = Known(library)
    return Blame(
        score,
        item.generation,
        item.time,
        tuple(known.node(digest) for digest in score.experts),
        dict(score.recipe.get("method") or {}),
        score.recipe.get("base"),
    )


def _find(library: LibraryWriter, beginning: str) -> Score:
    found = [score for score in library.scores.table() if score.digest.startswith(beginning)]
    if len(found) != 1 or not beginning:
        what = (
            f"{len(found)} scores whose digest begins" if found else "no score whose digest begins"
        )
        raise ScoreNotFoundError(
            f"{library.uri} has {what} with {beginning!r}; library.scores.table() lists them"
        )
    return found[0]


def _event(commit: Commit, change: Change, facts: dict[str, tuple[Any, Any]]) -> Event:
    return Event(
        commit.generation,
        commit.time,
        commit.message,
        change.kind,
        change.name.removeprefix(EXPERTS),
        change.digest,
        change.source and change.source.removeprefix(EXPERTS),
        facts if change.kind in ("info", "replace") else {},
    )
