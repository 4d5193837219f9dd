"""What one generation of a repository holds, and how a log entry turns it into the next."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mttl_storage.errors import Conflict, Corrupt, NotFound
from mttl_storage.items import (
    Item,
    check_digest,
    check_record,
    check_time,
    decode_line,
    decode_lines,
    encode_line,
    name_of_line,
)
from mttl_storage.names import ancestors, check_name, fold
from mttl_storage.sealed import FORMAT, parse, to_json

KINDS = ("add", "replace", "info", "rename", "remove", "restore", "forget")


@dataclass
class State:
    """One generation. It is never changed once a repository reads it; ``successor`` copies it.

    Args:
        generation: 0 for a repository just created.
        chain: SHA-256 of the log entry that made it, which the next entry must name.
        time: of that entry.
        live: the record of each item, as a line of JSON, by name.
        gone: likewise of items that were removed and can be restored.
    """

    generation: int
    chain: str
    time: str = ""
    live: dict[str, bytes] = field(default_factory=dict)
    gone: dict[str, bytes] = field(default_factory=dict)
    # Live names by what they are where case is ignored, and how many lie in each folder.
    _folded: dict[str, str] | None = field(default=None, compare=False, repr=False)
    _folders: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def successor(self, chain: str, time: str) -> "State":
        """A copy that is the next generation, to apply changes to."""
        folded = None if self._folded is None else dict(self._folded)
        return State(
            self.generation + 1,
            chain,
            max(time, self.time),
            dict(self.live),
            dict(self.gone),
            folded,
            dict(self._folders),
        )

    @cached_property
    def items(self) -> dict[str, Item]:
        """All live items, sorted by name."""
        names = sorted(self.live)
        return dict(zip(names, decode_lines([self.live[name] for name in names]), strict=True))

    def item(self, name: str) -> Item:
        """One live item; NotFound names near ones."""
        if name in self.live:
            return decode_line(self.live[name])
        raise NotFound(f"there is no item {name!r} ({len(self.live)} items); {self._hint(name)}")

    def gone_item(self, name: str) -> Item:
        """One item that was removed and can be restored."""
        if name in self.gone:
            return decode_line(self.gone[name])
        raise NotFound(f"no item {name!r} was removed, or gc has collected it since")

    def _hint(self, name: str) -> str:
        if name in self.gone:
            return "it was removed, and can be restored"
        near = difflib.get_close_matches(name, self.live, n=1)
        if near:
            return f"did you mean {near[0]!r}?"
        first = ", ".join(map(repr, sorted(self.live)[:3]))
        return f"it has {first} ..." if first else "it is empty"

    def check_free(self, name: str) -> None:
        """Conflict if the name cannot be told from another's, or lies inside or around one."""
        folded = fold(name)
        other = self._names().get(folded)
        if other is not None:
            raise Conflict(f"{name!r} and the item {other!r} are the same where case is ignored")
        for folder in ancestors(folded):
            if folder in self._names():
                raise Conflict(f"{name!r} would lie inside the item {self._names()[folder]!r}")
        if folded in self._folders:
            raise Conflict(f"{name!r} is a folder that holds other items; choose another name")

    def _names(self) -> dict[str, str]:
        if self._folded is None:
            # Threads may do this at once, so nothing half made is seen.
            folded, folders = dict[str, str](), dict[str, int]()
            for name in self.live:
                _enter(name, folded, folders)
            self._folders, self._folded = folders, folded
        return self._folded

    def _leave(self, name: str) -> None:
        if self._folded is not None:
            self._folded.pop(fold(name), None)  # a log from elsewhere may have two alike
            for folder in ancestors(fold(name)):
                self._folders[folder] -= 1
                if not self._folders[folder]:
                    del self._folders[folder]

    def apply(self, change: Mapping[str, Any]) -> None:
        """Make one change of a log entry; only before anyone reads this state."""
        kind, name = change["kind"], change["name"]
        if kind not in KINDS:
            raise ValueError(f"unknown kind of change {kind!r}")
        stamp = {"generation": self.generation, "time": self.time}
        if kind == "forget":
            del self.gone[name]
        elif kind == "remove":
            # The record stays as it was, with the time that gc counts from.
            record = {**change["item"], **stamp}
            self.gone[name] = encode_line(name, record)
            self._drop(name)
        else:
            if kind == "rename":
                self._drop(change["source"])
            if kind in ("add", "restore", "rename"):
                self.gone.pop(name, None)
            if name not in self.live and self._folded is not None:
                _enter(name, self._folded, self._folders)
            self.live[name] = encode_line(name, {**change["item"], **stamp})

    def _drop(self, name: str) -> None:
        del self.live[name]
        self._leave(name)

    def to_bytes(self) -> bytes:
        """The body of a snapshot."""
        header = {
            "format": FORMAT,
            "generation": self.generation,
            "chain": self.chain,
            "time": self.time,
            "live": len(self.live),
        }
        lines = [to_json(header)]
        lines += [self.live[name] for name in sorted(self.live)]
        lines += [self.gone[name] for name in sorted(self.gone)]
        return b"\n".join(lines) + b"\n"

    @classmethod
    def from_bytes(cls, body: bytes, where: str) -> "State":
        """The state in the body of a snapshot, or Corrupt."""
        first, *lines = body.splitlines() or [b""]
        header = parse(first, where)
        try:
            count, generation = header["live"], header["generation"]
            if not (type(count) is type(generation) is int and 0 <= count <= len(lines)):
                raise ValueError(f"{count!r} live items in generation {generation!r}")
            return cls(
                generation,
                check_digest(header["chain"]),
                check_time(header["time"]),
                _by_name(lines[:count]),
                _by_name(lines[count:]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{where!r} is not a snapshot: {error!r:.200}") from None


def check_change(change: Mapping[str, Any]) -> None:
    """Raise ValueError, or TypeError and the like, for a change that no version has written."""
    kind, name = change["kind"], change["name"]
    if kind not in KINDS:
        raise ValueError(f"unknown kind of change {kind!r:.80}")
    if kind == "forget":
        check_name(name)
    else:
        check_record(name, change["item"])
    if kind == "rename":
        check_name(change["source"])
    if "was" in change:
        home, digest = change["was"]
        check_name(home)
        check_digest(digest)


def _enter(name: str, folded: dict[str, str], folders: dict[str, int]) -> None:
    folded[fold(name)] = name
    for folder in ancestors(fold(name)):
        folders[folder] = folders.get(folder, 0) + 1


def _by_name(lines: Iterable[bytes]) -> dict[str, bytes]:
    return {name_of_line(line): line for line in lines}
