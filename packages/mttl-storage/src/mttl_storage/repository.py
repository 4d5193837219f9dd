"""A repository: named items of small files, in generations that are never lost or half visible."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from mttl_storage import collecting, intents, materializing, reading, verification
from mttl_storage.batch import Batch
from mttl_storage.collecting import Collected
from mttl_storage.committing import commit
from mttl_storage.errors import NotFound, ReadOnly, StorageError
from mttl_storage.intents import Intent
from mttl_storage.items import Files, Item
from mttl_storage.log import Change, Commit, Log
from mttl_storage.state import State
from mttl_storage.store import Store, filesystem
from mttl_storage.uri import Address
from mttl_storage.verification import Problem

Pages = Callable[["Repository"], Mapping[str, bytes]]


class Repository:
    """One repository as of one generation, which stays the same until ``refresh`` or a commit.

    Open one with ``Repository.open``. An object can be shared between threads, and pickled (then it
    is opened again, with the credentials of the environment).
    """

    def __init__(
        self,
        log: Log,
        state: State,
        read_only: bool = False,
        pinned: bool = False,
        pages: Pages | None = None,
    ) -> None:
        """Users call ``Repository.open``."""
        self._log = log
        self._state = state
        self._pinned = pinned
        self._pages = pages
        self._lock = threading.RLock()
        self.read_only = read_only or pinned

    @classmethod
    def open(
        cls,
        uri: str | PathLike[str] | Address,
        token: object = None,
        create: bool = False,
        read_only: bool = False,
        pages: Pages | None = None,
    ) -> "Repository":
        """The repository at an address, at its newest generation.

        Args:
            uri: as in "local://my/library"; a path without a scheme is local.
            token: a credential for backends that need one; it is never stored or shown.
            create: make the repository if there is none; one that is there is kept.
            read_only: refuse every change.
            pages: makes files for people to go with each change, such as a README, where change and
                pages are one commit (the hub); elsewhere it is not called. It gets a view of the
                generation to come, which has items but not yet their new files, and gives bytes
                by key. If it raises, or the hub refuses them, the change is committed without them,
                and a warning says why. Pickling asks for a function of a module.
        """
        log = Log(filesystem(uri, token))
        try:
            return cls(log, log.newest(), read_only, pages=pages)
        except NotFound:
            if not create or read_only:
                raise
        try:
            log.create()
        except NotADirectoryError:
            raise StorageError(
                f"no repository can be made at {log.store.address!r}: a file is in the way; "
                "choose another folder"
            ) from None
        return cls(log, log.newest(), read_only, pages=pages)

    def __repr__(self) -> str:
        """Address and generation, and no credentials."""
        return f"Repository({self.uri!r}, generation={self.generation})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as an address, never with a credential or content."""
        return _reopen, (self.uri, self.generation, self.read_only, self._pinned, self._pages)

    @property
    def uri(self) -> str:
        """The canonical address, without credentials."""
        return self.store.address

    @property
    def store(self) -> Store:
        """The fsspec filesystem that everything lies in."""
        return self._log.store

    @property
    def generation(self) -> int:
        """The generation that this object reads; 0 for a repository just created."""
        return self._state.generation

    def refresh(self) -> "Repository":
        """Move to the newest generation; returns this object. A view made by ``at`` stays."""
        if not self._pinned:
            with self._lock:
                self._state = self._log.newest(self._state)
        return self

    # Reading.

    def items(self, prefix: str = "") -> dict[str, Item]:
        """The items whose name begins with a prefix, sorted by name."""
        return {name: i for name, i in self._state.items.items() if name.startswith(prefix)}

    def item(self, name: str) -> Item:
        """One item; NotFound names near ones."""
        return self._state.item(name)

    def removed(self, prefix: str = "") -> dict[str, Item]:
        """The removed items that can be restored, with the generation and time of removal."""
        state = self._state
        return {n: state.gone_item(n) for n in sorted(state.gone) if n.startswith(prefix)}

    def __contains__(self, name: object) -> bool:
        """Whether there is an item of that name."""
        return name in self._state.live

    def __len__(self) -> int:
        """How many items there are."""
        return len(self._state.live)

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        return iter(sorted(self._state.live))

    def read(self, item_name: str, file: str) -> bytes:
        """The bytes of a file; Corrupt if they are not those that were added."""
        item = self.item(item_name)
        return reading.read(self.store, self.folder_of(item), item, file)

    def open_file(self, item_name: str, file: str) -> BinaryIO:
        """A file open for reading, verified before."""
        return self.path(item_name, file).open("rb")

    def path(self, item_name: str, file: str | None = None) -> Path:
        """A file, or the item's whole folder, on the local disk; verified, and fit for mmap.

        For ``local://`` it is the stored file itself: do not write to it. For ``virtual://`` it is
        a copy in a temporary folder that ends with this process.
        """
        item = self.item(item_name)
        folder = self.folder_of(item)
        if file is None:
            return reading.local_folder(self.store, folder, item)
        return reading.local_file(self.store, folder, item, file)

    def folder_of(self, item: Item) -> str:
        """The key of the folder in the store that an item's files lie in."""
        return self.store.item_folder(item.home, item.digest)

    # Writing: each is one commit, after which this object reads the generation it made.

    def add(self, name: str, files: Files, info: Mapping[str, Any] | None = None) -> Item:
        """Add an item. Nothing happens if it is there with the same bytes and info.

        Raises:
            Conflict: it is there with others, or the name differs from another's only in case.
        """
        self._commit([intents.add(self.store, name, files, info)], f"add {name}")
        return self.item(name)

    def replace(
        self,
        name: str,
        files: Files,
        info: Mapping[str, Any] | None = None,
        expected: str | None = None,
    ) -> Item:
        """Give an item new files, and new info unless ``info`` is None.

        Args:
            name: of an item that exists.
            files: all its files from now on.
            info: all its info from now on.
            expected: the digest it must have, else Conflict.
        """
        intent = intents.replace(self.store, name, files, info, expected)
        self._commit([intent], f"replace {name}")
        return self.item(name)

    def update_info(self, name: str, info: Mapping[str, Any], expected: str | None = None) -> Item:
        """Give an item new info in place of all it had; its files and digest stay."""
        self._commit([intents.update_info(name, info, expected)], f"update info of {name}")
        return self.item(name)

    def remove(self, name: str) -> None:
        """Remove an item. ``restore`` brings it back until ``gc`` has collected it."""
        self._commit([intents.remove(name)], f"remove {name}")

    def restore(self, name: str) -> Item:
        """Bring back an item that was removed."""
        self._commit([intents.restore(name)], f"restore {name}")
        return self.item(name)

    def rename(self, old: str, new: str) -> Item:
        """Give an item another name. Its files are not moved."""
        self._commit([intents.rename(old, new)], f"rename {old} to {new}")
        return self.item(new)

    @contextmanager
    def batch(self, message: str = "") -> Iterator[Batch]:
        """Collect changes; they are one commit at the end of the block, or none if it raises."""
        self._check_writable()
        base = self._state
        batch = Batch(self.store, message)
        yield batch
        if batch.intents:
            self._commit(batch.intents, batch.message, base)

    def _commit(self, wanted: list[Intent], message: str, base: State | None = None) -> None:
        self._check_writable()
        with self._lock:
            pages = self._pages and self._pages_of
            self._state = commit(self._log, base or self._state, wanted, message, pages)

    def _pages_of(self, state: State) -> Mapping[str, bytes]:
        view = Repository(self._log, state, pinned=True)
        return self._pages(view) if self._pages else {}

    def _check_writable(self) -> None:
        if self._pinned:
            raise ReadOnly(f"{self!r} shows a past generation; change the repository itself")
        if self.read_only:
            raise ReadOnly(f"{self.uri!r} was opened with read_only=True")
        self.store.check_writable()

    # The past, and upkeep.

    def history(self) -> list[Commit]:
        """The commits that led to this generation, oldest first."""
        commits = [entry.commit() for entry, _ in self._log.entries_after(0)]
        return commits[: self.generation]

    def at(self, generation: int) -> "Repository":
        """A read-only view of one generation."""
        return Repository(self._log, self._log.at(generation), pinned=True)

    def diff(self, a: int, b: int) -> list[Change]:
        """What differs in generation ``b`` from generation ``a``, sorted by name."""
        return verification.differences(self._log.at(a), self._log.at(b))

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> list[Problem]:
        """What is wrong, after reading the whole log and every byte of every item."""
        return verification.verify(self.store, progress)

    def gc(self, grace: float = collecting.GRACE) -> Collected:
        """Delete files that nothing has needed for ``grace`` seconds.

        These are the files of items that were removed or replaced, and of commits that never
        happened. Writers in flight and readers of an older generation are safe for that long, so
        pass less only where there are none.
        """
        self._check_writable()
        with self._lock:
            self._state, collected = collecting.collect(self._log, grace)
        return collected

    def materialize(self, dest: str | PathLike[str], names: Iterable[str] | None = None) -> Path:
        """Write items to a plain folder, ``experts/foo`` as ``foo``; right files are kept."""
        chosen = [self.item(n) for n in names] if names is not None else self.items().values()
        placed = ((item, self.folder_of(item)) for item in chosen)
        return materializing.materialize(self.store, placed, Path(dest))


def _reopen(
    uri: str, generation: int, read_only: bool, pinned: bool, pages: Pages | None
) -> Repository:
    repository = Repository.open(uri, read_only=read_only, pages=pages)
    if not pinned and repository.generation == generation:
        return repository
    state = repository._log.at(generation)
    return Repository(repository._log, state, read_only, pinned, pages)
