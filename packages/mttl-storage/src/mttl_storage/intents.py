"""What a writer wants, apart from the generation it lands on.

An intent is turned into changes anew for each generation that a commit tries to follow, so that a
commit that lost a race can be rebased. Changes are plain data, as the log keeps them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mttl_storage.errors import Conflict, StorageError
from mttl_storage.items import (
    Files,
    Item,
    checked_files,
    checked_info,
    new_record,
    to_record,
    uploads_of,
)
from mttl_storage.names import check_name
from mttl_storage.sealed import to_json
from mttl_storage.state import State
from mttl_storage.store.base import Store
from mttl_storage.store.transfer import Upload

Changes = list[dict[str, Any]]


class Content:
    """The files and the info that an item is to have. The files are hashed when first needed."""

    def __init__(
        self, store: Store, name: str, files: Files, info: Mapping[str, Any] | None
    ) -> None:
        """Check everything that can be checked without reading the files."""
        self._store, self._name = store, check_name(name)
        self._files, self._info = checked_files(files), checked_info(info)
        self._uploads: dict[str, Upload] | None = None

    def _hashed(self) -> dict[str, Upload]:
        # Not a cached_property: before Python 3.12 one lock makes all of a class wait.
        if self._uploads is None:
            self._uploads = uploads_of(self._files)
        return self._uploads

    @property
    def record(self) -> dict[str, Any]:
        """What the log is to keep of the item."""
        return new_record(self._hashed(), self._info)

    @property
    def uploads(self) -> dict[str, Upload]:
        """What to store, by key."""
        folder = self._store.item_folder(self._name, self.record["digest"])
        return {f"{folder}/{file}": upload for file, upload in self._hashed().items()}


@dataclass(frozen=True)
class Intent:
    """One thing to do to one item (two names if it renames).

    Args:
        names: of the items it is about; a change to them by others is a conflict.
        changes: what to log on top of a state; nothing if it is so already.
        content: what has to be stored for it.
    """

    names: tuple[str, ...]
    changes: Callable[[State], Changes]
    content: Content | None = None

    def uploads_on(self, state: State) -> Mapping[str, Upload]:
        """What to store if it is done by itself on a state; nothing if that cannot be."""
        if self.content is None:
            return {}
        try:
            return self.content.uploads if self.changes(state) else {}
        except StorageError:
            return {}


def plan(intents: list[Intent], base: State, onto: State, draft: State) -> Changes:
    """The changes that make all intents true on top of a state.

    Args:
        intents: in order; later ones see what earlier ones did.
        base: the state in which the writer decided.
        onto: the state to follow; Conflict if others changed there what the intents are about.
        draft: the successor of ``onto``; it gets the changes applied.
    """
    planned: Changes = []
    for intent in intents:
        overtaken = [name for name in intent.names if _record(base, name) != _record(onto, name)]
        try:
            changes = intent.changes(draft)
        except StorageError as error:
            if overtaken:
                raise _overtaken(overtaken[0], base) from error
            raise
        if changes and overtaken:
            raise _overtaken(overtaken[0], base)
        for change in changes:
            draft.apply(change)
        planned += changes
    return planned


def _record(state: State, name: str) -> tuple[bytes | None, bytes | None]:
    return state.live.get(name), state.gone.get(name)


def _overtaken(name: str, base: State) -> Conflict:
    return Conflict(
        f"{name!r} was changed by someone else after generation {base.generation}; "
        "call refresh(), look at it, and try again"
    )


def add(store: Store, name: str, files: Files, info: Mapping[str, Any] | None) -> Intent:
    """A new item; nothing to do if it is there with the same content and info."""
    content = Content(store, name, files, info)

    def changes(state: State) -> Changes:
        record = content.record
        if name in state.live:
            there = state.item(name)
            if _same(there, record):
                return []
            differs = "info" if there.digest == record["digest"] else "content"
            raise Conflict(f"{name!r} is there with other {differs}; use replace, or another name")
        state.check_free(name)
        return [_change("add", name, record)]

    return Intent((name,), changes, content)


def replace(
    store: Store,
    name: str,
    files: Files,
    info: Mapping[str, Any] | None,
    expected: str | None,
) -> Intent:
    """New content for an item, and new info unless that is None."""
    content = Content(store, name, files, info)

    def changes(state: State) -> Changes:
        there, record = _expected(state, name, expected), content.record
        wanted = {**record, "info": there.info} if info is None else record
        return [] if _same(there, wanted) else [_change("replace", name, wanted, there)]

    return Intent((name,), changes, content)


def update_info(name: str, info: Mapping[str, Any], expected: str | None) -> Intent:
    """New info for an item, in place of all it had."""
    check_name(name)
    wanted = checked_info(info)

    def changes(state: State) -> Changes:
        there = _expected(state, name, expected)
        record = {**to_record(name, there), "info": wanted}
        return [] if _same(there, record) else [_change("info", name, record)]

    return Intent((name,), changes)


def remove(name: str) -> Intent:
    """The item is no longer listed, and can be restored until gc collects it."""
    check_name(name)

    def changes(state: State) -> Changes:
        there = state.item(name)
        return [_change("remove", name, to_record(name, there), there)]

    return Intent((name,), changes)


def restore(name: str) -> Intent:
    """A removed item is back as it was; nothing to do if it is there."""
    check_name(name)

    def changes(state: State) -> Changes:
        if name in state.live:
            return []
        there = state.gone_item(name)
        state.check_free(name)
        return [_change("restore", name, to_record(name, there))]

    return Intent((name,), changes)


def rename(old: str, new: str) -> Intent:
    """The item has another name; its files stay where they are."""
    check_name(old)
    check_name(new)

    def changes(state: State) -> Changes:
        there = state.item(old)
        if old == new:
            return []
        without = state.successor(state.chain, state.time)
        without.apply(_change("remove", old, to_record(old, there)))
        without.check_free(new)
        return [{**_change("rename", new, to_record(new, there)), "source": old}]

    return Intent((old, new), changes)


def forget(item: Item) -> Intent:
    """A removed item can no longer be restored, so that gc may delete its files."""

    def changes(state: State) -> Changes:
        if item.name not in state.gone:
            return []
        there = state.gone_item(item.name)
        return [{"kind": "forget", "name": item.name, "was": [there.home, there.digest]}]

    return Intent((item.name,), changes)


def _expected(state: State, name: str, expected: str | None) -> Item:
    there = state.item(name)
    if expected is not None and there.digest != expected:
        raise Conflict(f"{name!r} has digest {there.digest!r}, not {expected!r} as expected")
    return there


def _same(there: Item, record: Mapping[str, Any]) -> bool:
    return there.digest == record["digest"] and to_json(there.info) == to_json(record["info"])


def _change(
    kind: str, name: str, record: Mapping[str, Any], was: Item | None = None
) -> dict[str, Any]:
    change = {"kind": kind, "name": name, "item": record}
    return change if was is None else {**change, "was": [was.home, was.digest]}
