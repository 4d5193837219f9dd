"""The log of a repository: small sealed entries, one a generation, and a snapshot every hundredth.

An entry is published by creating the next file, which only one writer can do. Readers start at the
newest snapshot and probe forward.
"""

import contextlib
import itertools
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mttl_storage.errors import Corrupt, NotFound
from mttl_storage.items import check_digest, check_time
from mttl_storage.names import PRIVATE
from mttl_storage.sealed import FORMAT, digest_of, parse, seal, to_json, unseal
from mttl_storage.state import State, check_change
from mttl_storage.store.base import Store

SNAPSHOT_EVERY = 100
IDENTITY = f"{PRIVATE}/repository.json"
HEAD = f"{PRIVATE}/head.json"
SNAPSHOTS = f"{PRIVATE}/snapshots"
LOG = f"{PRIVATE}/log"
_END = 10**10
"""Generations are below this, for their names have ten digits."""


@dataclass(frozen=True)
class Change:
    """One change of a commit, or one difference between two generations.

    Args:
        kind: add, replace, info, rename, remove, restore or forget (files collected by gc).
        name: of the item.
        digest: of its content after the change, None if it has none.
        previous: of its content before.
        source: for a rename, the old name.
        info: of the item after the change, None if it is gone. It takes no part in comparisons.
    """

    kind: str
    name: str
    digest: str | None = None
    previous: str | None = None
    source: str | None = None
    info: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Commit:
    """One generation of the log."""

    generation: int
    time: str
    message: str
    transaction: str
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class LogEntry:
    """One entry as stored; ``changes`` hold the whole records."""

    generation: int
    chain: str
    time: str
    message: str
    transaction: str
    changes: list[dict[str, Any]]

    def to_bytes(self) -> bytes:
        """The body of its file."""
        return to_json({"format": FORMAT, **vars(self)}) + b"\n"

    @classmethod
    def from_bytes(cls, body: bytes, where: str) -> "LogEntry":
        """The entry in the body of a file, or Corrupt."""
        value = parse(body, where)
        del value["format"]
        try:
            entry = cls(**value)
            if not (type(entry.generation) is int and isinstance(entry.changes, list)):
                raise TypeError(f"generation {entry.generation!r:.80} with {type(entry.changes)}")
            if not (isinstance(entry.message, str) and isinstance(entry.transaction, str)):
                raise TypeError("message and transaction must be text")
            check_digest(entry.chain)
            check_time(entry.time)
            for change in entry.changes:
                check_change(change)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{where!r} is not a log entry: {error!r:.200}") from None
        return entry

    def commit(self) -> Commit:
        """The entry as users see it."""
        return Commit(
            self.generation,
            self.time,
            self.message,
            self.transaction,
            tuple(_public(change) for change in self.changes),
        )


class Log:
    """Reads and publishes the generations of the repository in a store."""

    def __init__(self, store: Store) -> None:
        """Nothing is read yet."""
        self.store = store

    def create(self) -> None:
        """Make the store a repository, if it is none yet."""
        body = to_json({"format": FORMAT, "id": secrets.token_hex(16)}) + b"\n"
        self.store.prepare()
        self.store.publish(IDENTITY, seal(body), beside={HEAD: _head_naming(0)})

    def origin(self) -> State:
        """Generation 0; NotFound if there is no repository."""
        return self._origin(self.store.read_all([IDENTITY])[0])

    def _origin(self, identity: bytes | None) -> State:
        if identity is None:
            raise NotFound(
                f"there is no repository at {self.store.address!r}; check the address, or pass "
                f"create=True to make one{self.store.missing_hint}"
            )
        where = self.store.address_of(IDENTITY)
        body = unseal(identity, where)
        parse(body, where)
        return State(0, digest_of(body))

    def newest(self, state: State | None = None) -> State:
        """The newest generation, found from a known one or from the newest snapshot."""
        if state is not None:
            return self.replay(state, self.entries_after(state.generation))
        # The first entries are asked for at the same time: of a young repository they are all.
        first = [entry_key(1), entry_key(2)] if self.store.distant else []
        identity, head, *bodies = self.store.read_all([IDENTITY, HEAD, *first])
        state = self._newest_known(identity, head)
        known = dict(zip(first, bodies, strict=True))
        return self.replay(state, self.entries_after(state.generation, known))

    def _newest_known(self, identity: bytes | None, head: bytes | None) -> State:
        """The state of the newest snapshot, or the origin while there is none."""
        origin = self._origin(identity)
        # A reader can do without head and snapshots, so damage there only costs time; verify tells.
        with contextlib.suppress(Corrupt):
            if named := self._head(head):
                return self._from_snapshot(named) or self._newest_snapshot() or origin
            if head is not None:
                return origin
        return self._newest_snapshot() or origin

    def at(self, generation: int) -> State:
        """One generation; NotFound if it does not exist."""
        origin = self.origin()
        start = generation - generation % SNAPSHOT_EVERY
        state = self._from_snapshot(start) or origin
        while state is origin and start > SNAPSHOT_EVERY:  # a snapshot can be missing
            start -= SNAPSHOT_EVERY
            state = self._from_snapshot(start) or origin
        wanted = list(range(state.generation + 1, generation + 1))
        entries = [self._entry(number, body) for number, body in self._bodies(wanted)]
        if generation < 0 or len(entries) < len(wanted):
            raise NotFound(f"{self.store.address!r} has no generation {generation}")
        return self.replay(state, entries)

    def entry(self, generation: int) -> tuple[LogEntry, str] | None:
        """One entry and its digest, None if there is none yet."""
        for number, body in self._bodies([generation]):
            return self._entry(number, body)
        return None

    def entries_after(
        self, generation: int, known: Mapping[str, bytes | None] | None = None
    ) -> Iterator[tuple[LogEntry, str]]:
        """The entries that follow a generation, each with its digest, to the newest.

        Args:
            generation: before the first of them.
            known: files that were just read, None for one that is missing.
        """
        windows = itertools.chain((2, 16), itertools.repeat(100))
        if not self.store.distant:
            windows = itertools.chain((1, 2, 4, 8, 16), itertools.repeat(32))
        for window in windows:
            numbers = range(generation + 1, generation + 1 + window)
            count = 0
            for number, body in self._bodies(numbers, known):
                yield self._entry(number, body)
                count += 1
            if count < window:
                return
            generation += window

    def replay(self, state: State, entries: Iterable[tuple[LogEntry, str]]) -> State:
        """The state after further entries; Corrupt if they do not continue it."""
        for entry, digest in entries:
            where = self.store.address_of(entry_key(entry.generation))
            if (entry.generation, entry.chain) != (state.generation + 1, state.chain):
                raise Corrupt(f"{where!r} does not follow the entry before it; run verify")
            state = state.successor(digest, entry.time)
            apply_all(state, entry.changes, where)
        return state

    def snapshots(self) -> list[int]:
        """The generations that have a snapshot, newest first."""
        names = (entry.key.rpartition("/")[2] for entry in self.store.scan(SNAPSHOTS))
        numbers = (name.removesuffix(".json") for name in names)
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def snapshot(self, generation: int) -> State | None:
        """The state of a snapshot, None if there is none, or Corrupt."""
        key = snapshot_key(generation)
        body = self._body(key)
        return None if body is None else State.from_bytes(body, self.store.address_of(key))

    def head(self) -> int:
        """The generation of the snapshot that the head names, 0 if there is no head."""
        return self._head(self.store.read_all([HEAD])[0])

    def _head(self, data: bytes | None) -> int:
        if data is None:
            return 0
        where = self.store.address_of(HEAD)
        found = parse(unseal(data, where), where).get("snapshot")
        if not (isinstance(found, int) and 0 <= found < _END):
            raise Corrupt(f"{where!r} names no snapshot: {found!r:.80}")
        return found

    def _from_snapshot(self, generation: int) -> State | None:
        if generation <= 0:
            return None
        with contextlib.suppress(Corrupt):
            state = self.snapshot(generation)
            return state if state and state.generation == generation else None
        return None

    def _newest_snapshot(self) -> State | None:
        return next(filter(None, map(self._from_snapshot, self.snapshots())), None)

    def _bodies(
        self, generations: Iterable[int], known: Mapping[str, bytes | None] | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """The entries that there are, up to the first that is missing."""
        keys = {number: entry_key(number) for number in generations}
        found = dict(known or {})
        unknown = [key for key in keys.values() if key not in found]
        found.update(zip(unknown, self.store.read_all(unknown), strict=True))
        for number, key in keys.items():
            data = found[key]
            if data is None:
                return
            yield number, unseal(data, self.store.address_of(key))

    def _entry(self, generation: int, body: bytes) -> tuple[LogEntry, str]:
        where = self.store.address_of(entry_key(generation))
        entry = LogEntry.from_bytes(body, where)
        if entry.generation != generation:
            raise Corrupt(f"{where!r} is the entry of generation {entry.generation!r:.80}")
        return entry, digest_of(body)

    def _body(self, key: str) -> bytes | None:
        data = self.store.read_all([key])[0]
        return None if data is None else unseal(data, self.store.address_of(key))


def apply_all(state: State, changes: Iterable[Mapping[str, Any]], where: str) -> None:
    """Apply the changes of an entry to a state that no one reads yet, or raise Corrupt."""
    try:
        for change in changes:
            state.apply(change)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Corrupt(f"{where!r} holds a change that cannot be applied: {error!r:.200}") from None


def snapshot_files(state: State) -> dict[str, bytes]:
    """The snapshot of a state, and the head that names it. Only speed depends on either."""
    number = state.generation
    return {snapshot_key(number): seal(state.to_bytes()), HEAD: _head_naming(number)}


def _head_naming(snapshot: int) -> bytes:
    return seal(to_json({"format": FORMAT, "snapshot": snapshot}) + b"\n")


def entry_key(generation: int) -> str:
    """Where an entry lies. A folder holds a hundred, which a hub lists and rewrites cheaply."""
    return f"{LOG}/{(generation - 1) // SNAPSHOT_EVERY:08d}/{generation:010d}.json"


def snapshot_key(generation: int) -> str:
    """Where a snapshot lies."""
    return f"{SNAPSHOTS}/{generation:010d}.json"


def _public(change: Mapping[str, Any]) -> Change:
    kind, was = change["kind"], change.get("was")
    item = change["item"] if kind not in ("remove", "forget") else None
    return Change(
        kind,
        change["name"],
        item["digest"] if item else None,
        was[1] if was else None,
        change.get("source"),
        item["info"] if item else None,
    )
