"""Credentials that no one gets to see: not in a repr, a pickle, a log line or an error."""

import ipaddress
import logging
import threading
import urllib.parse
from typing import Any, NoReturn

from mttl_storage.errors import Denied

HIDDEN = "***"
_CLIENTS = {
    *("azure", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "msal"),
    *("requests", "urllib3"),
}
"""The libraries that ask, and what they are built on: how the names of their loggers begin."""

_known: set[str] = set()
_lock = threading.Lock()


class Secret:
    """A credential. Only ``reveal`` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        """Keep a credential, and hide it from now on in what the client libraries log."""
        self._value = value
        hide(value)

    def reveal(self) -> str:
        """The credential itself, for the client that sends it."""
        return self._value

    def __repr__(self) -> str:
        """Nothing of it."""
        return f"Secret({HIDDEN!r})"

    def __reduce__(self) -> NoReturn:
        """A credential is not pickled."""
        raise TypeError("a credential is not pickled; pass it again, or set it in the environment")


def hide(value: str) -> None:
    """Keep a credential, and its signature if it is a SAS, out of the client libraries' logs.

    Call it after the client library was imported, since that makes its loggers.
    """
    parts = {value, *_signatures(value)}
    forms = {form for part in parts for form in (part, urllib.parse.quote(part, safe=""))}
    with _lock:
        _known.update(form for form in forms if len(form) >= 8)
        for name, logger in list(logging.root.manager.loggerDict.items()):
            # A filter acts on one logger and not on those below it.
            if name.partition(".")[0] in _CLIENTS and isinstance(logger, logging.Logger):
                logger.addFilter(_redact)


def redacted(text: str) -> str:
    """A text without any credential that was hidden."""
    # The longest first, since a signature is a part of its SAS.
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


def refuse_plain(url: str, what: str) -> None:
    """Raise Denied if a credential would be sent over plain http to another machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not _is_loopback(parts.hostname or ""):
        raise Denied(
            f"{what} would be sent over plain {parts.scheme or 'text'} to {parts.hostname!r}; "
            "use an https:// endpoint"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _signatures(value: str) -> list[str]:
    """The signature of a SAS, and the key or signature in a connection string."""
    found = [part[len("sig=") :] for part in value.lstrip("?").split("&") if part[:4] == "sig="]
    for part in value.split(";"):
        name, _, rest = part.partition("=")
        if name.strip().lower() == "accountkey":
            found.append(rest)
        elif name.strip().lower() == "sharedaccesssignature":
            found += [rest, *_signatures(rest)]
    return [*found, *map(urllib.parse.unquote, found)]


def _redact(record: logging.LogRecord) -> bool:
    try:
        text = record.getMessage()
    except Exception:  # logging itself tells of a broken message
        return True
    clean = redacted(text)
    if clean != text:
        record.msg, record.args = clean, ()
    error: Any = record.exc_info[1] if record.exc_info else None
    if error is not None and redacted(str(error)) != str(error):
        record.exc_info = None
    return True
