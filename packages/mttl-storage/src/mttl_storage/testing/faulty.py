"""A store in which any step can fail, or be the last of its process.

For every step of a commit::

    for step in itertools.count(1):
        crash = crash_at(step)
        with contextlib.suppress(Crash):
            repository_on(faulty_store(store, crash)).add("one", {"file": b"data"})
        assert repository_on(store).verify() == []  # another process looks
        if not crash.fired:
            break
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mttl_storage.log import Log
from mttl_storage.repository import Repository
from mttl_storage.store.base import Store

VERBS = (
    *("put_if_absent", "compare_and_swap", "renew", "delete_if_unchanged", "delete_unchanged"),
    *("version", "read_all", "cat_file", "check", "sha256", "ls", "info", "check_writable"),
    *("pipe_file", "rm_file", "_replace", "_upload", "stage", "publish", "prepare", "tidy"),
)
"""What can fail."""
STREAMS = ("scan", "read_chunks")
"""What can fail before the first and after the last of what it yields."""

Fault = Callable[[str, str, str, int], object]
"""Called as ``fault(verb, key, moment, number)``; what it raises, the verb raises.

The key is that of one file, or else empty. The moment is "before" or "after" the verb is carried
out. The number counts the moments of all verbs from 1; verbs that others are made of count too.
"""

_Store = TypeVar("_Store", bound=Store)


class Crash(BaseException):
    """The process is gone. No ``except Exception`` can go on after it."""


class PlannedFault:
    """A fault that happens at moments of certain numbers."""

    def __init__(self, error: BaseException, due: Callable[[int], bool]) -> None:
        """Raise ``error`` at the moments that are ``due``."""
        self._error, self._due = error, due
        self.fired = 0
        """How often it was raised."""

    def __call__(self, verb: str, key: str, moment: str, number: int) -> None:
        """Raise the error if it is time."""
        if self._due(number):
            self.fired += 1
            raise self._error.with_traceback(None)


def crash_at(n: int) -> PlannedFault:
    """Crash at the n-th moment and at all that follow, since nothing runs in a dead process."""
    return PlannedFault(Crash(f"at step {n}"), lambda number: number >= n)


def fail_at(n: int, error: BaseException) -> PlannedFault:
    """An error at the n-th moment alone."""
    return PlannedFault(error, lambda number: number == n)


def fail_every(k: int, error: BaseException) -> PlannedFault:
    """An error at every k-th moment."""
    return PlannedFault(error, lambda number: number % k == 0)


def faulty_store(store: _Store, fault: Fault) -> _Store:
    """A store of the same kind, over the same files, whose verbs can fail; the other is unchanged.

    Args:
        store: any store.
        fault: told of each verb, and raises what is to go wrong.
    """
    faulty = object.__new__(type(store))
    faulty.__dict__.update(store.__dict__)
    count, lock = 0, threading.Lock()

    def tell(verb: str, key: str, moment: str) -> None:
        nonlocal count
        with lock:  # verbs run in several threads
            count += 1
            number = count
        fault(verb, key, moment, number)

    # On the instance, so that the verbs that are made of others call these.
    for verb in VERBS:
        setattr(faulty, verb, _told(tell, verb, getattr(faulty, verb)))
    for verb in STREAMS:
        setattr(faulty, verb, _told_stream(tell, verb, getattr(faulty, verb)))
    return faulty


def repository_on(store: Store, create: bool = False) -> Repository:
    """The repository in a store, at its newest generation.

    Args:
        store: as ``faulty_store`` or ``mttl_storage.filesystem`` gives it.
        create: make the repository first if there is none.
    """
    log = Log(store)
    if create:
        log.create()
    return Repository(log, log.newest())


_Tell = Callable[[str, str, str], None]


def _told(tell: _Tell, verb: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        key = _key(args, kwargs)
        tell(verb, key, "before")
        result = real(*args, **kwargs)
        tell(verb, key, "after")
        return result

    return call


def _told_stream(tell: _Tell, verb: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
        key = _key(args, kwargs)
        tell(verb, key, "before")
        yield from real(*args, **kwargs)
        tell(verb, key, "after")

    return call


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    first = next(iter((*args, *kwargs.values())), "")
    return first if isinstance(first, str) else ""
