"""What may go wrong on a loopback hub, and the rules that say when.

A rule counts the requests that match it and decides by that count alone, so that a run with the
same seed hits the same requests of each rule, whatever else is in flight.
"""

import random
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Status:
    """Answer an error instead of handling the request: 429, 500, 503, 403, 404, 413, 507 ..."""

    code: int = 503
    message: str = "injected fault"
    retry_after: int | None = None
    """Seconds, sent as Retry-After."""
    error_code: str = ""
    """Sent as X-Error-Code, such as "EntryNotFound"."""


@dataclass(frozen=True)
class Reset:
    """Reset the connection: before the request is handled, or after (the lost response)."""

    after: bool = False


@dataclass(frozen=True)
class Cut:
    """Handle the request, but close the connection in the middle of the answer's body, if any."""

    keep: float = 0.5
    """The part of the body that is sent."""


@dataclass(frozen=True)
class Stall:
    """Wait before the request is handled, or after and before the answer is sent."""

    seconds: float
    after: bool = False


@dataclass(frozen=True)
class Flip:
    """Turn over one bit of the answer's body, or of the request's."""

    request: bool = False
    position: float = 0.5
    """Where the byte is, as a part of the body."""


@dataclass(frozen=True)
class Short:
    """Answer with the start of the body as if it were the whole, lengths and all."""

    keep: float = 0.5


@dataclass(frozen=True)
class Wrong:
    """Answer with another body under the same status and headers."""

    body: bytes = b"not what was asked for"


Fault = Status | Reset | Cut | Stall | Flip | Short | Wrong


class Fired(NamedTuple):
    """A fault that happened: to which request, by number, and what it was."""

    number: int
    method: str
    path: str
    fault: Fault


@dataclass
class _Rule:
    fault: Fault
    method: re.Pattern[str]
    path: re.Pattern[str]
    nth: int | None
    times: int | None
    probability: float
    seed: str
    matched: int = 0
    fired: int = 0

    def matches(self, method: str, path: str) -> bool:
        return bool(self.method.fullmatch(method) and self.path.search(path))

    def fires(self) -> bool:
        """Count a match, and say whether this is one to hit."""
        self.matched += 1
        if self.times is not None and self.fired >= self.times:
            return False
        if self.nth is not None and self.matched != self.nth:
            return False
        chance = random.Random(f"{self.seed}:{self.matched}").random()  # noqa: S311 - to repeat
        return chance < self.probability


class Faults:
    """The rules in force. Where several hit one request, the one added first happens to it."""

    def __init__(self, seed: int = 0) -> None:
        """Take what the draws of a probability depend on."""
        self._seed = seed
        self._rules: list[_Rule] = []
        self._fired: list[Fired] = []
        self._made = 0
        self._lock = threading.Lock()

    @property
    def fired(self) -> Sequence[Fired]:
        """What happened so far."""
        return tuple(self._fired)

    def add(
        self,
        fault: Fault,
        *,
        method: str = ".*",
        path: str = "",
        nth: int | None = None,
        times: int | None = None,
        probability: float = 1.0,
    ) -> None:
        """Let a fault happen to requests that match.

        Args:
            fault: What happens.
            method: A pattern for the whole HTTP method, such as "GET|HEAD".
            path: A pattern found anywhere in the unquoted path, which has no query.
            nth: Only to the nth match from now on, from 1.
            times: To so many requests at most.
            probability: To this part of the matches.
        """
        with self._lock:
            self._made += 1
            seed = f"{self._seed}:{self._made}"
            pattern = re.compile(method, re.IGNORECASE)
            where = re.compile(path)
            self._rules.append(_Rule(fault, pattern, where, nth, times, probability, seed))

    def clear(self) -> None:
        """Let nothing go wrong any more."""
        with self._lock:
            self._rules.clear()

    def draw(self, number: int, method: str, path: str) -> Fault | None:
        """What is to happen to a request. Every rule that matches it counts it."""
        with self._lock:
            matching = [rule for rule in self._rules if rule.matches(method, path)]
            firing = [rule for rule in matching if rule.fires()]
            if not firing:
                return None
            rule = firing[0]
            rule.fired += 1
            self._fired.append(Fired(number, method, path, rule.fault))
            return rule.fault
