"""The errors that every backend raises, and how an OSError becomes one of them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class StorageError(Exception):
    """Something about a repository or its store went wrong. The others derive from it."""


class NotFound(StorageError, FileNotFoundError):  # noqa: N818 - the public names have no suffix
    """There is no such repository, item, file or generation."""


class InvalidName(StorageError, ValueError):  # noqa: N818
    """An address or a name that cannot be used."""


class Conflict(StorageError):  # noqa: N818
    """Someone else changed the same thing first, or the name is taken."""


class Denied(StorageError, PermissionError):  # noqa: N818
    """The store refuses access."""


class Throttled(StorageError):  # noqa: N818
    """The store, or the other writers, were busy for longer than we wait."""


class Corrupt(StorageError):  # noqa: N818
    """Stored bytes are not those that were written."""


class StorageFull(StorageError, OSError):  # noqa: N818
    """The disk is full or a quota is used up."""


class ReadOnly(StorageError, PermissionError):  # noqa: N818
    """The repository, or what it lies on, cannot be written."""


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_KEPT = (FileExistsError, IsADirectoryError, NotADirectoryError)


@contextmanager
def translated(doing: str, what: str) -> Iterator[None]:
    """Turn an OSError inside the block into one of the errors above.

    Args:
        doing: a verb for the message, as in "read".
        what: the address it was done to. It must hold no credentials.
    """
    try:
        yield
    except (StorageError, *_KEPT):
        raise
    except OSError as error:
        raise from_os_error(error, doing, what) from error


def from_os_error(error: OSError, doing: str, what: str) -> StorageError:
    """The error of this package that says the same as an OSError."""
    reason = error.strerror or type(error).__name__
    message = f"cannot {doing} {what!r}: {reason}"
    if isinstance(error, FileNotFoundError):
        return NotFound(message)
    if error.errno in _FULL:
        return StorageFull(f"{message}; free some space and try again, nothing was lost")
    if error.errno == errno.EROFS:
        return ReadOnly(f"{message}; open it with read_only=True, or choose another place")
    if isinstance(error, PermissionError):
        return Denied(f"{message}; check who owns it and its mode")
    return StorageError(message)
