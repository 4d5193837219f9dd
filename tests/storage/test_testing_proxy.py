"""Each fault of the proxy, seen by a client that counts bytes."""

import contextlib
import http.client
import http.server
import socket
import threading
import time
from pathlib import Path

import pytest

from mttl_storage.testing import FaultyProxy

BODY = bytes(range(256)) * 4096  # 1 MiB


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append(self.path)
        body = BODY if self.path == "/large" else self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        self.server.seen.append(self.path)
        size = len(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.send_header("X-Size", str(size))
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        server.seen = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def proxied(server, **faults):
    return FaultyProxy("127.0.0.1", server.server_port, **faults)


@contextlib.contextmanager
def connected(proxy, timeout=10):
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=timeout)
    try:
        yield connection
    finally:
        connection.close()


def get(connection, path):
    connection.request("GET", path)
    return connection.getresponse().read()


def test_without_faults_everything_passes_and_each_request_is_an_exchange(server):
    with proxied(server) as proxy, connected(proxy) as connection:
        for number in range(20):
            assert get(connection, f"/{number}") == f"/{number}".encode()
        assert get(connection, "/large") == BODY
        connection.request("PUT", "/put", body=BODY * 3)
        assert connection.getresponse().headers["X-Size"] == str(3 * len(BODY))
        assert proxy.exchanges == 22
        assert not proxy.done


def test_a_reset_comes_before_the_server_sees_the_request_or_instead_of_its_answer(server):
    with proxied(server, reset=1.0) as proxy:
        for number in range(40):
            with connected(proxy) as connection, pytest.raises(ConnectionResetError):
                get(connection, f"/{number}")
        assert proxy.done["reset"] == proxy.exchanges == 40
        assert len(server.seen) == proxy.done["lost"]
        assert 10 < len(server.seen) < 30


@pytest.mark.parametrize("path", ["/small", "/large"])
def test_a_cut_answer_is_a_part_of_it_and_then_the_end(server, path):
    lengths = set()
    with proxied(server) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as whole:
        whole.sendall(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        length = len(read_all(whole))
        proxy.cut = 1.0
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", proxy.port)) as client:
                client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
                lengths.add(len(read_all(client)))
        assert proxy.done == {"cut": 10}
    assert max(lengths) < length
    assert len(lengths) > 5
    assert max(lengths) > length / 2 > min(lengths)


def test_a_stalled_answer_comes_late_on_an_open_connection(server):
    with proxied(server, stall=1.0, stall_seconds=0.3) as proxy, connected(proxy) as connection:
        began = time.monotonic()
        assert get(connection, "/late") == b"/late"
        assert 0.3 <= time.monotonic() - began < 5
        proxy.stall_seconds = 3600
        with connected(proxy, timeout=0.2) as impatient, pytest.raises(TimeoutError):
            get(impatient, "/never")
        assert server.seen[-1] == "/never"
        assert proxy.done == {"stall": 2}


def fates(server, seed, number=60):
    seen = []
    with proxied(server, seed=seed, reset=0.25, cut=0.25, stall=0.15, stall_seconds=0.0) as proxy:
        for _ in range(number):
            before = proxy.done.copy()
            with (
                connected(proxy) as connection,
                contextlib.suppress(OSError, http.client.HTTPException),
            ):
                get(connection, "/x")
            seen.append(tuple(proxy.done - before))
    return seen


def test_the_same_seed_gives_the_same_faults(server):
    assert fates(server, 1) == fates(server, 1)
    assert fates(server, 1) != fates(server, 2)


def test_faults_strike_connections_that_are_kept_open(server):
    with proxied(server, seed=3, reset=0.1) as proxy, connected(proxy) as connection:
        fine = 0
        with pytest.raises(ConnectionResetError):
            while True:
                get(connection, "/again")
                fine += 1
        assert fine > 0


def test_probabilities_can_be_set_at_any_time(server):
    with proxied(server) as proxy, connected(proxy) as connection:
        get(connection, "/fine")
        proxy.reset = 1.0
        with pytest.raises(ConnectionResetError):
            get(connection, "/faulty")
        proxy.reset = 0.0
        connection.close()
        assert get(connection, "/fine") == b"/fine"


def test_a_callback_is_told_before_the_server_and_before_the_client_see_anything(server):
    seen = []
    with proxied(server) as proxy, connected(proxy) as connection:
        proxy.on_exchange(lambda *told: seen.append((*told, len(server.seen))))
        for _ in range(2):
            get(connection, "/x")
    assert seen == [("before", 1, 0), ("after", 1, 1), ("before", 2, 1), ("after", 2, 2)]


def test_an_error_in_a_callback_is_raised_at_the_end(server):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), proxied(server) as proxy:
        proxy.on_exchange(fail)
        with connected(proxy) as connection, pytest.raises(http.client.RemoteDisconnected):
            get(connection, "/x")


def read_all(client):
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


@pytest.fixture
def echo():
    """A server that answers only once the client has closed its half."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.sendall(read_all(client)[::-1])

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_a_half_closed_connection_still_gets_its_answer(echo):
    with (
        FaultyProxy("127.0.0.1", echo) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port)) as client,
    ):
        client.sendall(BODY)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == BODY[::-1]


def test_a_server_that_is_not_there_ends_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with (
        FaultyProxy("127.0.0.1", port) as proxy,
        connected(proxy) as connection,
        pytest.raises(ConnectionError),
    ):
        get(connection, "/x")


def test_nothing_is_left_open(server):
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    threads, files = threading.active_count(), open_files()
    clients = []
    with proxied(server, seed=5, stall=0.5, stall_seconds=3600) as proxy:
        for _ in range(20):
            clients.append(client := socket.create_connection(("127.0.0.1", proxy.port)))
            client.sendall(b"GET /x HTTP/1.1\r\n\r\n")
        while proxy.done["stall"] < 5:
            time.sleep(0.01)
    for client in clients:
        with contextlib.suppress(ConnectionResetError):
            read_all(client)  # ends, as the proxy closed it
        client.close()
    give_up = time.monotonic() + 5
    while (threading.active_count(), open_files()) > (threads, files):  # the server's own
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_many_busy_clients_are_carried_well(server):
    failures = []

    def work(proxy):
        with connected(proxy) as connection:
            for _ in range(20):
                if get(connection, "/large") != BODY:
                    failures.append(1)

    with proxied(server) as proxy:
        threads = [threading.Thread(target=work, args=(proxy,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert proxy.exchanges == 160
    assert not failures
