"""A folder of files to import from, wherever it lies: on this machine, in a store, on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mttl_storage import Corrupt, InvalidName, NotFound, StorageError, filesystem, parse_uri
from mttl_storage.names import PRIVATE

_HUB_ID = re.compile(
    r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]+?))?/?(?:@(?P<revision>.+))?"
)


@dataclass(frozen=True)
class Folder:
    """Files to read, by path.

    Attributes:
        address: where it is, for people; no credentials in it.
        name: what to call what is in it: its last part.
        sizes: bytes of each file, by its path from here.
        distant: whether the address means something to other people.
        library: whether it holds a library of this package.
    """

    address: str
    name: str
    sizes: Mapping[str, int]
    fetch: Callable[[str], bytes]
    distant: bool = False
    library: bool = False

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of a file.

        Raises:
            Corrupt: when it has more bytes than ``limit``, or other bytes than were listed.
        """
        if path not in self.sizes:
            raise NotFound(f"there is no {path!r} in {self.address}")
        if self.sizes[path] > limit:
            raise Corrupt(
                f"{path!r} in {self.address} has {self.sizes[path]} bytes, which is more than such "
                f"a file can have ({limit})"
            )
        content = self.fetch(path)
        if len(content) != self.sizes[path]:
            raise Corrupt(
                f"{path!r} in {self.address} has {len(content)} bytes where {self.sizes[path]} "
                "were listed; it was changed meanwhile, or the download is damaged"
            )
        return content


def open_folder(source: str, token: str | None = None) -> Folder:
    """The folder that a source names.

    Args:
        source: a folder of this machine, an address of any backend, or a hub id, where
            ``user/repo/subfolder@revision`` may name a part and a commit.
        token: credentials of the storage, where it needs any.

    Raises:
        NotFound: when nothing is there.
    """
    if "://" not in source and Path(source).expanduser().exists():
        return _local(Path(source).expanduser().absolute())
    if source.startswith("local://"):
        return _local(Path(parse_uri(source).path))
    if "://" in source and not source.startswith("hf://"):
        return _stored(source, token)
    match = _HUB_ID.fullmatch(source)
    if match is None or source.startswith((".", "/", "~", "hf://datasets/")):
        raise NotFound(
            f"there is no folder {source!r}, and it is no hub id either (user/repo, "
            "user/repo/subfolder or user/repo@revision); check the address"
        )
    repo, folder = match["repo"], (match["folder"] or "").strip("/")
    if match["revision"]:
        found = _at_revision(repo, match["revision"], token)
    else:
        found = _stored(f"hf://{repo}", token)
    return _below(found, folder) if folder else found


def _local(root: Path) -> Folder:
    """A folder of this machine; files behind links count, as in the hub's own cache."""
    if not root.is_dir():
        raise NotFound(f"there is no folder {str(root)!r}; check the address")
    files = [path for path in root.rglob("*") if path.is_file()]
    if not files:
        raise NotFound(f"there are no files in {str(root)!r}; check the address")
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
    return _folder(
        f"local://{root}", root.name, sizes, lambda path: (root / path).read_bytes(), False
    )


def _stored(address: str, token: str | None) -> Folder:
    where = parse_uri(address)
    store = filesystem(where, token)
    sizes = {entry.key: entry.size for entry in store.scan("")}
    if not sizes:
        raise NotFound(f"there are no files at {where}; check the address{store.missing_hint}")
    name = where.path.rpartition("/")[2]
    return _folder(str(where), name, sizes, store.cat_file, distant=where.scheme != "virtual")


def _at_revision(repo: str, revision: str, token: str | None) -> Folder:
    """A hub repository at a branch, tag or commit; each file is verified where the hub says how."""
    from mttl_storage.store.hub_client import connect

    from huggingface_hub.errors import HfHubHTTPError  # isort: skip  # after hub_client
    from huggingface_hub.hf_api import RepoFile  # isort: skip

    api, _ = connect(token)
    address = f"hf://{repo}@{revision}"
    try:
        commit = api.repo_info(repo, revision=revision).sha
        tree = api.list_repo_tree(repo, recursive=True, revision=commit)
        files: dict[str, Any] = {each.path: each for each in tree if isinstance(each, RepoFile)}
    except HfHubHTTPError as error:
        raise NotFound(f"cannot read {address}: {_first_line(error)}; check the address") from error

    def fetch(path: str) -> bytes:
        try:
            local = api.hf_hub_download(repo, path, revision=commit)
        except HfHubHTTPError as error:
            raise StorageError(
                f"cannot read {path!r} of {address}: {_first_line(error)}"
            ) from error
        content = Path(local).read_bytes()
        lfs = files[path].lfs
        if lfs is not None and hashlib.sha256(content).hexdigest() != lfs.sha256:
            raise Corrupt(
                f"{local!r} is not what the hub has as {path!r} of {address}; delete it and try "
                "again"
            )
        return content

    sizes = {path: each.size for path, each in files.items()}
    return _folder(address, repo.rpartition("/")[2], sizes, fetch, distant=True)


def _folder(
    address: str, name: str, sizes: Mapping[str, int], fetch: Callable[[str], bytes], distant: bool
) -> Folder:
    shown = {path: size for path, size in sizes.items() if not _is_hidden(path)}
    library = any(path.startswith(f"{PRIVATE}/") for path in sizes)
    return Folder(address, name, dict(sorted(shown.items())), fetch, distant, library)


def _below(whole: Folder, folder: str) -> Folder:
    prefix = f"{folder}/"
    if ".." in folder.split("/"):
        raise InvalidName(f"the folder {folder!r} of {whole.address} has a '..' in it")
    sizes = {p.removeprefix(prefix): n for p, n in whole.sizes.items() if p.startswith(prefix)}
    repo, at, revision = whole.address.partition("@")
    address = f"{repo}/{folder}{at}{revision}"
    if not sizes:
        raise NotFound(f"there are no files at {address}; check the address")
    return Folder(
        address,
        folder.rpartition("/")[2],
        sizes,
        lambda path: whole.fetch(prefix + path),
        whole.distant,
    )


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
