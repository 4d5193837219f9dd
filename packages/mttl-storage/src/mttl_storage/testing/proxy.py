"""A TCP proxy that resets, cuts and stalls connections, for tests of clients that must bear it."""

import asyncio
import collections
import contextlib
import functools
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple, NoReturn

BURST = 1 << 18
"""Bytes moved at once."""
WHOLE = 1 << 20
"""Bytes of an answer to wait for before a part of it is sent."""
QUIET = 0.02
"""Seconds after which an answer that is to be cut is taken to be complete."""

Callback = Callable[[str, int], object]


class _Exchange(NamedTuple):
    """One request and its answer, and what is to happen to them."""

    number: int
    fault: str = ""
    late: bool = False
    """For a reset: only once the server has answered."""
    part: float = 0.0
    """For a cut: of the answer."""


class FaultyProxy:
    """A proxy on a free port of 127.0.0.1 in front of one server, for as long as a block runs.

    ::

        with FaultyProxy("127.0.0.1", azurite.port, seed=1, reset=0.25, cut=0.25) as proxy:
            address = azurite.endpoint(port=proxy.port)

    Clients keep connections open, so what goes wrong is decided for each exchange: what the client
    sends first, or sends once an answer has begun, is a new one. One of these happens to it:

    - ``reset``: the client gets a RST. In half of the cases the server has never seen the request;
      in the others it has answered, and only the answer is lost (also counted as ``lost``).
    - ``cut``: the client gets a part of the answer, and then the connection is closed.
    - ``stall``: the answer comes ``stall_seconds`` late, while the connection stays open.

    The n-th exchange of a proxy has the same fate in every run with the same seed and
    probabilities. These are attributes that can be set at any time.
    """

    def __init__(
        self,
        host: str,
        port: int,
        seed: int = 0,
        reset: float = 0.0,
        cut: float = 0.0,
        stall: float = 0.0,
        stall_seconds: float = 60.0,
    ) -> None:
        """Nothing listens yet.

        Args:
            host: of the server.
            port: of the server.
            seed: of what happens to which exchange.
            reset: probability.
            cut: probability.
            stall: probability; the three sum to at most 1.
            stall_seconds: how long an answer is held back.
        """
        self._server = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._random = random.Random(seed)  # noqa: S311 - to be repeatable
        self.reset, self.cut, self.stall = reset, cut, stall
        self.stall_seconds = stall_seconds
        self.port = 0
        self.exchanges = 0
        """How many exchanges have begun."""
        self.done: collections.Counter[str] = collections.Counter()
        """How often each fault has happened."""
        self._callback: Callback | None = None
        self._errors: list[Exception] = []

    def on_exchange(self, callback: Callback | None) -> None:
        """Call ``callback(moment, number)`` around each exchange; exchanges count from 1.

        The moment is "before" a request is passed on to the server, or "after" the server has begun
        to answer and before the client sees any of it. The whole proxy waits for the callback. An
        error in it is raised at the end of the block.
        """
        self._callback = callback

    def __enter__(self) -> "FaultyProxy":
        """Listen."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._serving = self._loop.create_task(self._serve(listener))
        self._thread = threading.Thread(target=self._run, name="faulty-proxy", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Close every connection, and raise what a callback raised."""
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()
        if self._errors and error[0] is None:
            raise self._errors[0]

    def _run(self) -> None:
        with contextlib.closing(self._loop), contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serving)

    async def _serve(self, listener: socket.socket) -> None:
        with listener:
            async with asyncio.TaskGroup() as connections:
                while True:
                    client, _ = await self._loop.sock_accept(listener)
                    task = connections.create_task(self._connect(client))
                    # Not in the task, which can be cancelled before it has begun.
                    task.add_done_callback(functools.partial(_close, client))

    async def _connect(self, client: socket.socket) -> None:
        family, kind, protocol, _, address = self._server
        with socket.socket(family, kind, protocol) as server:
            for each in (client, server):
                each.setblocking(False)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await self._loop.sock_connect(server, address)
                connection = _Connection(self, client, server)
                async with asyncio.TaskGroup() as both:
                    both.create_task(connection.pass_requests())
                    both.create_task(connection.pass_answers())
            except* OSError:  # either side hung up, or we do
                pass
            except* Exception as errors:
                self._errors += errors.exceptions

    def _next_exchange(self) -> _Exchange:
        chance, late, part = (self._random.random() for _ in range(3))
        self.exchanges += 1
        for fault in ("reset", "cut", "stall"):
            chance -= getattr(self, fault)
            if chance < 0:
                return _Exchange(self.exchanges, fault, late < 0.5, part)
        return _Exchange(self.exchanges)

    def _tell(self, moment: str, exchange: _Exchange) -> None:
        if self._callback:
            self._callback(moment, exchange.number)


class _Connection:
    """One client's connection and the one to the server that it stands for."""

    def __init__(self, proxy: FaultyProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._loop = asyncio.get_running_loop()
        self._exchange = _Exchange(0)
        self._answered = True

    async def pass_requests(self) -> None:
        while data := await self._loop.sock_recv(self._client, BURST):
            if self._answered:
                self._answered, self._exchange = False, self._proxy._next_exchange()
                self._proxy._tell("before", self._exchange)
                if self._exchange.fault == "reset" and not self._exchange.late:
                    self._reset()
            await self._loop.sock_sendall(self._server, data)
        self._server.shutdown(socket.SHUT_WR)

    async def pass_answers(self) -> None:
        while data := await self._loop.sock_recv(self._server, BURST):
            if not self._answered:
                self._answered = True
                self._proxy._tell("after", self._exchange)
                await self._spoil(self._exchange, data)
            await self._loop.sock_sendall(self._client, data)
        self._client.shutdown(socket.SHUT_WR)

    async def _spoil(self, exchange: _Exchange, data: bytes) -> None:
        """Do what is to happen to an answer, of which ``data`` is the beginning."""
        if exchange.fault == "reset":
            self._proxy.done["lost"] += 1
            self._reset()
        if exchange.fault == "cut":
            self._proxy.done["cut"] += 1
            data = await self._rest_of(data)
            await self._loop.sock_sendall(self._client, data[: int(exchange.part * len(data))])
            self._client.shutdown(socket.SHUT_WR)
            raise ConnectionAbortedError
        if exchange.fault == "stall":
            self._proxy.done["stall"] += 1
            await asyncio.sleep(self._proxy.stall_seconds)

    async def _rest_of(self, data: bytes) -> bytes:
        with contextlib.suppress(TimeoutError):
            while len(data) < WHOLE:
                async with asyncio.timeout(QUIET):
                    more = await self._loop.sock_recv(self._server, BURST)
                if not more:
                    break
                data += more
        return data

    def _reset(self) -> NoReturn:
        self._proxy.done["reset"] += 1
        linger_not = struct.pack("ii", 1, 0)
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
        raise ConnectionResetError


def _close(client: socket.socket, _: object) -> None:
    client.close()
