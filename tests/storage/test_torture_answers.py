"""Answers that are late, lost, cut or a refusal for now: how often and how long a store asks."""

import http.client
import http.server
import threading
import time
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from tenacity import wait_none

from mttl_storage import Repository, StorageError, Throttled, retrying
from mttl_storage.testing.hub_faults import Cut, Faults, Reset, Status

FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}
PUBLISH = {"az": {"method": "PUT", "path": "/log/"}, "hf": {"method": "POST", "path": "/commit/"}}
"""The request of a commit that makes it visible."""


def full(*numbers):
    return pytest.param(*numbers, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


class Front(http.server.ThreadingHTTPServer):
    """A server before Azurite, which the faults of a loopback hub befall."""

    daemon_threads = True

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port_of_azurite = port
        self.requests = []
        """Method and path of each request."""
        self.last_header = "Content-Length"
        self.faults = Faults()
        self.draw = self.faults.draw
        """Called with number, method and path of a request: what is to happen to it."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, front = unquote(urlsplit(self.path).path), self.server
        front.requests.append((self.command, path))
        fault = front.draw(len(front.requests), self.command, path)
        if isinstance(fault, Status):
            wait = [("Retry-After", str(fault.retry_after))] if fault.retry_after else []
            self.send(fault.code, [("Content-Length", "0"), *wait], b"")
            return
        there = http.client.HTTPConnection("127.0.0.1", front.port_of_azurite)
        if fault != Reset(after=False):
            there.request(self.command, self.path, body, dict(self.headers))
            answer = there.getresponse()
            data = answer.read()
            there.close()
        if isinstance(fault, Reset):
            self.close_connection = True
            return
        left_out = ("transfer-encoding", "content-length", "connection", "keep-alive")
        headers = [each for each in answer.getheaders() if each[0].lower() not in left_out]
        headers.append(("Content-Length", answer.headers.get("Content-Length") or str(len(data))))
        headers.sort(key=lambda each: each[0] == front.last_header)
        self.send(answer.status, headers, data, fault.keep if isinstance(fault, Cut) else 1.0)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status, headers, body, keep=1.0):
        lines = [f"HTTP/1.1 {status} said", *(f"{name}: {value}" for name, value in headers)]
        whole = "\r\n".join([*lines, "", ""]).encode() + body
        self.close_connection = self.close_connection or keep < 1
        self.wfile.write(whole[: int(keep * len(whole))])

    def log_message(self, *_):
        pass


@pytest.fixture
def front(azurite, monkeypatch):
    with Front(azurite.port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        connection = azurite.connection_string(port=server.server_port)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["az", "hf"])
def server(request, new_address):
    """An address, with the faults and the requests of its server, and what publishes a commit."""
    uri = new_address(request.param)
    its = request.getfixturevalue({"az": "front", "hf": "hub"}[request.param])
    publish = PUBLISH[request.param]

    def published():
        return sum(
            method == publish["method"] and publish["path"] in path for method, path in its.requests
        )

    yield SimpleNamespace(uri=uri, its=its, faults=its.faults, publish=publish, published=published)
    its.faults.clear()


@pytest.fixture
def repository(server):
    made = Repository.open(server.uri, create=True)
    server.its.requests.clear()
    return made


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_store_is_asked_again_when_it_says_and_not_before(server, repository, code):
    busy = Status(code, retry_after=1)
    server.faults.add(busy, times=1, **server.publish)
    began = time.monotonic()
    repository.add("experts/a", FILES)
    assert 1 <= time.monotonic() - began < 10
    assert server.published() == 2
    server.faults.add(busy, times=1, method="GET", path="/adapter_config.json")
    began = time.monotonic()
    assert repository.read("experts/a", "adapter_config.json") == b"{}"
    assert 1 <= time.monotonic() - began < 10
    assert repository.generation == 1


def test_a_commit_whose_answer_is_lost_is_not_made_twice(server, repository):
    other = {**FILES, "adapter_config.json": b"[2]"}
    for change in (
        lambda: repository.add("experts/a", FILES),
        lambda: repository.replace("experts/a", other),
        lambda: repository.update_info("experts/a", {"k": 1}),
        lambda: repository.rename("experts/a", "experts/b"),
        lambda: repository.remove("experts/b"),
        lambda: repository.restore("experts/b"),
    ):
        server.faults.add(Reset(after=True), nth=1, **server.publish)
        change()
    history = Repository.open(server.uri).history()
    kinds = [change.kind for commit in history for change in commit.changes]
    assert kinds == ["add", "replace", "info", "rename", "remove", "restore"]
    assert len({commit.transaction for commit in history}) == repository.generation == 6
    assert len(server.faults.fired) >= 6
    assert repository.read("experts/b", "adapter_config.json") == b"[2]"
    assert repository.verify() == []


def test_a_commit_that_breaks_on_the_way_is_sent_again(server, repository):
    """The client of the hub sends it once."""
    for number, fault in enumerate([Status(500), Reset(), Status(502), Cut(0.5)], start=1):
        server.faults.add(fault, nth=number, **server.publish)
    repository.add("experts/a", FILES)
    assert 4 <= server.published() <= 5  # not again, if the cut answer is found to have been right
    assert [commit.generation for commit in repository.history()] == [1]
    assert repository.verify() == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Status(429, retry_after=30), Throttled),
        (Status(503), Throttled),
        (Reset(), StorageError),
    ],
)
def test_patience_ends_with_one_line_that_names_the_address(
    server, repository, monkeypatch, fault, error
):
    repository.add("experts/a", FILES)
    monkeypatch.setattr(retrying, "PATIENCE", 0.3)
    for match, action in (
        ({}, lambda: Repository.open(server.uri)),
        (server.publish, lambda: repository.add("experts/b", FILES)),
    ):
        server.faults.add(fault, **match)
        began = time.monotonic()
        with pytest.raises(error) as caught:
            action()
        assert time.monotonic() - began < 10
        assert type(caught.value) is error
        assert server.uri in str(caught.value)
        assert "\n" not in str(caught.value)
        server.faults.clear()
    repository.add("experts/b", FILES)
    assert list(Repository.open(server.uri)) == ["experts/a", "experts/b"]


@pytest.mark.parametrize("last", ["Content-Length", "Date"])
@pytest.mark.parametrize("places", [2, full(100)])
def test_an_answer_cut_at_any_place_is_asked_for_again(
    front, new_address, monkeypatch, places, last
):
    """Every answer is cut once, also within its headers: http.client takes that for their end.

    The headers of Azurite end with the length of the body, those of Azure with the date.
    """
    front.last_header = last
    monkeypatch.setattr(retrying, "_pause", wait_none())
    monkeypatch.setattr(retrying, "_pause_if_broken", wait_none())
    for place in range(places):
        uri, seen = new_address("az"), set()

        def cut_once(_, method, path, keep=(place + 0.5) / places, seen=seen):
            first = (method, path) not in seen
            seen.add((method, path))
            return Cut(keep) if first else None

        front.draw = cut_once
        repository = Repository.open(uri, create=True)
        repository.add("experts/a", FILES, {"k": 1})
        repository.replace("experts/a", {"adapter_config.json": b"[2]"})
        repository.add("experts/b", FILES)
        repository.remove("experts/b")
        repository.gc(grace=0)
        again = Repository.open(uri)
        assert list(again.items()) == ["experts/a"], place
        assert again.read("experts/a", "adapter_config.json") == b"[2]"
        assert again.item("experts/a").info == {"k": 1}
        assert [len(commit.changes) for commit in again.history()] == [1] * 5
        assert again.verify() == [], place
        files = [key for key in again.store.find("") if not key.startswith(".mttl/")]
        assert len(files) == 1, place
