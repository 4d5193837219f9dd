"""gc: delete the files that no generation in use and no writer in flight can need."""

import datetime
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from mttl_storage import intents
from mttl_storage.committing import commit
from mttl_storage.items import Item, decode_line
from mttl_storage.log import Log
from mttl_storage.names import PRIVATE
from mttl_storage.state import State
from mttl_storage.store.base import Entry, Store

GRACE = 7 * 86400.0
"""Seconds for which files are kept that nothing needs any more."""

_ROUNDS = 5
"""How often to look again, when others changed files between looking and deleting."""
_CONTENT_FOLDER = re.compile(r"(.+?)/([0-9a-f]{64})(?=/)")


@dataclass(frozen=True)
class Collected:
    """What gc deleted.

    Args:
        items: removed items that can no longer be restored.
        files: deleted.
        bytes: that they took.
        note: what could not be deleted here, for people; empty if there is nothing.
    """

    items: int
    files: int
    bytes: int
    note: str = ""


def collect(log: Log, grace: float) -> tuple[State, Collected]:
    """The newest state and what was deleted.

    The order makes it safe at every step. Items are first forgotten, by a commit that conflicts
    with whoever restores them; then files are listed, and each is deleted only if nothing written
    or renewed it since. A writer renews what it finds and means to use.
    """
    if grace < 0:
        raise ValueError(f"grace must not be negative: {grace!r}")
    cutoff = time.time() - grace
    state = log.newest()
    old = [item for item in map(decode_line, state.gone.values()) if _seconds(item.time) <= cutoff]
    if old:
        state = commit(log, state, [intents.forget(item) for item in old], "gc")
    deleted: list[Entry] = []
    for _ in range(_ROUNDS):
        listed = list(log.store.scan(log.store.items_folder))
        state = log.newest(state)
        needed = _needed(log, state, cutoff)
        useless = [
            entry
            for entry in listed
            if entry.time <= cutoff and _is_content(log.store, entry) and not _held(entry, needed)
        ]
        gone = log.store.delete_unchanged(useless)
        deleted += gone
        if len(gone) == len(useless):
            break
    log.store.tidy(cutoff)
    size = sum(entry.size for entry in deleted)
    return state, Collected(len(old), len(deleted), size, log.store.kept_by_history)


def _needed(log: Log, state: State, cutoff: float) -> set[str]:
    """The folders of all items that are live, can be restored, or were so after the cutoff."""
    store = log.store
    needed = _folders(store, map(decode_line, [*state.live.values(), *state.gone.values()]))
    number = state.generation
    while number and (found := log.entry(number)) and _seconds(found[0].time) > cutoff:
        for change in found[0].changes:
            if "was" in change and change["kind"] != "forget":
                needed.add(store.item_folder(*change["was"]))
        number -= 1
    return needed


def _folders(store: Store, items: Iterable[Item]) -> set[str]:
    return {store.item_folder(item.home, item.digest) for item in items}


def _is_content(store: Store, entry: Entry) -> bool:
    """Whether a file lies where a repository puts item files; others are not ours to delete."""
    key = entry.key.removeprefix(f"{store.items_folder}/" if store.items_folder else "")
    return not key.startswith(f"{PRIVATE}/") and _CONTENT_FOLDER.match(key) is not None


def _held(entry: Entry, needed: set[str]) -> bool:
    folder = entry.key
    while "/" in folder:
        folder = folder.rpartition("/")[0]
        if folder in needed:
            return True
    return False


def _seconds(moment: str) -> float:
    return datetime.datetime.fromisoformat(moment).timestamp()
