"""Commits that lose a race, an answer, or the process."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading

import pytest

from mttl_storage import (
    Denied,
    ReadOnly,
    Repository,
    StorageError,
    StorageFull,
    Throttled,
    committing,
)
from mttl_storage.store import disk
from mttl_storage.store import local as local_store
from mttl_storage.store.virtual import VirtualStore

FILES = {"a.bin": b"a" * 5000, "b.json": b"{}"}
CALLS = ("open", "write", "fsync", "link", "replace", "unlink", "mkdir", "close", "utime")


class Killed(BaseException):
    """The process is gone."""


class FaultyOS:
    """The os module, in which the n-th call that matters fails."""

    def __init__(self, at, fail):
        self.at, self.fail, self.count = at, fail, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                if name == "close":  # a close that fails has closed the file, and dropped its locks
                    real(*args, **kwargs)
                self.fail(name)
            return real(*args, **kwargs)

        return call


class DeadOS(FaultyOS):
    """Once killed, nothing more is done: cleaning up is what a killed process cannot.

    Its files are closed all the same, as the system does for it, and so its locks are gone.
    """

    def __getattr__(self, name):
        if name == "close":
            return os.close
        real = super().__getattr__(name)
        if name not in CALLS:
            return real

        def call(*args, **kwargs):
            if self.count >= self.at:
                raise Killed
            return real(*args, **kwargs)

        return call


def change(repository):
    with repository.batch() as batch:
        batch.add("experts/new", FILES, {"k": 1})
        batch.replace("experts/old", {"x": b"2"})


def kill(_):
    raise Killed


def state_of(folder):
    repository = Repository.open(folder)
    return {name: (item.digest, dict(item.info)) for name, item in repository.items().items()}


@pytest.fixture
def folders(local, clone):
    """The old and the new state, and a maker of copies of the old."""
    local.add("experts/old", {"x": b"1"})
    folder = local.store.local_path("")
    after = clone(folder)
    change(Repository.open(after))
    return folder, state_of(folder), state_of(after)


def test_a_crash_at_every_step_leaves_the_old_or_the_new_state(folders, clone, monkeypatch):
    folder, old, new = folders
    seen, at = set(), 0
    while True:
        at += 1
        copy = clone(folder)
        faulty = DeadOS(at, kill)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", faulty)
            patch.setattr(local_store, "os", faulty)
            with contextlib.suppress(Killed):
                change(Repository.open(copy))
        found = state_of(copy)
        assert found in (old, new), f"step {at}"
        seen.add(found == new)
        assert Repository.open(copy).verify() == [], f"step {at}"
        rerun = Repository.open(copy)
        if found == old:
            change(rerun)
        rerun.gc(grace=0)
        assert state_of(copy) == new
        assert rerun.verify() == []
        assert not list(copy.rglob(".mttl-tmp-*"))
        shutil.rmtree(copy)
        if faulty.count < at:
            break
    assert at > 20
    assert seen == {False, True}


def _commit_and_die(folder, at):
    faulty = FaultyOS(at, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    disk.os = local_store.os = faulty
    change(Repository.open(folder))


def test_sigkill_at_steps_of_a_commit(folders, clone):
    folder, old, new = folders
    context = multiprocessing.get_context("fork")
    codes = []
    for at in range(1, 100, 4):
        copy = clone(folder)
        process = context.Process(target=_commit_and_die, args=(copy, at))
        process.start()
        process.join()
        codes.append(process.exitcode)
        assert state_of(copy) in (old, new)
        assert Repository.open(copy).verify() == []
        if process.exitcode == 0:
            break
    assert codes[0] == -signal.SIGKILL
    assert codes[-1] == 0


@pytest.mark.parametrize(
    ("number", "error"), [(28, StorageFull), (122, StorageFull), (13, Denied), (30, ReadOnly)]
)
def test_a_full_disk_or_a_refusal_at_every_step_is_told_and_harms_nothing(
    folders, clone, monkeypatch, number, error
):
    folder, old, new = folders

    def fail(name):
        raise OSError(number, os.strerror(number))

    copy, raised = clone(folder), 0
    for at in range(1, 60, 3):
        faulty = FaultyOS(at, fail)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", faulty)
            patch.setattr(local_store, "os", faulty)
            try:
                change(Repository.open(copy))
            except error as caught:
                raised += 1
                assert str(copy) in str(caught)
        if state_of(copy) == new:
            break
        assert state_of(copy) == old
        assert Repository.open(copy).verify() == []
    assert raised > 3
    assert Repository.open(copy).verify() == []


def test_a_folder_without_permission_is_read_only_in_one_line(local, monkeypatch):
    local.add("a", FILES)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ReadOnly, match="cannot be written") as caught:
        local.add("b", FILES)
    assert "\n" not in str(caught.value)
    assert local.read("a", "b.json") == b"{}"


def test_a_lost_answer_applies_nothing_twice(repository, monkeypatch):
    """The entry arrives, but the store says that it did not."""
    kind = type(repository.store)
    original = kind.publish
    monkeypatch.setattr(kind, "publish", lambda *args: bool(original(*args)) and False)
    repository.add("a", FILES)
    repository.update_info("a", {"k": 1})
    assert repository.generation == 2
    assert [c.changes[0].kind for c in repository.history()] == ["add", "info"]


def test_a_writer_that_is_always_beaten_gives_up(repository, monkeypatch):
    monkeypatch.setattr(committing, "PATIENCE", 0.01)
    monkeypatch.setattr(type(repository.store), "publish", lambda *_: False)
    with pytest.raises(Throttled, match="other writers were faster"):
        repository.add("a", {})


def _write(uri, writer, items):
    repository = Repository.open(uri)
    for number in range(items):
        repository.add(f"w{writer}/i{number}", {"f": b"%d %d" % (writer, number)})
        if number % 5 == 4:
            repository.refresh().remove(f"w{writer}/i{number - 1}")


def check_all_landed(uri, writers, items):
    repository = Repository.open(uri)
    removed = {n - 1 for n in range(items) if n % 5 == 4}
    assert set(repository) == {
        f"w{w}/i{n}" for w in range(writers) for n in range(items) if n not in removed
    }
    for name, item in repository.items().items():
        writer, number = name[1:].split("/i")
        assert repository.read(name, "f") == f"{writer} {number}".encode(), item
    history = repository.history()
    assert [c.generation for c in history] == list(range(1, repository.generation + 1))
    assert len({c.transaction for c in history}) == len(history) == writers * (items + items // 5)
    assert repository.verify() == []


def test_processes_that_write_at_once_lose_nothing(local):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(local.uri, w, 10)) for w in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    check_all_landed(local.uri, 4, 10)


def test_threads_that_write_at_once_lose_nothing(repository):
    if isinstance(repository.store, VirtualStore):
        writers, items = 8, 20
    else:
        writers, items = 3, 10
    threads = [
        threading.Thread(target=_write, args=(repository.uri, w, items)) for w in range(writers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_all_landed(repository.uri, writers, items)


def test_one_object_can_be_shared_by_threads(repository):
    def write(number):
        repository.add(f"i{number}", {"f": b"%d" % number})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(repository) == repository.generation == 12


def test_a_bug_in_a_change_is_not_swallowed(repository):
    with pytest.raises(StorageError), repository.batch() as batch:
        batch.remove("missing")
