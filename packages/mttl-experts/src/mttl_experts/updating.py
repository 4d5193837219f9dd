"""Taking in what another library has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mttl_experts.bases import KnownBases
from mttl_experts.errors import ExpertExistsError
from mttl_experts.selection import EXPERTS
from mttl_storage import Repository
from mttl_storage import copy as copy_items

if TYPE_CHECKING:
    from mttl_experts.changing import LibraryWriter


def take_in(source: LibraryWriter, target: LibraryWriter, replace: bool, strict: bool) -> list[str]:
    """Names of experts that are new or changed in ``target``; see ``ExpertLibrary.update_from``."""
    target.refresh()
    theirs = {EXPERTS + name: source.repository.item(EXPERTS + name) for name in source}
    ours, removed = target.repository.items(EXPERTS), target.repository.removed(EXPERTS)
    wanted: list[str] = []
    clashes: list[str] = []
    for name, item in theirs.items():
        here = ours.get(name)
        if here is None:
            gone = removed.get(name)
            if replace or gone is None or gone.digest != item.digest:
                wanted.append(name)
        elif here.digest == item.digest:
            if here.info != item.info and (replace or item.time > here.time):
                wanted.append(name)
        else:
            (wanted if replace else clashes).append(name)
    if clashes:
        past = _past(source.repository)
        forward = [name for name in clashes if ours[name].digest in past.get(name, ())]
        wanted += forward
        clashes = [name for name in clashes if name not in forward]
    if clashes:
        first = ", ".join(repr(name.removeprefix(EXPERTS)) for name in clashes[:5])
        raise ExpertExistsError(
            f"{len(clashes)} of the experts in {source.uri} differ from those of their name in "
            f"{target.uri} ({first}{' ...' if len(clashes) > 5 else ''}); nothing was "
            "taken; rename them, or pass replace=True to put theirs in the place of these"
        )
    bases = KnownBases((name.removeprefix(EXPERTS), item.info) for name, item in ours.items())
    for name in wanted:
        short = name.removeprefix(EXPERTS)
        bases.check(source.stored_info(short, theirs[name]), target.uri, strict=strict)
        bases.put(short, theirs[name].info)
    digests = {item.digest for item in theirs.values()}
    made = [e.item for e in source.artifacts.entries() if digests.issuperset(e.experts)]
    copy_items(source.repository, target.repository, names=[*wanted, *made])
    return sorted(name.removeprefix(EXPERTS) for name in wanted)


def _past(repository: Repository) -> dict[str, set[str]]:
    """Digests that each item once had."""
    past: dict[str, set[str]] = {}
    for commit in repository.history():
        for change in commit.changes:
            past.setdefault(change.name, set()).update(filter(None, [change.digest]))
    return past
