"""``hf://user/repo`` and ``hf://datasets/user/repo``: repositories on the Hugging Face Hub.

Everything of a commit, its log entry and what people see of it make one commit of the hub, which
succeeds only if the repository is as it was when we looked. Items lie under ``.mttl/items``; those
whose name begins with ``experts/`` (``datasets/`` in a dataset repository) are shown at the root
as well, where PEFT and others look. Both are one object in the hub's storage.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, cast

from mttl_storage.errors import NotFound
from mttl_storage.names import PRIVATE
from mttl_storage.retrying import Failure
from mttl_storage.store.base import Entry, Staging
from mttl_storage.store.hub_client import quiet
from mttl_storage.store.hub_pages import Pages
from mttl_storage.store.hub_reading import Head, HubFiles, blob_of
from mttl_storage.store.remote import ANY, upload_of
from mttl_storage.store.transfer import Stored, Upload, in_parallel, verified

from huggingface_hub import (  # isort: skip  # after hub_client, which says how to install it
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
)
from huggingface_hub.lfs import UploadInfo  # isort: skip

_SAMPLE = 512
_PATHS_AT_ONCE = 500
"""How many paths to ask for in one request; the hub takes no more than 1,000."""
_SMALL = 1 << 20
"""Bytes up to which a file is held in memory while it is committed."""


@dataclasses.dataclass
class _Staging(Staging):
    """With the folder that keeps those that came from elsewhere.

    Those of ``large`` are with the hub already, outside of git.
    """

    folder: tempfile.TemporaryDirectory[str] | None = None
    large: set[str] = dataclasses.field(default_factory=set)


class HubStore(HubFiles):
    """Files of the main branch of one repository."""

    protocol = "hf"
    scheme = "hf"
    items_folder = f"{PRIVATE}/items"
    missing_hint = "; a private repository needs a token that may see it"
    kept_by_history = (
        "the git history of the hub still holds the bytes; HfApi.super_squash_history lets go of "
        "them"
    )

    def __init__(self, root: str, **kwargs: Any) -> None:
        """A store for ``user/repo`` or ``datasets/user/repo``; nothing is contacted yet."""
        super().__init__(root=root, **kwargs)
        self.shown_folder = "datasets/" if self._kind == "dataset" else "experts/"

    def prepare(self) -> None:
        """Make the repository on the hub, if there is none; the owner's defaults hold for it."""
        self._ask("create", "", lambda: self._api.create_repo(**self._where, exist_ok=True))

    # Writing: every change is one commit on top of the one that was looked at.

    def stage(self, makers: Sequence[Callable[[], Mapping[str, Upload]]]) -> Staging:
        """Upload what the hub keeps outside of git; nothing is visible before ``publish``."""
        staging = _Staging()
        in_parallel(lambda make: staging.files.update(make()), makers)
        elsewhere = {k: u for k, u in staging.files.items() if isinstance(u.source, Stored)}
        if elsewhere:
            staging.folder = tempfile.TemporaryDirectory(prefix="mttl-hub-")
            places = {key: Path(staging.folder.name, str(n)) for n, key in enumerate(elsewhere)}

            def bring(key: str) -> None:
                with places[key].open("wb") as file:
                    file.writelines(verified(elsewhere[key]))
                staging.files[key] = elsewhere[key]._replace(source=places[key])

            in_parallel(bring, elsewhere)
        if staging.files:
            additions = self._additions(staging.files)
            self._ask("upload to", "", lambda: self._preupload(additions))
            staging.large = {a.path_in_repo for a in additions if a._upload_mode == "lfs"}
        return staging

    def _preupload(self, additions: list[CommitOperationAdd]) -> None:
        with quiet():
            self._api.preupload_lfs_files(
                additions=additions, free_memory=False, gitignore_content="", **self._where
            )

    def publish(
        self,
        key: str,
        data: bytes,
        staging: Staging | None = None,
        beside: Mapping[str, bytes] | None = None,
        shown: Mapping[str, str | None] | None = None,
        message: str = "",
        pages: Callable[[], Mapping[str, bytes]] | None = None,
    ) -> bool:
        """Make one hub commit of the staged files, the log entry and what goes with it."""
        files = dict(staging.files) if staging else {}
        large = staging.large if isinstance(staging, _Staging) else set()
        small = {path: upload_of(content) for path, content in (beside or {}).items()}
        entry = upload_of(data)
        lost: list[Failure] = []
        extra = Pages(pages)
        # Operations remember what the repository had, and what of them was done in an earlier try.
        operations: dict[str, list[Any]] = {}

        def attempt() -> bool:
            head = self._look(key)
            if head.entry is not None:
                return False
            if head.commit not in operations:
                view = self._view(shown or {}, files, large, head.commit)
                added = {**files, **small, key: entry, **extra.files()}
                operations[head.commit] = [*self._additions(added, large), *view]
            try:
                self._commit(operations[head.commit], head, message)
            except Exception as error:
                if not extra.given_up(error, self._failure(error, "commit to", "")):
                    raise
                del operations[head.commit]
                return attempt()
            return True

        published = self._ask("commit to", "", attempt, lost.append)
        if not published:
            published = any(f.unknown for f in lost) and self.cat_file(key) == data
        if published:
            extra.warn(self.address)
        return published

    def _view(
        self,
        shown: Mapping[str, str | None],
        files: Mapping[Any, Upload],
        large: Set[str | None],
        commit: str,
    ) -> list[Any]:
        """The operations that show items by their names."""
        view: list[Any] = []
        for path, key in shown.items():
            if key in files:
                view.append(_addition(path, files[key], key in large))
            elif key is not None:
                view.append(CommitOperationCopy(key, path, src_revision=commit))
        dropped = [path for path, key in shown.items() if key is None]
        return view + self._deletions(dropped, commit)

    def _deletions(self, paths: list[str], commit: str) -> list[CommitOperationDelete]:
        """Operations for the paths that are there; the hub refuses to delete others."""
        there = []
        for first in range(0, len(paths), _PATHS_AT_ONCE):
            some = paths[first : first + _PATHS_AT_ONCE]
            there += self._api.get_paths_info(paths=some, revision=commit, **self._where)
        return [CommitOperationDelete(found.path, is_folder=False) for found in there]

    def _additions(
        self, files: Mapping[str, Upload], large: Set[str | None] = frozenset()
    ) -> list[CommitOperationAdd]:
        """Fresh operations, to be used on one commit of the repository."""
        return [_addition(path, upload, path in large) for path, upload in files.items()]

    def _commit(self, operations: list[Any], head: Head, message: str) -> str:
        additions = [each for each in operations if isinstance(each, CommitOperationAdd)]
        self._preupload(additions)
        with quiet():
            done = self._api.create_commit(
                operations=operations,
                commit_message=message or "Update",
                parent_commit=head.commit,
                **self._where,
            )
        commit: str = done.oid
        return commit

    def _write(self, key: str, upload: Upload, expected: str | None) -> str | None:
        head = self._look(key)
        found = head.entry.version if head.entry else None
        if expected != ANY and blob_of(found) != blob_of(expected):
            return None
        self._commit(self._additions({key: upload}), head, f"Write {key}")
        return self._find(key).version

    def pipe(self, path: Any, value: bytes | None = None, **kwargs: Any) -> None:
        """Write a file, or several of a dict by one commit."""
        if isinstance(path, str) or kwargs:
            super().pipe(path, value, **kwargs)
            return
        files = {self._strip_protocol(each): upload_of(bytes(data)) for each, data in path.items()}

        def write() -> None:
            head = Head(self._newest_commit(), None)
            self._commit(self._additions(files), head, f"Write {len(files)} files")

        if files:
            self._ask("write in", "", write)

    def _delete(self, keys: list[str]) -> None:
        def delete() -> None:
            commit = self._newest_commit()
            operations = self._deletions(keys, commit)
            if keys and not operations:
                raise NotFound(f"{self.address_of(keys[0])!r} does not exist")
            self._commit(operations, Head(commit, None), f"Delete {len(keys)} files")

        if keys:
            self._ask("delete", keys[0], delete)

    def renew(self, key: str) -> Entry | None:
        """The file, or None; a commit brings all its files again, so nothing has to be kept."""
        return self._entry_or_none(self._strip_protocol(key))

    def delete_if_unchanged(self, key: str, version: str) -> bool:
        """Delete a file unless anything was committed since; whether it was deleted."""
        return bool(self.delete_unchanged([Entry(key, 0, 0.0, version)]))

    def delete_unchanged(self, entries: Sequence[Entry]) -> list[Entry]:
        """Delete files by one commit, or none of them if anything was committed since."""
        if not entries:
            return []
        commit = entries[0].version.rpartition("@")[2]
        operations = [CommitOperationDelete(entry.key, is_folder=False) for entry in entries]
        first = entries[0].key

        def delete() -> bool:
            head = self._look(first)
            if head.commit != commit:
                return False
            self._commit(operations, head, f"gc: delete {len(operations)} files")
            return True

        lost: list[Failure] = []
        deleted = self._ask("delete in", "", delete, lost.append)
        gone = deleted or (bool(lost) and self._entry_or_none(first) is None)
        return list(entries) if gone else []


def _addition(path: str, upload: Upload, is_there: bool = False) -> CommitOperationAdd:
    """The operation for a file whose digest is known, so that the client need not find it.

    Args:
        path: where to show it.
        upload: the file.
        is_there: whether the hub has its bytes already, so that the client need not ask.
    """
    source = upload.source
    if upload.size <= _SMALL:
        source = b"".join(verified(upload))
    operation = CommitOperationAdd(path, b"")
    operation.path_or_fileobj = source if isinstance(source, bytes) else str(source)
    operation.upload_info = UploadInfo(upload.size, _sample(source), bytes.fromhex(upload.sha256))
    if is_there:
        operation._upload_mode, operation._is_uploaded = "lfs", True
    return operation


def _sample(source: Any) -> bytes:
    """The first bytes, by which the hub tells text from binary."""
    if isinstance(source, bytes):
        return source[:_SAMPLE]
    with source.open("rb") as file:
        return cast(bytes, file.read(_SAMPLE))
