"""``az://account/container/path``: Azure Blob Storage, through azure-storage-blob."""

import base64
import contextlib
import datetime
import hashlib
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import BoundedSemaphore
from typing import Any

from mttl_storage.errors import (
    Denied,
    NotFound,
    StorageError,
    StorageFull,
    Throttled,
)
from mttl_storage.retrying import Failure
from mttl_storage.secrets import hide, redacted
from mttl_storage.store.azure_account import Account, account_of
from mttl_storage.store.base import Entry
from mttl_storage.store.remote import ANY, SMALL, Body, RemoteStore, slices
from mttl_storage.store.transfer import WORKERS, Upload, in_parallel, verified
from mttl_storage.uri import azure_parts

try:
    from azure.core import MatchConditions
    from azure.core.exceptions import (
        AzureError,
        ClientAuthenticationError,
        HttpResponseError,
        IncompleteReadError,
        ResourceExistsError,
        ResourceModifiedError,
        ServiceRequestError,
        ServiceResponseError,
    )
    from azure.storage.blob import BlobBlock, BlobPrefix, ContainerClient
except ImportError as error:
    raise ImportError(
        "az:// addresses need azure-storage-blob; install mttl-storage[azure]"
    ) from error

CONNECT_SECONDS = 10
SILENT_SECONDS = 15
"""How long to wait for a connection, and for the next byte on it."""
BLOCK = SMALL
"""Bytes of one block of a large file, and of one download request."""

_PASSING = {408, 429, 500, 502, 503, 504}
CONNECT_PATIENCE = 20.0


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
        client = ContainerClient(
            self._identity.url,
            self._container,
            credential=self._identity.credential,
            connection_timeout=CONNECT_SECONDS,
            read_timeout=SILENT_SECONDS,
            retry_total=0,
            max_single_get_size=BLOCK,
            max_chunk_get_size=BLOCK,
            connection_data_block_size=1 << 20,
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
        with _garbled():
            found = self._blob(key).get_blob_properties()
        return _entry(key, found, _whole(found.etag))

    def _get(self, key: str, first: int, last: int | None, version: str | None) -> Body:
        condition = {"etag": version, "match_condition": MatchConditions.IfNotModified}
        with _garbled():
            stream = self._blob(key).download_blob(
                offset=first if first or last is not None else None,
                length=None if last is None else last - first,
                max_concurrency=1,
                **(condition if version else {}),
            )
            # The stream's own size is that of the range, unless the whole file was asked for.
            found, whole = stream.properties, not first and last is None
            size = found.size if whole else int(found.content_range.rpartition("/")[2])
        return Body(size, _whole(found.etag), _content(stream))

    def _write(self, key: str, upload: Upload, expected: str | None) -> str | None:
        blob, condition = self._blob(key), _condition(expected)
        try:
            if upload.size <= BLOCK:
                data = b"".join(verified(upload))
                with _garbled():
                    answer = blob.upload_blob(data, overwrite=expected is not None, **condition)
            else:
                blocks = self._stage_blocks(key, blob, upload)
                with _garbled():
                    answer = blob.commit_block_list(blocks, **condition)
        except (ResourceExistsError, ResourceModifiedError) as error:
            if error.status_code in (409, 412) and expected != ANY:
                return None
            raise
        return _whole(answer["etag"])

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
        with _garbled():
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
        if not isinstance(error, AzureError):
            return None
        what = f"cannot {doing} {self.address_of(key)!r}"
        if isinstance(error, ServiceRequestError):
            return Failure(
                StorageError(f"{what}: no connection; {_reason(error)}"),
                passing=True,
                patience=CONNECT_PATIENCE,
            )
        if isinstance(error, ClientAuthenticationError):
            kind = self._identity.kind
            text = f"{what}: Azure refuses the credential of {kind}; {_reason(error)}"
            return Failure(Denied(text))
        cut = isinstance(error, (ServiceResponseError, IncompleteReadError))
        if cut or not isinstance(error, HttpResponseError) or error.status_code is None:
            return Failure(
                StorageError(f"{what}: the connection broke; {_reason(error)}"),
                passing=True,
                unknown=True,
            )
        return self._refusal(error, what)

    def _refusal(self, error: Any, what: str) -> Failure:
        status, code = error.status_code, getattr(error.error_code, "value", error.error_code)
        headers = error.response.headers if error.response is not None else {}
        if status == 404 and code == "ContainerNotFound":
            return Failure(NotFound(f"{what}: there is no such container"))
        if status == 404:
            return Failure(NotFound(f"{what}: it does not exist"))
        if status in (401, 403):
            kind = self._identity.kind
            text = f"{what}: Azure refuses the credential of {kind} ({code})"
            return Failure(Denied(f"{text}; check what it permits, and until when"))
        if status in (413, 507):
            return Failure(StorageFull(f"{what}: the account has no room left ({code})"))
        wait = _seconds(headers)
        if status in _PASSING or code in ("ContainerBeingDeleted", "InvalidBlockList"):
            when = f"in {wait:.0f} s" if wait else "later"
            text = f"{what}: Azure answers {status} ({code}); try again {when}"
            error_type = Throttled if status in (429, 503) else StorageError
            return Failure(error_type(text), True, wait, unknown=status >= 500)
        return Failure(StorageError(f"{what}: Azure answers {status} ({code}); {_reason(error)}"))


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
    with _garbled():
        yield from stream.chunks()


class _GarbledError(AzureError):
    """An answer was cut within its headers, which the client takes for all of them."""


@contextlib.contextmanager
def _garbled() -> Iterator[None]:
    """Call the client, which stumbles over headers that are cut or missing."""
    try:
        yield
    except (ValueError, IndexError, AttributeError, KeyError, TypeError) as error:
        raise _GarbledError(f"the answer makes no sense to the client: {error!r}") from error


def _whole(etag: str | None) -> str:
    """An ETag; without a whole one, the headers were cut and nothing in them can be trusted."""
    if etag is None or len(etag) < 2 or (etag[0], etag[-1]) != ('"', '"'):
        raise _GarbledError(f"the answer was cut: its ETag is {etag!r}")
    return etag


def _reason(error: Exception) -> str:
    """The first line of what the client says, without a query, which may hold a signature."""
    first = redacted(str(error)).partition("\n")[0]
    return first.partition("?")[0][:200]


def _seconds(headers: Any) -> float:
    value = headers.get("Retry-After") or headers.get("retry-after") or ""
    if value.isdecimal():
        return float(value)
    value = headers.get("x-ms-retry-after-ms") or ""
    return float(value) / 1000 if value.isdecimal() else 0.0
