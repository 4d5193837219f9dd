"""What the answers of Azure mean, also those that were cut short."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from mttl_storage.errors import Denied, NotFound, StorageError, StorageFull, Throttled
from mttl_storage.retrying import Failure
from mttl_storage.secrets import redacted

try:
    from azure.core.exceptions import (
        AzureError,
        ClientAuthenticationError,
        HttpResponseError,
        IncompleteReadError,
        ServiceRequestError,
        ServiceResponseError,
    )
    from azure.core.pipeline.transport import RequestsTransport
except ImportError as error:
    raise ImportError(
        "az:// addresses need azure-storage-blob; install mttl-storage[azure]"
    ) from error

CONNECT_PATIENCE = 20.0
"""Seconds to go on trying to reach a server that does not answer at all."""
_PASSING = {408, 429, 500, 502, 503, 504}
_CODE_MATTERS = {400, 409, 412}
"""Statuses that mean one thing or another by the code that comes with them."""
_FULL = re.compile("Quota|Capacity")


def failure_of(error: Exception, what: str, kind: str) -> Failure | None:
    """What an exception of the client means, None if it is none of its.

    Args:
        error: as raised by azure-storage-blob.
        what: was attempted, as the beginning of a message.
        kind: of credential that was used.
    """
    if not isinstance(error, AzureError):
        return None
    if isinstance(error, ServiceRequestError):
        return Failure(
            StorageError(f"{what}: no connection; {_reason(error)}"),
            passing=True,
            patience=CONNECT_PATIENCE,
        )
    if isinstance(error, ClientAuthenticationError) and error.status_code is None:
        text = f"{what}: Azure refuses the credential of {kind}; {_reason(error)}"
        return Failure(Denied(text))
    cut = isinstance(error, (ServiceResponseError, IncompleteReadError))
    if cut or not isinstance(error, HttpResponseError) or error.status_code is None:
        return Failure(
            StorageError(f"{what}: the connection broke; {_reason(error)}"),
            passing=True,
            unknown=True,
        )
    return _refusal(error, what, kind)


def _refusal(error: Any, what: str, kind: str) -> Failure:
    status, code = error.status_code, code_of(error)
    headers = error.response.headers if error.response is not None else {}
    if status == 404 and code == "ContainerNotFound":
        return Failure(NotFound(f"{what}: there is no such container"))
    if status == 404:
        return Failure(NotFound(f"{what}: it does not exist"))
    if status in (401, 403):
        text = f"{what}: Azure refuses the credential of {kind} ({code})"
        return Failure(Denied(f"{text}; check what it permits, and until when"))
    if status in (413, 507) or (code and _FULL.search(code)):
        return Failure(StorageFull(f"{what}: the account has no room left ({code})"))
    wait = _seconds(headers)
    if status in _PASSING or code in ("ContainerBeingDeleted", "InvalidBlockList"):
        when = f"in {wait:.0f} s" if wait else "later"
        text = f"{what}: Azure answers {status} ({code}); try again {when}"
        error_type = Throttled if status in (429, 503) else StorageError
        return Failure(error_type(text), True, wait, unknown=status >= 500)
    return Failure(StorageError(f"{what}: Azure answers {status} ({code}); {_reason(error)}"))


def code_of(error: Any) -> str | None:
    """What Azure calls an error, None if it does not say."""
    code: str | None = getattr(error.error_code, "value", error.error_code)
    return code


class _GarbledError(AzureError):
    """An answer was cut within its headers, which the client takes for all of them."""


class WholeAnswers(RequestsTransport):  # type: ignore[misc]
    """Takes no answer of which a connection has ended within the headers, as the client would."""

    def send(self, request: Any, **kwargs: Any) -> Any:
        """Send a request, and give its answer.

        Whoever keeps connections open says how long a body is: Azurite at the end of the headers,
        where Azure itself has the date.
        """
        with understood():
            answer: Any = super().send(request, **kwargs)
        length, coding = (
            answer.headers.get(name) or "" for name in ("Content-Length", "Transfer-Encoding")
        )
        whole = (length.isdecimal() or coding.lower() == "chunked") and "Date" in answer.headers
        if not whole and (answer.status_code < 300 or answer.status_code in _CODE_MATTERS):
            raise _GarbledError("the answer was cut within its headers")
        return answer


@contextlib.contextmanager
def understood() -> Iterator[None]:
    """A block that calls the client, which stumbles over headers that are cut or missing."""
    try:
        yield
    except (ValueError, IndexError, AttributeError, KeyError, TypeError) as error:
        raise _GarbledError(f"the answer makes no sense to the client: {error!r}") from error


def whole_etag(etag: str | None) -> str:
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
