"""What is needed of huggingface_hub beyond its calls: time-outs, silence, what errors mean."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from mttl_storage.errors import (
    Denied,
    NotFound,
    StorageError,
    StorageFull,
    Throttled,
)
from mttl_storage.retrying import Failure
from mttl_storage.secrets import Secret, hide, redacted, refuse_plain

try:
    import httpx2
    from huggingface_hub import HfApi, constants, get_token, set_client_factory
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.tqdm import disable_progress_bars
except ImportError as error:
    raise ImportError("hf:// addresses need huggingface_hub; install mttl-storage[hf]") from error

LIBRARY = "mttl-storage"
CONNECT_SECONDS = 10.0
"""How long to wait for a connection."""
SILENT_SECONDS = 5.0
"""How long to wait for the next byte; twice as long each time the same request was given up."""
LONGEST_SILENT_SECONDS = 15.0
"""The most that it becomes; uploads, which the client makes in threads of its own, begin here."""

_PASSING = {408, 429, 500, 502, 503, 504}
_CONNECTION_PATIENCE = 20.0
_FULL = ("storage limit", "storage quota", "storage patterns", "exceeded")
_lock = threading.Lock()
_Waits = dict[tuple[str, str], tuple[float, float]]
# When each request was last made, by method and address, and how long it might be silent.
_waits: ContextVar[_Waits | None] = ContextVar("waits", default=None)


def connect(token: object) -> tuple[HfApi, str]:
    """The client for the hub of HF_ENDPOINT, and where its credential is from.

    Args:
        token: a user access token, False for none, or None for HF_TOKEN or the one of
            ``hf auth login``.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    value = token.reveal() if isinstance(token, Secret) else token
    kind = "token=" if value else "HF_TOKEN, or of the login,"
    if value is None:
        value = get_token() or False
    if not isinstance(value, (str, bool)):
        raise TypeError(f"a token of the hub is a str, not {type(value).__name__}")
    if value:
        refuse_plain(endpoint, "a token")
    _bound_requests()
    api = HfApi(endpoint=endpoint, token=value, library_name=LIBRARY)
    if isinstance(value, str):
        hide(value)
    return api, kind if value else "no token"


class _Bounded:
    """A client factory whose requests all end: huggingface_hub itself sets no time-outs."""

    def __init__(self, factory: Callable[[], httpx2.Client]) -> None:
        self.factory = factory

    def __call__(self) -> httpx2.Client:
        client = self.factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks["request"], _bound]}
        return client


def _bound(request: httpx2.Request) -> None:
    """Give a request of this package time-outs. Those of others, and those that have some, stay.

    Uploads to signed addresses carry no name of a library; they are known by having no credential.
    """
    ours = LIBRARY in request.headers.get("user-agent", "")
    upload = request.method == "PUT" and "authorization" not in request.headers
    if (ours or upload) and not any(request.extensions.get("timeout", {}).values()):
        timeout = httpx2.Timeout(_silence(request), connect=CONNECT_SECONDS)
        request.extensions = {**request.extensions, "timeout": timeout.as_dict()}


def _silence(request: httpx2.Request) -> float:
    """Seconds that the answer to a request may be silent.

    A commit of many files takes the hub long, while most silence is a connection that broke.
    """
    waits = _waits.get()
    if waits is None:
        return LONGEST_SILENT_SECONDS
    which, now = (request.method, str(request.url)), time.monotonic()
    began, seconds = waits.get(which, (math.inf, SILENT_SECONDS))
    if now - began >= seconds:
        seconds = min(2 * seconds, LONGEST_SILENT_SECONDS)
    waits[which] = now, seconds
    return seconds


@contextlib.contextmanager
def waiting_longer_each_time() -> Iterator[None]:
    """A block in which a request that was given up for its silence is given more time the next."""
    token = _waits.set({})
    try:
        yield
    finally:
        _waits.reset(token)


def _bound_requests() -> None:
    with _lock:
        factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
        if not isinstance(factory, _Bounded):
            set_client_factory(_Bounded(factory))


class _Quiet:
    """The client has one switch for all threads: it is on again once the last has left a block."""

    def __init__(self) -> None:
        self._blocks = 0
        self._bars = contextlib.ExitStack()

    def __enter__(self) -> None:
        with _lock:
            self._blocks += 1
            if self._blocks == 1:
                self._bars.enter_context(disable_progress_bars())

    def __exit__(self, *error: object) -> None:
        with _lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._bars.close()


_quiet = _Quiet()


def quiet() -> contextlib.AbstractContextManager[None]:
    """A block in which the client shows no bars, also while other threads enter and leave such."""
    return _quiet


def failure_of(error: Exception, what: str, kind: str) -> Failure | None:
    """What an exception of the client means, None if it is none of its.

    Args:
        error: as raised by huggingface_hub or its HTTP client.
        what: was attempted, as the beginning of a message.
        kind: of credential that was used.
    """
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "Error while uploading", around what went wrong
    if isinstance(error, OfflineModeIsEnabled):
        return Failure(StorageError(f"{what}: HF_HUB_OFFLINE is set; unset it to ask the hub"))
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, what, kind)
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        text = f"{what}: no connection to the hub; {_reason(error)}"
        return Failure(StorageError(text), passing=True, patience=_CONNECTION_PATIENCE)
    # hf_xet raises the ConnectionError of Python.
    closed = isinstance(error, RuntimeError) and "client has been closed" in str(error)
    if isinstance(error, httpx2.TransportError | ConnectionError | TimeoutError) or closed:
        text = f"{what}: the connection broke; {_reason(error)}"
        return Failure(StorageError(text), passing=True, unknown=True)
    if isinstance(error, ValueError) and str(error).startswith("LFS batch"):
        text = f"{what}: the hub does not take the files; {_reason(error)}"
        return Failure((StorageFull if _is_full(text) else StorageError)(text))
    return None


def _refusal(error: HfHubHTTPError, what: str, kind: str) -> Failure:
    response = error.response
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    said = _reason(error.server_message or f"status {status}")
    if status == 404 or code == "RepoNotFound":
        missing = "there is no such repository, or it is private" if "Repo" in code else said
        return Failure(NotFound(f"{what}: {missing}"))
    if status in (403, 413, 507) and (status != 403 or _is_full(said)):
        return Failure(StorageFull(f"{what}: there is no room left; {said}"))
    if status in (401, 403):
        return Failure(
            Denied(f"{what}: the hub refuses the credential of {kind} ({said}); check its rights")
        )
    if status == 412:
        return Failure(Throttled(f"{what}: others commit all the time"), passing=True, crowded=True)
    if status in _PASSING:
        wait = _seconds(response)
        when = f"in {wait:.0f} s" if wait else "later"
        text = f"{what}: the hub answers {status} ({said}); try again {when}"
        error_type = Throttled if status in (429, 503) else StorageError
        return Failure(error_type(text), True, wait, unknown=status >= 500)
    return Failure(StorageError(f"{what}: the hub answers {status} ({said})"))


def _is_full(said: str) -> bool:
    return any(hint in said.lower() for hint in _FULL)


def _seconds(response: Any) -> float:
    """What the hub asks to wait, by Retry-After or by the rate-limit header."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    limit = _http.parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else 0.0


def _reason(error: object) -> str:
    """The first line of what was said, without a query, which may hold a signature."""
    lines = [line for line in redacted(str(error)).splitlines() if line.strip()]
    return lines[0].partition("?")[0][:200] if lines else type(error).__name__
