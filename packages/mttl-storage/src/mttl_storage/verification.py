"""Proof that a repository is whole, and what differs between two of its generations."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from mttl_storage.errors import StorageError
from mttl_storage.items import Item, content_digest, decode_line
from mttl_storage.log import HEAD, LOG, Change, Log, entry_key, snapshot_key
from mttl_storage.materializing import shown
from mttl_storage.names import fold
from mttl_storage.state import State
from mttl_storage.store.base import Store
from mttl_storage.store.transfer import in_parallel

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        where: the address of the file or the name of the item.
        what: what is wrong with it, and what to do.
    """

    where: str
    what: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.where}: {self.what}"


def verify(store: Store, progress: Progress | None = None) -> list[Problem]:
    """Everything that is wrong with the repository in a store; NotFound if there is none.

    Args:
        store: as ``mttl_storage.filesystem`` gives it.
        progress: called with files done, files in all, and a name.
    """
    log, problems = Log(store), list[Problem]()
    try:
        newest = _verify_log(log, problems)
    except FileNotFoundError:
        raise
    except StorageError as error:
        return [Problem(store.address, str(error))]
    items = _decoded(newest, problems)
    _verify_files(store, items, problems, progress)
    if store.shown_folder:
        problems += _wrongly_shown(log, newest, items)
    return sorted(problems, key=str)


def _verify_log(log: Log, problems: list[Problem]) -> State:
    """The newest state, replayed from the first entry and compared with every snapshot."""
    state = log.origin()
    snapshots = set(log.snapshots())
    try:
        for entry, digest in log.entries_after(0):
            state = log.replay(state, [(entry, digest)])
            if state.generation in snapshots:
                _verify_snapshot(log, state, problems)
    except StorageError as error:
        problems.append(Problem(log.store.address_of(LOG), str(error)))
        state = _best_state(log, state)
    _verify_listing(log, state, snapshots, problems)
    return state


def _best_state(log: Log, state: State) -> State:
    try:
        newest = log.newest()
    except StorageError:
        return state
    return newest if newest.generation > state.generation else state


def _verify_snapshot(log: Log, state: State, problems: list[Problem]) -> None:
    where = log.store.address_of(snapshot_key(state.generation))
    try:
        if log.snapshot(state.generation) != state:
            problems.append(Problem(where, "the snapshot differs from the log; delete it"))
    except StorageError as error:
        problems.append(Problem(where, f"{error} (or delete it: it only saves time)"))


def _verify_listing(log: Log, state: State, snapshots: set[int], problems: list[Problem]) -> None:
    expected = {entry_key(number) for number in range(1, state.generation + 1)}
    for entry in log.store.scan(LOG):
        if entry.key not in expected:
            # Written while we read, or after a gap.
            if entry.key == entry_key(state.generation + 1):
                continue
            problems.append(
                Problem(log.store.address_of(entry.key), "lies beyond a gap in the log")
            )
    for number in snapshots:
        if number > state.generation:
            where = log.store.address_of(snapshot_key(number))
            problems.append(Problem(where, "is a snapshot of a generation the log does not have"))
    try:
        head = log.head()
        if head and head not in log.snapshots():
            problems.append(Problem(log.store.address_of(HEAD), "names a snapshot that is missing"))
    except StorageError as error:
        problems.append(Problem(log.store.address_of(HEAD), f"{error} (or delete it)"))


def _decoded(state: State, problems: list[Problem]) -> list[Item]:
    items: list[Item] = []
    seen: dict[str, str] = {}
    for name in state.live:
        if seen.setdefault(fold(name), name) != name:
            what = f"it and {seen[fold(name)]!r} are the same where case is ignored; rename one"
            problems.append(Problem(name, what))
    for name, line in [*state.live.items(), *state.gone.items()]:
        try:
            item = decode_line(line)
            if content_digest(item.files) != item.digest:
                problems.append(Problem(name, "its digest is not that of its files"))
            items.append(item)
        except StorageError as error:
            problems.append(Problem(name, str(error)))
    return items


def _verify_files(
    store: Store, items: list[Item], problems: list[Problem], progress: Progress | None
) -> None:
    files = {}
    for item in items:
        for file, entry in item.files.items():
            files[f"{store.item_folder(item.home, item.digest)}/{file}"] = (item.name, entry)
    lock, done = threading.Lock(), [0]

    def check(key: str) -> None:
        name, entry = files[key]
        try:
            store.check(key, *entry)
            found = None
        except (StorageError, OSError) as error:
            found = Problem(name, str(error))
        with lock:
            done[0] += 1
            if found:
                problems.append(found)
            if progress:
                progress(done[0], len(files), name)

    in_parallel(check, files)


def _wrongly_shown(log: Log, state: State, items: list[Item]) -> list[Problem]:
    """What people see by an item's name and is not its file, as someone else's commit can make."""
    store, problems = log.store, []
    versions = {entry.key: entry.version for entry in store.scan()}
    for item in items:
        for path, key in shown(store, item) if item.name in state.live else ():
            if versions.get(path) != versions.get(key):
                what = f"is not the file of {item.name!r}; remove and restore that item"
                problems.append(Problem(store.address_of(path), what))
    # If there was a commit meanwhile, then what was listed is not of this state.
    return problems if problems and log.entry(state.generation + 1) is None else []


def differences(a: State, b: State) -> list[Change]:
    """The changes that lead from one state to another, sorted by name."""
    found = []
    for name in sorted(a.live.keys() | b.live.keys()):
        if a.live.get(name) == b.live.get(name):
            continue
        old = a.item(name) if name in a.live else None
        new = b.item(name) if name in b.live else None
        if old is None or new is None:
            kind = "add" if old is None else "remove"
        elif old.digest != new.digest:
            kind = "replace"
        elif old.info != new.info:
            kind = "info"
        else:
            continue
        digest, previous = new.digest if new else None, old.digest if old else None
        found.append(Change(kind, name, digest, previous, info=new.info if new else None))
    return found
