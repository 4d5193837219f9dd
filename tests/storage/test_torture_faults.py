"""Connections that are reset, cut and stalled: each commit lands once and in time."""

import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from tenacity import wait_random

from mttl_storage import Repository, retrying
from mttl_storage.store import remote
from mttl_storage.testing import FaultyProxy

RESET, CUT, STALL = 0.25, 0.25, 0.15
LIMIT = 120
"""Seconds that a commit may take."""


def full(*numbers):
    return pytest.param(*numbers, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


def hurry(monkeypatch, scheme):
    """Let the clients give up a silent connection soon, and try again soon."""
    silent = 0.5
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=lambda seconds: None))
    for name in ("_pause", "_pause_if_broken"):
        monkeypatch.setattr(retrying, name, wait_random(0, 0.05))
    if scheme == "az":
        from mttl_storage.store import azure

        monkeypatch.setattr(azure, "SILENT_SECONDS", silent)
        return
    from huggingface_hub.utils import http_backoff

    from mttl_storage.store import hub_client

    for name in ("SILENT_SECONDS", "LONGEST_SILENT_SECONDS"):
        monkeypatch.setattr(hub_client, name, silent)
    for name, seconds in (("base_wait_time", 0.02), ("max_wait_time", 0.1)):
        monkeypatch.setitem(http_backoff.__kwdefaults__, name, seconds)


def spoil(hub, path, stall_seconds):
    """Let the hub itself do what a proxy does, with the same probabilities."""
    from mttl_storage.testing.hub import Cut, Reset, Stall

    left = 1.0  # of several rules that hit a request, the one added first happens to it
    for fault, probability in (
        (Reset(), RESET / 2),
        (Reset(after=True), RESET / 2),
        (Cut(), CUT),
        (Stall(stall_seconds, after=True), STALL),
    ):
        hub.faults.add(fault, path=path, probability=probability / left)
        left -= probability


@contextlib.contextmanager
def bad_azure(server, monkeypatch, stall_seconds):
    faults = {"reset": RESET, "cut": CUT, "stall": STALL, "stall_seconds": stall_seconds}
    with FaultyProxy("127.0.0.1", server.port, **faults) as proxy:
        connection = server.connection_string(port=proxy.port)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        yield


@contextlib.contextmanager
def bad_hub(server, monkeypatch, stall_seconds):
    spoil(server, "", stall_seconds)
    yield
    server.faults.clear()


@contextlib.contextmanager
def bad_way_to_the_hub(server, monkeypatch, stall_seconds):
    faults = {"reset": RESET, "cut": CUT, "stall": STALL, "stall_seconds": stall_seconds}
    port = int(server.endpoint.rpartition(":")[2])
    with FaultyProxy("127.0.0.1", port, **faults) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{proxy.port}")
        spoil(server, "^/lfs/", stall_seconds)  # on another host, to which no proxy leads
        yield
    server.faults.clear()


WAYS = {"az": bad_azure, "hf": bad_hub, "hf through a proxy": bad_way_to_the_hub}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("repositories", "commits", "real"), [(2, 1, False), full(4, 5, True)])
def test_every_commit_over_bad_connections_lands_once_and_in_time(
    request, new_address, monkeypatch, way, repositories, commits, real
):
    """The full version waits as long as the clients do; 60 s of silence are longer than that."""
    scheme = way.partition(" ")[0]
    uris = [new_address(scheme) for _ in range(repositories)]
    for uri in uris:
        Repository.open(uri, create=True)
    if not real:
        hurry(monkeypatch, scheme)

    def files(number):
        """The first has a file of several blocks on az, which is not held in memory on the hub."""
        weights = random.Random(number).randbytes(5_000_000 if number == 0 else 3000)
        return {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}

    def work(uri):
        """Commit and read; the seconds that each commit took."""
        took = []
        for number in range(commits):
            repository = Repository.open(uri)
            began = time.monotonic()
            repository.add(f"experts/e{number}", files(number))
            took.append(time.monotonic() - began)
        repository = Repository.open(uri)
        for number in range(commits):
            item = repository.item(f"experts/e{number}")
            assert {file: repository.read(item.name, file) for file in item.files} == files(number)
        return took

    server = request.getfixturevalue({"az": "azurite", "hf": "hub"}[scheme])
    with (
        monkeypatch.context() as patch,
        WAYS[way](server, patch, 60 if real else 2),
        ThreadPoolExecutor(repositories) as pool,
    ):
        took = [seconds for some in pool.map(work, uris) for seconds in some]
    for uri in uris:
        repository = Repository.open(uri)
        changes = [(c.kind, c.name) for commit in repository.history() for c in commit.changes]
        assert changes == [("add", f"experts/e{number}") for number in range(commits)]
        assert repository.verify() == []
    assert max(took) < LIMIT
