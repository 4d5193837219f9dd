"""Files as they lie, which no repository keeps, shown as the items of one that is only read."""

import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from mttl_storage.errors import Corrupt, NotFound, ReadOnly
from mttl_storage.items import FileEntry, Item, content_digest, encode_line
from mttl_storage.log import Commit, Log
from mttl_storage.repository import Repository
from mttl_storage.state import State
from mttl_storage.store import Store, filesystem
from mttl_storage.uri import Address
from mttl_storage.verification import Problem


@dataclass(frozen=True)
class PlainItem:
    """Files of one folder, to be shown as an item.

    Args:
        name: of the item, as in "experts/arithmetic".
        folder: key of the folder; empty for the root.
        files: size and SHA-256 of each file shown, by its name in the folder.
        info: a small JSON object.
        time: when they were last written, in seconds since 1970.
    """

    name: str
    folder: str
    files: Mapping[str, FileEntry]
    info: Mapping[str, Any]
    time: float


Look = Callable[[Store], Iterable[PlainItem]]


class PlainRepository(Repository):
    """Items that lie in a store without a log: one generation, no history, nothing to be changed.

    Nothing is written there. ``refresh`` looks again; until then a file that was changed since is
    Corrupt.
    """

    def __init__(
        self, address: Address, look: Look, token: object = None, what: str = "files"
    ) -> None:
        """Look at an address.

        Args:
            address: of any backend.
            look: finds what is to be shown, with names that differ; NotFound if there is nothing.
                Pickling asks for a function of a module.
            token: a credential for backends that need one.
            what: lies there, for messages.
        """
        self._look, self._what, self._address = look, what, address
        store = filesystem(address, token)
        self._folders: dict[str, str] = {}
        super().__init__(Log(store), self._seen(store), read_only=True)

    def _seen(self, store: Store) -> State:
        found = sorted(self._look(store), key=lambda item: item.name)
        self._folders = {item.name: item.folder.strip("/") for item in found}
        return State(0, "", live={item.name: _line(item) for item in found})

    def refresh(self) -> Repository:
        """Look again."""
        with self._lock:
            self._state = self._seen(self.store)
        return self

    def read(self, item_name: str, file: str) -> bytes:
        """The bytes of a file; Corrupt if it was changed since it was looked at."""
        with self._unchanged(repr(item_name)):
            return super().read(item_name, file)

    def path(self, item_name: str, file: str | None = None) -> Path:
        """A verified file, or the folder, on the local disk: the very one, if it lies there."""
        with self._unchanged(repr(item_name)):
            return super().path(item_name, file)

    def materialize(self, dest: str | PathLike[str], names: Iterable[str] | None = None) -> Path:
        """Write items to a plain folder, ``experts/foo`` as ``foo``; right files are kept."""
        with self._unchanged("a file"):
            return super().materialize(dest, names)

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> list[Problem]:
        """What was changed since it was looked at."""
        problems = []
        for done, (name, item) in enumerate(self.items().items(), 1):
            for file in item.files:
                try:
                    self.read(name, file)
                except (Corrupt, NotFound) as error:
                    problems.append(Problem(name, str(error)))
            if progress is not None:
                progress(done, len(self), name)
        return problems

    def history(self) -> list[Commit]:
        """There is none."""
        return []

    def at(self, generation: int) -> Repository:
        """There is but what lies there now."""
        raise NotFound(
            f"{self.uri} holds plain {self._what}, which have no generations; were they changed? "
            "open it again"
        )

    def folder_of(self, item: Item) -> str:
        """The key of the folder in the store that an item's files lie in."""
        return self._folders[item.name]

    @contextlib.contextmanager
    def _unchanged(self, what: str) -> Iterator[None]:
        try:
            yield
        except Corrupt as error:
            raise Corrupt(
                f"{what} in {self.uri} was changed since it was looked at; open it again"
            ) from error

    def _check_writable(self) -> NoReturn:
        raise ReadOnly(
            f"{self.uri} holds plain {self._what}, which are only read, as they lie; copy them "
            "elsewhere to change anything"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as an address, never with a credential."""
        return PlainRepository, (self._address, self._look, None, self._what)


def _line(item: PlainItem) -> bytes:
    return encode_line(
        item.name,
        {
            "digest": content_digest(item.files),
            "files": {file: list(entry) for file, entry in item.files.items()},
            "info": item.info,
            "generation": 0,
            "time": datetime.datetime.fromtimestamp(item.time, datetime.UTC).isoformat(),
        },
    )
