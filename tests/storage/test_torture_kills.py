"""Processes that are killed while they write: nothing is lost, wrong or there twice."""

import contextlib
import itertools
import multiprocessing
import os
import random
import runpy
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from mttl_storage import Repository
from mttl_storage.testing import FaultyProxy

TASKS = str(Path(__file__).with_name("process_tasks.py"))
tasks = SimpleNamespace(**runpy.run_path(TASKS))

# Processes fork from one that has no threads and has imported all they need, which takes seconds.
processes = multiprocessing.get_context("forkserver")
stores = [f"mttl_storage.store.{module}" for module in ("local", "azure", "hub")]
processes.set_forkserver_preload(["pytest", *stores])
# Starting or joining a process asks after all that there are, which must not be done twice at once.
one_at_a_time = threading.Lock()

KILLED = -signal.SIGKILL
LONGEST = 0.1
"""Seconds from when a writer is chosen to be killed to when it is, at most."""


def start(task, *arguments, **environment):
    """A process at a task of process_tasks.py, and our end of the pipe to it."""
    ours, theirs = processes.Pipe()
    given = {
        "TASK": task,
        "ARGUMENTS": arguments,
        "ENVIRONMENT": {**os.environ, **environment},
        "TELL": theirs,
    }
    process = processes.Process(target=runpy.run_path, args=(TASKS, given, "__main__"))
    with one_at_a_time:
        process.start()
    theirs.close()
    return process, ours


def run_writer(uri, writer, items, kill_at=None, delay=0.0):
    """Let a writer add its items. It is killed some time after it has come to ``kill_at``.

    Returns:
        Its exit code, which is 0 if it was done before it could be killed.
    """
    process, pipe = start("write", uri, writer, items)
    with contextlib.suppress(EOFError):
        while pipe.recv() != kill_at:
            pass
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        while True:
            pipe.recv()
    with one_at_a_time:
        process.join()
    assert process.exitcode in (0, KILLED)
    return process.exitcode


def torture(uri, writers, items, kills):
    """Let writers add their items, killed and started again so often in all; how often it was."""

    def live(writer):
        rng = random.Random(f"{items} {writer}")
        times = kills // writers + (writer < kills % writers)
        done = 0
        for place in sorted(rng.choices(range(items - 1), k=times)):
            delay = rng.uniform(0, LONGEST)
            while run_writer(uri, writer, items, place, delay) != KILLED:
                delay = 0.0  # it was faster
            done += 1
        assert run_writer(uri, writer, items) == 0
        return done

    with ThreadPoolExecutor(writers) as pool:
        return sum(pool.map(live, range(writers)))


def check_all_landed_once(uri, writers, items):
    repository = Repository.open(uri)
    numbers = list(itertools.product(range(writers), range(items)))
    wanted = {tasks.name_of(*each): tasks.files_of(*each) for each in numbers}

    def is_right(name):
        return {f: repository.read(name, f) for f in repository.item(name).files} == wanted[name]

    for collected in (False, True):
        if collected:
            repository.gc(grace=0)
        lost = wanted.keys() - set(repository)
        assert not lost
        assert set(repository) == wanted.keys()
        with ThreadPoolExecutor(8) as pool:
            wrong = [
                n for n, right in zip(wanted, pool.map(is_right, wanted), strict=True) if not right
            ]
        assert not wrong
        assert repository.verify() == []
    history = repository.history()
    assert [commit.generation for commit in history] == list(range(1, repository.generation + 1))
    assert len({commit.transaction for commit in history}) == len(history) == len(wanted)
    changes = [(change.kind, change.name) for commit in history for change in commit.changes]
    assert sorted(changes) == sorted(("add", name) for name in wanted)
    return repository


def check_nothing_else_is_stored(repository):
    store = repository.store
    keys = {entry.key for entry in store.scan(store.items_folder)}
    assert {key for key in keys if store.items_folder or not key.startswith(".mttl/")} == {
        f"{store.item_folder(item.home, item.digest)}/{file}"
        for item in repository.items().values()
        for file in item.files
    }
    if store.on_disk:
        assert not list(store.local_path("").rglob(".mttl-tmp-*"))


def full(*numbers):
    return pytest.param(*numbers, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize(
    ("scheme", "writers", "items", "kills"),
    [
        ("local", 6, 10, 30),
        ("az", 4, 8, 10),
        ("hf", 4, 8, 10),
        full("local", 16, 60, 200),
        full("az", 8, 40, 60),
        full("hf", 8, 40, 60),
    ],
)
def test_writers_that_are_killed_lose_nothing(new_address, scheme, writers, items, kills):
    uri = new_address(scheme)
    Repository.open(uri, create=True)
    assert torture(uri, writers, items, kills) == kills
    repository = check_all_landed_once(uri, writers, items)
    check_nothing_else_is_stored(repository)


def test_sixteen_threads_that_write_in_memory_lose_nothing(new_address):
    uri = new_address("virtual")
    Repository.open(uri, create=True)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda writer: tasks.write(uri, writer, 60), range(16)))
    repository = check_all_landed_once(uri, 16, 60)
    check_nothing_else_is_stored(repository)


@pytest.fixture
def observed(request):
    """Makes, for a scheme, a function that watches its requests, and what a process needs for it.

    The function takes one to call before and after each request is handled, which waits for it.
    """
    with contextlib.ExitStack() as ended:

        def observe(scheme):
            if scheme == "hf":
                hub = request.getfixturevalue("hub")
                ended.callback(hub.on_request, None)
                return hub.on_request, {}
            azurite = request.getfixturevalue("azurite")
            proxy = ended.enter_context(FaultyProxy("127.0.0.1", azurite.port))
            connection = azurite.connection_string(port=proxy.port)
            return proxy.on_exchange, {"AZURE_STORAGE_CONNECTION_STRING": connection}

        yield observe


def state_of(repository):
    return {name: (i.digest, dict(i.info)) for name, i in repository.items().items()}


def new_library(uri):
    repository = Repository.open(uri, create=True)
    repository.add("experts/old", {"adapter_config.json": b"[1]"})
    return repository


@pytest.mark.parametrize(
    ("scheme", "size"), [("az", 3000), ("hf", 3000), full("az", 9_000_000), full("hf", 9_000_000)]
)
def test_sigkill_at_every_request_of_a_commit_leaves_the_old_or_the_new_state(
    observed, new_address, scheme, size
):
    """A file of 9 MB is several blocks on az; on the hub it is not held in memory."""
    watch, environment = observed(scheme)
    repository = new_library(new_address(scheme))
    old = state_of(repository)
    tasks.change(repository.uri, size)
    new = state_of(repository.refresh())
    seen = []
    for step in itertools.count(1):
        uri = new_library(new_address(scheme)).uri
        process, pipe = start("change", uri, size, **environment)
        moments = itertools.count(1)

        def strike(*_, process=process, moments=moments, step=step):
            if next(moments) == step:
                os.kill(process.pid, signal.SIGKILL)

        watch(strike)
        pipe.send("go")
        process.join()
        watch(None)
        repository = Repository.open(uri)
        found = state_of(repository)
        assert found in (old, new), f"step {step}"
        assert repository.verify() == [], f"step {step}"
        seen.append(found == new)
        tasks.change(uri, size)
        repository.gc(grace=0)
        assert state_of(repository.refresh()) == new
        assert repository.verify() == []
        check_nothing_else_is_stored(repository)
        if process.exitcode == 0:
            break
        assert process.exitcode == KILLED
    assert len(seen) > 12
    assert set(seen) == {False, True}
    assert seen[-1]
