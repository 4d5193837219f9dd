"""Asking again: how often, how long, and what comes out in the end."""

import time

import pytest

from mttl_storage import Denied, StorageError, Throttled, retrying
from mttl_storage.retrying import Failure, patiently


class Unlucky(Exception):
    """What a client raises."""


@pytest.fixture
def waits(monkeypatch):
    """The pauses that were made, without making them; the clock goes on by them."""
    made = []
    now = time.monotonic
    monkeypatch.setattr("tenacity.nap.time.sleep", made.append)
    monkeypatch.setattr("time.monotonic", lambda: now() + sum(made))
    return made


def failing(times, failure):
    """An action that fails so many times, and what its failures mean."""
    left = iter(range(times))

    def action():
        if next(left, None) is not None:
            raise Unlucky("https://host/?sig=SECRET")
        return "answer"

    return action, lambda error: failure if isinstance(error, Unlucky) else None


def test_a_passing_fault_is_asked_again(waits):
    noted = []
    failure = Failure(StorageError("busy"), passing=True)
    assert patiently(*failing(3, failure), noted.append) == "answer"
    assert len(waits) == len(noted) == 3
    assert all(0 <= wait <= retrying.LONGEST_PAUSE for wait in waits)


def test_what_the_store_asks_to_wait_is_waited(waits):
    assert patiently(*failing(2, Failure(Throttled("busy"), passing=True, wait=17))) == "answer"
    assert waits == [17, 17]


def test_a_lasting_refusal_is_not_asked_again(waits):
    with pytest.raises(Denied, match="no") as caught:
        patiently(*failing(9, Failure(Denied("no"))))
    assert waits == []
    assert caught.value.__context__ is caught.value.__cause__ is None


def test_patience_ends_and_says_what_was_tried(waits):
    with pytest.raises(StorageError, match=r"^busy; tried \d+ times in \d+ s$") as caught:
        patiently(*failing(10**6, Failure(StorageError("busy"), passing=True)))
    assert 60 < sum(waits) <= retrying.PATIENCE + retrying.LONGEST_PAUSE
    assert "SECRET" not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_wait_longer_than_our_patience_is_not_begun(waits):
    with pytest.raises(Throttled):
        patiently(*failing(9, Failure(Throttled("in an hour"), passing=True, wait=3600)))
    assert waits == []


def test_a_connection_that_cannot_be_made_is_told_sooner(waits):
    failure = Failure(StorageError("no connection"), passing=True, patience=5)
    with pytest.raises(StorageError):
        patiently(*failing(10**6, failure))
    assert sum(waits) < 5 + retrying.LONGEST_PAUSE


def test_a_bug_goes_on_as_it_is(waits):
    def buggy():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        patiently(buggy, lambda error: None)
    assert waits == []
