"""What a loopback hub keeps: repositories of commits over trees of blobs, as git has them.

Everything is in memory. A tree is never changed once made: a commit copies the folders on the way
to what it changes and shares the rest, so that readers need no lock. HTTP is left to ``hub_api``.
"""

import hashlib
import time
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import NamedTuple

MAIN = "main"
KINDS = {"models": "model", "datasets": "dataset"}
"""How the kinds of a repository are called in an address, and by the client."""
_LFS_SUFFIXES = [
    "7z",
    "arrow",
    "bin",
    "bz2",
    "ckpt",
    "ftz",
    "gz",
    "h5",
    "joblib",
    "mlmodel",
    "model",
    "msgpack",
    "npy",
    "npz",
    "onnx",
    "ot",
    "parquet",
    "pb",
    "pickle",
    "pkl",
    "pt",
    "pth",
    "rar",
    "safetensors",
    "tar",
    "tflite",
    "tgz",
    "wasm",
    "xz",
    "zip",
    "zst",
]
GIT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in [*(f"*.{suffix}" for suffix in _LFS_SUFFIXES), "saved_model/**/*", "*tfevents*"]
).encode()
"""The one file of a new repository, as on the real hub: what it lists is stored as LFS objects."""


class Refused(Exception):  # noqa: N818 - an answer, not a failure of the hub
    """The hub's answer to a request that it does not carry out."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        """Take the HTTP status, the text for X-Error-Message and the X-Error-Code."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True, eq=False)
class Blob:
    """One file's content. ``oid`` is git's, of the pointer if the content is an LFS object."""

    content: bytes = field(repr=False)
    oid: str
    sha256: str = ""
    """Set for LFS objects only."""
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        """What the real hub calls this content: the SHA-256 of an LFS object, or git's id."""
        return self.sha256 or self.oid


class Contents:
    """The blobs that any tree still holds, each of them once."""

    def __init__(self) -> None:
        """Start with none."""
        self._blobs: weakref.WeakValueDictionary[str, Blob] = weakref.WeakValueDictionary()

    def regular(self, content: bytes) -> Blob:
        """The blob of a file that git keeps itself."""
        oid = _git_oid("blob", content)
        return self._once(oid, Blob(content, oid))

    def large(self, content: bytes) -> Blob:
        """The blob of a file that git keeps a pointer to."""
        sha256 = hashlib.sha256(content).hexdigest()
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{sha256}")
        pointer = "\n".join([*lines, f"size {len(content)}\n"]).encode()
        blob = Blob(content, _git_oid("blob", pointer), sha256, len(pointer))
        return self._once(sha256, blob)

    def find(self, sha256: str) -> Blob | None:
        """The LFS object of a digest."""
        return self._blobs.get(sha256)

    def _once(self, name: str, blob: Blob) -> Blob:
        return self._blobs.setdefault(name, blob)


class Stamp(NamedTuple):
    """The commit that last changed a file or a folder, as listings show it."""

    oid: str
    title: str
    date: str


class Entry(NamedTuple):
    """A name in a folder: what it holds, and since which commit."""

    node: "Blob | Tree"
    stamp: Stamp


class Tree:
    """A folder."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        """Take the names in it, which must not change afterwards."""
        self.entries = entries

    @cached_property
    def names(self) -> list[str]:
        """The names in it, in order."""
        return sorted(self.entries)

    @cached_property
    def oid(self) -> str:
        """Git's id of the folder."""
        lines = []
        for name in self.names:
            node = self.entries[name].node
            mode = "40000" if isinstance(node, Tree) else "100644"
            lines.append(f"{mode} {name}".encode() + b"\0" + bytes.fromhex(node.oid))
        return _git_oid("tree", b"".join(lines))

    def find(self, path: str) -> Entry | None:
        """What lies at a path below this folder."""
        name, _, rest = path.partition("/")
        entry = self.entries.get(name)
        if not rest or entry is None:
            return entry
        return entry.node.find(rest) if isinstance(entry.node, Tree) else None

    def blob(self, path: str) -> Blob | None:
        """The file at a path below this folder."""
        entry = self.find(path)
        return entry.node if entry and isinstance(entry.node, Blob) else None

    def walk(
        self, *, recursive: bool = True, after: str = "", prefix: str = ""
    ) -> Iterator[tuple[str, Entry]]:
        """Paths below this folder in order, each folder before what is in it.

        Args:
            recursive: Also what is in the folders.
            after: A path of this walk; only what follows it comes, at no cost for what does not.
            prefix: Put in front of every path.
        """
        first, _, rest = after.partition("/")
        for position in range(bisect_left(self.names, first), len(self.names)):
            name = self.names[position]
            entry = self.entries[name]
            entered = bool(after) and name == first
            if not entered:
                yield prefix + name, entry
            if recursive and isinstance(entry.node, Tree):
                within = rest if entered else ""
                yield from entry.node.walk(after=within, prefix=f"{prefix}{name}/")

    def blobs(self, prefix: str = "") -> Iterator[tuple[str, Blob]]:
        """Every file below this folder."""
        for path, entry in self.walk(prefix=prefix):
            if isinstance(entry.node, Blob):
                yield path, entry.node

    def changed(self, changes: Mapping[str, Blob | None], stamp: Stamp, *, at: str = "") -> "Tree":
        """This folder with files put, or removed where None; no folder stays empty.

        Args:
            changes: Files by their paths below this folder.
            stamp: The commit that changes them.
            at: The path of this folder, for messages.

        Raises:
            Refused: a path is to be both a file and a folder.
        """
        below: dict[str, dict[str, Blob | None]] = {}
        for path, blob in changes.items():
            name, slash, rest = path.partition("/")
            inner = below.setdefault(name, {})
            if slash:
                inner[rest] = blob
        entries = dict(self.entries)
        for name, inner in below.items():
            old = entries.pop(name, None)
            file = old if old and isinstance(old.node, Blob) else None
            folder = old if old and isinstance(old.node, Tree) else None
            if name in changes:
                blob = changes[name]
                file = Entry(blob, stamp) if blob else None
            if inner:
                tree = folder.node if folder and isinstance(folder.node, Tree) else Tree({})
                tree = tree.changed(inner, stamp, at=f"{at}{name}/")
                folder = Entry(tree, stamp) if tree.entries else None
            if file and folder:
                raise Refused(400, f"{at + name!r} cannot be both a file and a folder")
            if entry := file or folder:
                entries[name] = entry
        return Tree(entries)


@dataclass(frozen=True, eq=False)
class Commit:
    """One commit."""

    oid: str
    title: str
    description: str
    date: str
    tree: Tree = field(repr=False)
    parent: "Commit | None" = field(repr=False)

    @property
    def stamp(self) -> Stamp:
        """What listings show of it."""
        return Stamp(self.oid, self.title, self.date)

    def line(self) -> Iterator["Commit"]:
        """This commit and those before it, newest first."""
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent


class Repo:
    """One repository: branches and tags over a history."""

    def __init__(self, kind: str, name: str, private: bool, contents: Contents) -> None:
        """Take the kind ("model" or "dataset") and make the initial commit."""
        self.kind = kind
        self.name = name
        self.private = private
        self.created = now()
        self.tags: dict[str, Commit] = {}
        self.objects: dict[str, Blob] = {}
        """The LFS objects uploaded to this repository, by SHA-256."""
        self.history: dict[str, Commit] = {}
        first = {".gitattributes": contents.regular(GIT_ATTRIBUTES)}
        self.branches = {MAIN: self._grown(None, "initial commit", "", first)}

    def revision(self, name: str) -> Commit:
        """The commit that a branch, a tag or a commit id names."""
        short = name.removeprefix("refs/heads/").removeprefix("refs/tags/")
        commit = self.branches.get(short) or self.tags.get(short) or self.history.get(name)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return commit

    def branch(self, name: str) -> Commit:
        """The head of a branch."""
        if name not in self.branches:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return self.branches[name]

    def commit(
        self, branch: str, title: str, description: str, changes: Mapping[str, Blob | None]
    ) -> Commit:
        """Put a commit on a branch, or give its head back if nothing would change."""
        head = self.branch(branch)
        changes = {path: blob for path, blob in changes.items() if head.tree.blob(path) is not blob}
        if changes:
            self.branches[branch] = self._grown(head, title, description, changes)
        return self.branches[branch]

    def squash(self, branch: str, title: str) -> None:
        """Make a branch one commit with what it holds now."""
        files = dict(self.branch(branch).tree.blobs())
        self.branches[branch] = self._grown(None, title, "", files)

    def _grown(
        self,
        parent: Commit | None,
        title: str,
        description: str,
        changes: Mapping[str, Blob | None],
    ) -> Commit:
        date = now()
        text = f"{parent.oid if parent else ''}\n{time.time_ns()}\n{len(self.history)}\n{title}"
        oid = _git_oid("commit", text.encode())
        before = parent.tree if parent else Tree({})
        tree = before.changed(changes, Stamp(oid, title, date))
        self.history[oid] = commit = Commit(oid, title, description, date, tree, parent)
        return commit


def now() -> str:
    """The time in the form that the client reads."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _git_oid(kind: str, content: bytes) -> str:
    header = f"{kind} {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
