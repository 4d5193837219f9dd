"""``az://account/container/path``: Azure Blob Storage, through azure-storage-blob."""

import base64
import datetime
import hashlib
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import BoundedSemaphore
from typing import Any

from mttl_storage.errors import Denied, NotFound
from mttl_storage.retrying import Failure
from mttl_storage.secrets import hide
from mttl_storage.store.azure_account import Account, account_of
from mttl_storage.store.azure_answers import (
    WholeAnswers,
    code_of,
    failure_of,
    understood,
    whole_etag,
)
from mttl_storage.store.base import Entry
from mttl_storage.store.remote import ANY, SMALL, Body, RemoteStore, slices
from mttl_storage.store.transfer import WORKERS, Upload, in_parallel, verified
from mttl_storage.uri import azure_parts

from azure.core import MatchConditions  # isort: skip  # after azure_answers
from azure.core.exceptions import ResourceExistsError, ResourceModifiedError  # isort: skip
from azure.storage.blob import BlobBlock, BlobPrefix, ContainerClient  # isort: skip

CONNECT_SECONDS = 10
SILENT_SECONDS = 5
"""How long to wait for a connection, and for the next byte on it."""
BLOCK = SMALL
"""Bytes of one block of a large file, and of one download request."""
_TAKEN = ("BlobAlreadyExists", "ConditionNotMet")
"""What Azure says when a condition of a write does not hold."""


class AzureStore(RemoteStore):
    """Blobs below a path of one container."""

    protocol = "az"
    scheme = "az"

    def __init__(self, root: str, **kwargs: Any) -> None:
        """A store at ``account/container/path``; nothing is contacted yet."""
        self._account, self._container, folder = azure_parts(root)
        super().__init__(root=root, **kwargs)
        self._folder = f"{folder}/" if folder else ""
        self._blocks_in_flight = BoundedSemaphore(WORKERS)

    @cached_property
    def _identity(self) -> Account:
        return account_of(self._account, self._token)

    @cached_property
    def _client(self) -> Any:
        transport = WholeAnswers(
            connection_timeout=CONNECT_SECONDS,
            read_timeout=SILENT_SECONDS,
            connection_data_block_size=1 << 20,
        )
        client = ContainerClient(
            self._identity.url,
            self._container,
            credential=self._identity.credential,
            transport=transport,
            retry_total=0,
            max_single_get_size=BLOCK,
            max_chunk_get_size=BLOCK,
            logging_enable=False,
        )
        if self._identity.secret:
            hide(self._identity.secret.reveal())
        return client

    def prepare(self) -> None:
        """Make the container, if there is none and the credential may."""

        def create() -> None:
            try:
                self._client.create_container()
            except ResourceExistsError:
                return

        try:
            self._ask("create the container of", "", create)
        except Denied:  # a SAS for one container cannot make it, nor need it if it is there
            return

    def _blob(self, key: str) -> Any:
        return self._client.get_blob_client(f"{self._folder}{key}")

    def _find(self, key: str) -> Entry:
        with understood():
            found = self._blob(key).get_blob_properties()
        return _entry(key, found, whole_etag(found.etag))

    def _get(self, key: str, first: int, last: int | None, version: str | None) -> Body:
        condition = {"etag": version, "match_condition": MatchConditions.IfNotModified}
        with understood():
            stream = self._blob(key).download_blob(
                offset=first if first or last is not None else None,
                length=None if last is None else last - first,
                max_concurrency=1,
                **(condition if version else {}),
            )
            # The stream's own size is that of the range, unless the whole file was asked for.
            found, whole = stream.properties, not first and last is None
            size = found.size if whole else int(found.content_range.rpartition("/")[2])
        return Body(size, whole_etag(found.etag), _content(stream))

    def _write(self, key: str, upload: Upload, expected: str | None) -> str | None:
        blob, condition = self._blob(key), _condition(expected)
        try:
            if upload.size <= BLOCK:
                data = b"".join(verified(upload))
                with understood():
                    answer = blob.upload_blob(data, overwrite=expected is not None, **condition)
            else:
                blocks = self._stage_blocks(key, blob, upload)
                with understood():
                    answer = blob.commit_block_list(blocks, **condition)
        except (ResourceExistsError, ResourceModifiedError) as error:
            # The code may be cut short. Of other conflicts, such as a policy that forbids to write,
            # the caller is told.
            code = code_of(error) or ""
            if expected != ANY and any(taken.startswith(code) for taken in _TAKEN):
                return None
            raise
        return whole_etag(answer["etag"])

    def _stage_blocks(self, key: str, blob: Any, upload: Upload) -> list[Any]:
        """Upload a large file in blocks, but for those that an earlier try has left there.

        A block is named by what is in it, so that two writers of the same file share theirs.
        """
        there = self._staged_blocks(key, blob)
        names: list[str] = []
        pending: list[Future[None]] = []

        def stage(name: str, data: bytes) -> None:
            try:
                self._ask("write", key, lambda: blob.stage_block(name, data, len(data)))
            finally:
                self._blocks_in_flight.release()

        with ThreadPoolExecutor(WORKERS) as pool:
            for number, data in enumerate(slices(verified(upload), BLOCK)):
                name = _block_name(number, data)
                names.append(name)
                if name not in there:
                    self._blocks_in_flight.acquire()  # which bounds the memory
                    pending.append(pool.submit(stage, name, data))
                if any(future.done() and future.exception() for future in pending):
                    break
        for future in pending:
            future.result()
        return [BlobBlock(name) for name in names]

    def _staged_blocks(self, key: str, blob: Any) -> set[str]:
        try:
            found = self._ask("read", key, lambda: blob.get_block_list("uncommitted"))
        except NotFound:
            return set()
        return {block.id for block in found[1]}

    def _delete(self, keys: list[str]) -> None:
        def delete(key: str) -> None:
            self._ask("delete", key, lambda: self._blob(key).delete_blob())

        in_parallel(delete, keys)

    def delete_if_unchanged(self, key: str, version: str) -> bool:
        """Delete a file unless it was written or renewed since; whether it was deleted."""

        def delete() -> bool:
            try:
                self._blob(key).delete_blob(
                    etag=version, match_condition=MatchConditions.IfNotModified
                )
            except ResourceModifiedError:
                return False
            return True

        try:
            return self._ask("delete", key, delete)
        except NotFound:
            return False

    def renew(self, key: str) -> Entry | None:
        """Make the file as young as one just written, so that gc spares it; None if absent."""

        def touch() -> Entry:
            # Metadata that are written anew change the time and the version, and nothing else.
            self._blob(key).set_blob_metadata({"renewed": uuid.uuid4().hex})
            return self._find(key)

        try:
            return self._ask("renew", key, touch)
        except NotFound:
            return None

    def _list(self, folder: str, recursive: bool) -> Iterator[Entry | str]:
        start = f"{self._folder}{folder}/" if folder else self._folder
        walk = self._client.list_blobs if recursive else self._client.walk_blobs
        with understood():
            for found in walk(name_starts_with=start):
                key = found.name.removeprefix(self._folder)
                if isinstance(found, BlobPrefix):
                    yield key.rstrip("/")
                else:
                    yield _entry(key, found, f'"{found.etag}"')  # a listing gives it bare

    def created(self, path: str) -> datetime.datetime:
        """When the file came to be."""
        key = self._strip_protocol(path)
        properties = self._ask("read", key, lambda: self._blob(key).get_blob_properties())
        created: datetime.datetime = properties.creation_time
        return created

    def modified(self, path: str) -> datetime.datetime:
        """When the file was last written or renewed."""
        entry = self._entry(self._strip_protocol(path))
        return datetime.datetime.fromtimestamp(entry.time, tz=datetime.UTC)

    def _failure(self, error: Exception, doing: str, key: str) -> Failure | None:
        return failure_of(error, f"cannot {doing} {self.address_of(key)!r}", self._identity.kind)


def _block_name(number: int, data: bytes) -> str:
    digest = hashlib.sha256(data).digest()[:18]
    return base64.b64encode(number.to_bytes(6, "big") + digest).decode()


def _condition(expected: str | None) -> dict[str, Any]:
    if expected == ANY:
        return {}
    if expected is None:
        return {"match_condition": MatchConditions.IfMissing}
    return {"etag": expected, "match_condition": MatchConditions.IfNotModified}


def _entry(key: str, found: Any, version: str) -> Entry:
    return Entry(key, found.size, found.last_modified.timestamp(), version)


def _content(stream: Any) -> Iterator[bytes]:
    with understood():
        yield from stream.chunks()
