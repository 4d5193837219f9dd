"""Readers while others write and gc deletes: nothing torn, nothing missing."""

import contextlib
import random
import threading
import time

import pytest

from mttl_storage import NotFound, Repository

GRACE = 3.0
"""Longer than a reader holds a view and a commit takes. Azure tells times in whole seconds."""
WRITERS = 2
READERS = 3
PAUSE = {"local": 0.05, "virtual": 0.05, "az": 0.5, "hf": 1.0}
"""Seconds between two steps of a writer. On the hub, gc deletes only while no one commits."""


def full(*numbers):
    return pytest.param(*numbers, marks=[pytest.mark.slow, pytest.mark.timeout(600)])


class Client:
    """Does a step again and again in a thread, with a repository object of its own."""

    def __init__(self, uri, step):
        self.steps, self.error = 0, None
        self._uri, self._step = uri, step
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _run(self):
        try:
            repository = Repository.open(self._uri)
            while not self._ended.is_set():
                self._step(repository)
                self.steps += 1
        except Exception as error:
            self.error = error


def pair(writer):
    """Two items that are always changed together, to the same content."""
    return [f"experts/w{writer}-{side}" for side in ("left", "right")]


def content(tag):
    """Files and info that belong together."""
    files = {"adapter_config.json": tag, "adapter_model.safetensors": tag * 1000}
    return files, {"tag": tag.decode()}


def writing(writer, pause):
    """A step that replaces a pair, and sometimes removes it and brings it back."""
    rng = random.Random(writer)

    def step(repository):
        new = content(b"%016x" % rng.getrandbits(64))
        with repository.batch() as batch:
            for name in pair(writer):
                batch.replace(name, *new)
        if rng.random() < 0.3:
            with repository.batch() as batch:
                for name in pair(writer):
                    batch.remove(name)
            with repository.batch() as batch:
                for name in pair(writer):
                    batch.restore(name)
        time.sleep(rng.uniform(0, pause))

    return step


def read_all(repository):
    """Read all that there is in the newest generation, and check that it belongs together."""
    began, found = time.monotonic(), {}
    for name, item in repository.refresh().items().items():
        try:
            files = {file: repository.read(name, file) for file in item.files}
        except NotFound:
            if time.monotonic() - began > GRACE:
                return  # too slow: gc was told that no one is
            raise
        tag = files["adapter_config.json"]
        assert (files, item.info) == content(tag), "torn"
        found[name] = tag
    for left, right in map(pair, range(WRITERS)):
        assert found.get(left) == found.get(right), "half a commit"


@pytest.mark.parametrize(
    ("scheme", "seconds"),
    [(scheme, 4.5) for scheme in PAUSE] + [full(scheme, 60) for scheme in PAUSE],
)
def test_readers_miss_nothing_while_others_write_and_gc_deletes(new_address, scheme, seconds):
    uri = new_address(scheme)
    repository = Repository.open(uri, create=True)
    for writer in range(WRITERS):
        with repository.batch() as batch:
            for name in pair(writer):
                batch.add(name, *content(b"0" * 16))
    deleted = []

    def collect(repository):
        deleted.append(repository.gc(grace=GRACE).files)
        time.sleep(0.2)

    steps = [writing(writer, PAUSE[scheme]) for writer in range(WRITERS)]
    clients = [Client(uri, step) for step in [*steps, *[read_all] * READERS, collect]]
    with contextlib.ExitStack() as running:
        for client in clients:
            running.enter_context(client)
        time.sleep(seconds)
    assert [client.error for client in clients] == [None] * len(clients)
    assert all(client.steps > 1 for client in clients)
    collect(repository)
    assert sum(deleted) > 0
    assert repository.verify() == []
    read_all(repository)
