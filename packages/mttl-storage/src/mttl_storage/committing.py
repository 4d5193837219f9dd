"""One commit: store the files, then publish the log entry, rebasing when another was first."""

import datetime
import random
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mttl_storage.errors import Throttled
from mttl_storage.intents import Intent, plan
from mttl_storage.log import SNAPSHOT_EVERY, Log, LogEntry, entry_key, snapshot_files
from mttl_storage.materializing import shown_files
from mttl_storage.sealed import digest_of, seal
from mttl_storage.state import State
from mttl_storage.store.base import Staging

PATIENCE = 120.0
"""Seconds to go on trying while other writers are faster."""
LONGEST_PAUSE = 0.25
STALE = 60.0
"""Seconds after which staged files are renewed before publishing, so that gc spares them."""


Pages = Callable[[State], Mapping[str, bytes]]


def commit(
    log: Log,
    base: State,
    intents: list[Intent],
    message: str = "",
    pages: Pages | None = None,
) -> State:
    """The newest state, in which all intents are true.

    Args:
        log: of the repository.
        base: the state in which the writer decided; it is changed by no one.
        intents: done in order, all or none.
        message: for the history.
        pages: makes files for people to go with it, from the state that it makes.
    """
    transaction = uuid.uuid4().hex
    # Hashing and storing go on together, before what depends on the digests is decided.
    makers = [partial(intent.uploads_on, base) for intent in intents if intent.content]
    staging = log.store.stage(makers) if makers else Staging()
    staged_at = time.monotonic()
    state, began, attempt = base, time.monotonic(), 0
    while True:
        draft = state.successor("", _now())
        changes = plan(intents, base, state, draft)
        if not changes:
            newest = log.newest(state)
            if newest.generation == state.generation:
                return state
            state = newest
            continue
        files = {k: u for i in intents if i.content for k, u in i.content.uploads.items()}
        stale = time.monotonic() - staged_at > STALE
        if files and (stale or files.keys() - staging.files.keys()):
            staging = log.store.stage([lambda: files])  # noqa: B023
            staged_at = time.monotonic()
        entry = LogEntry(draft.generation, state.chain, draft.time, message, transaction, changes)
        draft.chain = digest_of(entry.to_bytes())
        beside = snapshot_files(draft) if draft.generation % SNAPSHOT_EVERY == 0 else {}
        shown = shown_files(log.store, state, draft, changes)
        made = None if pages is None else partial(pages, draft)
        if _published(log, entry, staging, beside, shown, message, made):
            return draft
        if time.monotonic() - began > PATIENCE:
            raise Throttled(
                f"{log.store.address!r}: other writers were faster {attempt + 1} times in "
                f"{PATIENCE:.0f} s; try again, or put several changes into one batch"
            )
        state = log.newest(state)
        time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.002 * 2**attempt)))  # noqa: S311
        attempt += 1


def _published(log: Log, entry: LogEntry, *with_it: Any) -> bool:
    """Whether the entry is in the log, now or since an earlier try whose answer was lost."""
    if log.store.publish(entry_key(entry.generation), seal(entry.to_bytes()), *with_it):
        return True
    found = log.entry(entry.generation)
    return found is not None and found[0].transaction == entry.transaction


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
