"""Errors that bad data or bad wishes cause, and how a wrong task name is answered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(Exception):
    """What was asked of data cannot be had. The others derive from it."""


class UnknownTaskError(DataError, LookupError):
    """There is no task of that name."""


class EmptyTaskError(DataError, ValueError):
    """The task is there, but has no rows to work with."""


class TaskExistsError(DataError, ValueError):
    """The library has other rows under the task's name."""


class DataNotReachableError(DataError, OSError):
    """Data that was asked for is neither on this machine nor to be had from the hub."""


class RowsError(DataError, ValueError):
    """Rows that cannot be read from where they lie, or not be made as asked."""


class PromptError(DataError, ValueError):
    """A row that a model cannot be asked, such as one that leaves no room for an answer."""


class OtherRowsWarning(UserWarning):
    """A task is there with other rows than those that would be made now; they are used."""


class TruncationWarning(UserWarning):
    """Rows were longer than a model's context and lost their beginning; they were scored so."""


def unknown_task(name: str, where: str, names: Iterable[str]) -> UnknownTaskError:
    """The error for a name that is not among ``names``, with the near ones."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        hint = f"did you mean {' or '.join(repr(match) for match in near)}?"
    elif known:
        hint = f"it has {', '.join(known[:8])}{' ...' if len(known) > 8 else ''}"
    else:
        hint = "it has none yet"
    return UnknownTaskError(f"no task {name!r} in {where} ({len(known)} tasks); {hint}")
