"""Reading a repository of the Hugging Face Hub: files of its main branch, and the newest commit."""

import datetime
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from mttl_storage.errors import Conflict, NotFound, StorageError
from mttl_storage.retrying import Failure
from mttl_storage.store.base import Entry
from mttl_storage.store.hub_client import connect, failure_of, waiting_longer_each_time
from mttl_storage.store.remote import Body, RemoteStore
from mttl_storage.store.transfer import CHUNK
from mttl_storage.uri import hub_parts

from huggingface_hub import HfApi, get_session, hf_hub_url  # isort: skip  # after hub_client
from huggingface_hub.hf_api import RepoFile  # isort: skip
from huggingface_hub.utils._headers import build_hf_headers  # isort: skip
from huggingface_hub.utils._http import hf_raise_for_status  # isort: skip

BRANCH = "main"
_REDIRECTS = 5

_Answer = TypeVar("_Answer")


class Head(NamedTuple):
    """The newest commit of the hub, and one file as it has it."""

    commit: str
    entry: Entry | None


class HubFiles(RemoteStore):
    """The reading half of ``HubStore``."""

    def __init__(self, root: str, **kwargs: Any) -> None:
        """Files of ``user/repo`` or ``datasets/user/repo``; nothing is contacted yet."""
        self._kind, self._repo = hub_parts(root)
        super().__init__(root=root, **kwargs)

    @cached_property
    def _connection(self) -> tuple[HfApi, str]:
        return connect(self._token)

    @property
    def _api(self) -> HfApi:
        return self._connection[0]

    @property
    def _where(self) -> dict[str, Any]:
        return {"repo_id": self._repo, "repo_type": self._kind}

    def _request(self, method: str, key: str, **headers: str) -> Any:
        url = hf_hub_url(
            self._repo, key, repo_type=self._kind, revision=BRANCH, endpoint=self._api.endpoint
        )
        session, api = get_session(), self._api
        credentials = build_hf_headers(token=api.token, library_name=api.library_name)
        request = session.build_request(
            method,
            url,
            headers={**credentials, "Accept-Encoding": "identity", **headers},
        )
        return session.send(request, stream=True, follow_redirects=method == "GET")

    def _look(self, key: str) -> Head:
        """The newest commit and the file in it, by one request."""
        response = self._request("HEAD", key)
        response.close()
        # A file outside of git is a redirect to it, which says what it is. Others mean that the
        # repository has a new name.
        for _ in range(_REDIRECTS):
            if "X-Linked-Etag" in response.headers or response.next_request is None:
                break
            response = get_session().send(response.next_request, stream=True)
            response.close()
        headers, commit = response.headers, response.headers.get("X-Repo-Commit")
        missing = headers.get("X-Error-Code") == "EntryNotFound"
        if not missing and "X-Linked-Etag" not in headers:
            hf_raise_for_status(response)
        if commit is None:
            raise StorageError(f"the hub does not say which commit of {self.address!r} it shows")
        if missing:
            return Head(commit, None)
        etag = headers.get("X-Linked-Etag") or headers.get("ETag", "")
        size = int(headers.get("X-Linked-Size") or headers.get("Content-Length", "0"))
        return Head(commit, Entry(key, size, 0.0, _version(etag, commit)))

    def _newest_commit(self) -> str:
        branches = self._api.list_repo_refs(**self._where).branches
        commit: str = next(each.target_commit for each in branches if each.name == BRANCH)
        return commit

    def _find(self, key: str) -> Entry:
        entry = self._look(key).entry
        if entry is None:
            raise NotFound(f"{self.address_of(key)!r} does not exist")
        return entry

    def _get(self, key: str, first: int, last: int | None, version: str | None) -> Body:
        span = {} if not first and last is None else {"Range": f"bytes={first}-{_end(last)}"}
        response = self._request("GET", key, **span)
        if response.status_code == 416:
            response.close()
            return Body(first, version or "", iter(()))
        try:
            hf_raise_for_status(response)
        except BaseException:
            response.close()
            raise
        etag = response.headers.get("ETag", "")
        if version and etag != version:
            response.close()
            raise Conflict(
                f"{self.address_of(key)!r} was replaced while it was read; read it again"
            )
        whole = response.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(whole or response.headers.get("Content-Length", 0))
        skip = first if response.status_code == 200 else 0
        return Body(size, etag, _content(response, skip))

    def _list(self, folder: str, recursive: bool) -> Iterator[Entry | str]:
        commit = self._newest_commit()
        found = self._api.list_repo_tree(
            **self._where, path_in_repo=folder or None, recursive=recursive, revision=commit
        )
        for each in found:
            if isinstance(each, RepoFile):
                blob = each.lfs.sha256 if each.lfs else each.blob_id
                yield Entry(each.path, each.size, 0.0, _version(blob, commit))
            elif not recursive:
                yield each.path

    def created(self, path: str) -> datetime.datetime:
        """When the file was last committed; the hub keeps no other time."""
        return self.modified(path)

    def modified(self, path: str) -> datetime.datetime:
        """When the file was last committed."""
        key = self._strip_protocol(path)
        found = self._ask(
            "read", key, lambda: self._api.get_paths_info(paths=[key], expand=True, **self._where)
        )
        if not found or not isinstance(found[0], RepoFile) or found[0].last_commit is None:
            raise NotFound(f"{self.address_of(key)!r} does not exist")
        moment: datetime.datetime = found[0].last_commit.date
        return moment

    def _ask(
        self,
        doing: str,
        key: str,
        action: Callable[[], _Answer],
        noted: Callable[[Failure], None] | None = None,
    ) -> _Answer:
        with waiting_longer_each_time():
            return super()._ask(doing, key, action, noted)

    def _failure(self, error: Exception, doing: str, key: str) -> Failure | None:
        if isinstance(error, StorageError):
            return None
        where = self.address_of(key) if key else self.address
        return failure_of(error, f"cannot {doing} {where!r}", self._connection[1])


def _version(etag: str, commit: str) -> str:
    """What tells a file's content, and the commit in which it was seen."""
    return f"{etag.removeprefix('W/').strip(chr(34))}@{commit}"


def blob_of(version: str | None) -> str | None:
    """The content in a version, without the commit."""
    return version and version.partition("@")[0]


def _end(last: int | None) -> str:
    return "" if last is None else str(last - 1)


def _content(response: Any, skip: int) -> Iterator[bytes]:
    """The body, from a byte on where the server sent all of it; the connection is given back."""
    try:
        for chunk in response.iter_bytes(CHUNK):
            yield chunk[skip:]
            skip = max(0, skip - len(chunk))
    finally:
        response.close()
