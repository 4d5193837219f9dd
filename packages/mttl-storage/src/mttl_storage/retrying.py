"""Asking a distant store again while its answer may be a passing fault."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from tenacity import (
    Future,
    RetryCallState,
    Retrying,
    retry_if_result,
    wait_random,
    wait_random_exponential,
)

from mttl_storage.errors import StorageError, Throttled

PATIENCE = 120.0
"""Seconds to go on asking."""
LONGEST_PAUSE = 8.0
"""Seconds between two tries while the store is busy, unless it asks for more itself."""
LONGEST_PAUSE_IF_BROKEN = 2.0
"""Seconds between two tries after a fault that does not tell of a busy store."""

_Answer = TypeVar("_Answer")
_short_pause = wait_random(0, 0.3)
_pause = wait_random_exponential(multiplier=0.25, max=LONGEST_PAUSE)
_pause_if_broken = wait_random_exponential(multiplier=0.25, max=LONGEST_PAUSE_IF_BROKEN)


@dataclass(frozen=True)
class Failure:
    """What went wrong with a request.

    Args:
        error: to raise, if it is not to be tried again. It holds no credentials.
        passing: whether the same request may succeed later.
        wait: seconds that the store asked to wait.
        unknown: whether the request may have been carried out, its answer being lost.
        crowded: whether it only has to be done again, since someone else was faster.
        patience: seconds after which to stop asking.
    """

    error: StorageError
    passing: bool = False
    wait: float = 0.0
    unknown: bool = False
    crowded: bool = False
    patience: float | None = None


def patiently(
    action: Callable[[], _Answer],
    failure_of: Callable[[Exception], Failure | None],
    noted: Callable[[Failure], None] | None = None,
) -> _Answer:
    """The answer of an action, which is done again after passing faults.

    The error that ends it is raised without the client's own as its context, since that may show
    the address that was asked, and a signature in it.

    Args:
        action: a request.
        failure_of: what an exception means, None if it is a bug and goes on as it is.
        noted: told of each failure.
    """

    def attempt() -> tuple[_Answer | None, Failure | None]:
        try:
            return action(), None
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
        if noted:
            noted(failure)
        return None, failure

    def passing(outcome: tuple[_Answer | None, Failure | None]) -> bool:
        return outcome[1] is not None and outcome[1].passing

    def last(state: RetryCallState) -> tuple[_Answer | None, Failure | None]:
        failure = _failure(state)
        error = failure.error
        if isinstance(error, Throttled):
            return None, failure
        tried = f"{error}; tried {state.attempt_number} times in {state.seconds_since_start:.0f} s"
        return None, Failure(type(error)(tried))

    retrying = Retrying(
        retry=retry_if_result(passing),
        wait=_wait,
        stop=_out_of_patience,
        retry_error_callback=last,
    )
    answer, failure = retrying(attempt)
    if failure is not None:
        raise failure.error
    return answer  # type: ignore[return-value]


def _wait(state: RetryCallState) -> float:
    failure = _failure(state)
    if failure.crowded:
        return _short_pause(state)
    pause = _pause if isinstance(failure.error, Throttled) else _pause_if_broken
    return max(pause(state), failure.wait)


def _out_of_patience(state: RetryCallState) -> bool:
    failure = _failure(state)
    patience = PATIENCE if failure.patience is None else failure.patience
    return (state.seconds_since_start or 0.0) + failure.wait > patience


def _failure(state: RetryCallState) -> Failure:
    """The failure of the last try. tenacity asks only after one, and never after a bug."""
    outcome = cast(Future, state.outcome)
    failure: Failure = outcome.result()[1]
    return failure
