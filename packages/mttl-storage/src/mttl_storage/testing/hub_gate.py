"""What every request to a loopback hub passes: the log, the caller's hook, and the faults.

An answer is complete before any of it is sent, so that a fault can befall each step by itself.
"""

import asyncio
import itertools
import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mttl_storage.testing.hub_faults import Cut, Faults, Flip, Reset, Short, Stall, Status, Wrong

Moment = Literal["before", "after"]
OnRequest = Callable[[Moment, int, str, str], None]
_PIECE = 256 * 1024
_LENGTH = b"content-length"
_CLOSE_WITH_RESET = struct.pack("ii", 1, 0)


class Connections:
    """The open connections of a server, to be reset or closed from inside a request."""

    def __init__(self) -> None:
        """Start with none."""
        self._transports: dict[tuple[Any, Any], asyncio.Transport] = {}

    def protocol(self) -> type[H11Protocol]:
        """What the server is to speak: HTTP, noting each connection here."""
        transports = self._transports

        class Noted(H11Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                super().connection_made(transport)
                transports[self.client, self.server] = transport

            def connection_lost(self, exc: Exception | None) -> None:
                transports.pop((self.client, self.server), None)
                super().connection_lost(exc)

        return Noted

    def abort(self) -> None:
        """Break all of them off."""
        for transport in list(self._transports.values()):
            transport.abort()

    async def reset(self, scope: Scope, receive: Receive) -> None:
        """Make the client see that the connection was reset."""
        if transport := self._transports.get((scope["client"], scope["server"])):
            peer: socket.socket = transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITH_RESET)
            transport.abort()
        await _gone(receive)

    async def close(self, scope: Scope, receive: Receive) -> None:
        """Close the connection once what was written to it is sent."""
        if transport := self._transports.get((scope["client"], scope["server"])):
            transport.close()
        await _gone(receive)


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def with_body(self, body: bytes) -> "_Answer":
        """The same answer about another body."""
        headers = [each for each in self.headers if each[0].lower() != _LENGTH]
        return _Answer(self.status, [*headers, (_LENGTH, str(len(body)).encode())], body)


class Gate:
    """An ASGI application that hands each request to the application of the port it came to."""

    def __init__(
        self,
        apps: Mapping[int, ASGIApp],
        tokenless: int,
        faults: Faults,
        connections: Connections,
    ) -> None:
        """Take the application of each port, and the port where no token may ever arrive."""
        self._apps = apps
        self._tokenless = tokenless
        self._faults = faults
        self._connections = connections
        self._numbers = itertools.count(1)
        self._running = threading.Event()
        self.requests: list[tuple[str, str]] = []
        self.violations: list[str] = []
        self.on_request: OnRequest | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        number, method, path = next(self._numbers), scope["method"], scope["path"]
        port = scope["server"][1]
        self.requests.append((method, path))
        self._tell("before", number, method, path)
        if port == self._tokenless and any(key == b"authorization" for key, _ in scope["headers"]):
            self.violations.append(f"{method} {path} came with an Authorization header")
            await _send(send, await _refused(receive, 400, "Only one way to authorize is allowed"))
            return
        fault = self._faults.draw(number, method, path)
        match fault:
            case Reset(after=False):
                await self._connections.reset(scope, receive)
                return
            case Status():
                await _send(send, await _injected(receive, fault))
                return
            case Stall(after=False):
                if await self._stalled(fault.seconds):
                    await _gone(receive)
                    return
            case Flip(request=True):
                receive = _flipped_request(receive, fault.position)
        # Routing sees the path as it was sent, so that a %2F does not end a part of it.
        inner = {**scope, "path": scope["raw_path"].decode("ascii")}
        try:
            answer = await _answer_of(self._apps[port], inner, receive)
        except ClientDisconnect:
            return
        self._tell("after", number, method, path)
        match fault:
            case Reset(after=True):
                await self._connections.reset(scope, receive)
                return
            case Cut():
                length = int(len(answer.body) * fault.keep)
                await _send(send, replace(answer, body=answer.body[:length]), complete=False)
                await self._connections.close(scope, receive)
                return
            case Stall(after=True):
                if await self._stalled(fault.seconds):
                    await _gone(receive)
                    return
            case Flip(request=False):
                answer = replace(answer, body=_flipped(answer.body, fault.position))
            case Short():
                answer = answer.with_body(answer.body[: int(len(answer.body) * fault.keep)])
            case Wrong():
                answer = answer.with_body(fault.body)
        await _send(send, answer)

    async def wait_for_stop(self) -> None:
        """Wait for a call of ``stop``, in the loop that the requests run in."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._running.set()
        await self._stopped.wait()

    def stop(self) -> None:
        """Break off what is stalled, and every connection, from any thread."""
        self._running.wait()
        self._loop.call_soon_threadsafe(self._connections.abort)
        self._loop.call_soon_threadsafe(self._stopped.set)

    async def _stalled(self, seconds: float) -> bool:
        """Wait, and say whether the hub was stopped in between."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)
        return self._stopped.is_set()

    def _tell(self, moment: Moment, number: int, method: str, path: str) -> None:
        if self.on_request:
            self.on_request(moment, number, method, path)


async def _answer_of(app: ASGIApp, scope: Scope, receive: Receive) -> _Answer:
    start: Message = {}
    pieces: list[bytes] = []

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, collect)
    body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    return _Answer(start["status"], list(start["headers"]), body)


async def _send(send: Send, answer: _Answer, *, complete: bool = True) -> None:
    start = {"status": answer.status, "headers": answer.headers}
    await send({"type": "http.response.start", **start})
    for at in range(0, len(answer.body), _PIECE):
        piece = answer.body[at : at + _PIECE]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    if complete:
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _injected(receive: Receive, fault: Status) -> _Answer:
    headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
    if fault.error_code:
        headers["X-Error-Code"] = fault.error_code
    return await _refused(receive, fault.code, fault.message, headers)


async def _refused(
    receive: Receive, status: int, message: str, more: Mapping[str, str] | None = None
) -> _Answer:
    """An error for a request that is not handled, once it has come in full."""
    await _whole(receive)
    body = json.dumps({"error": message}).encode()
    headers = {"Content-Type": "application/json", "X-Error-Message": message, **(more or {})}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    return _Answer(status, encoded, b"").with_body(body)


async def _whole(receive: Receive) -> bytes:
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    return b"".join(pieces)


def _flipped_request(receive: Receive, position: float) -> Receive:
    async def flipped() -> Message:
        body = _flipped(await _whole(receive), position)
        return {"type": "http.request", "body": body, "more_body": False}

    return flipped


def _flipped(body: bytes, position: float) -> bytes:
    if not body:
        return body
    changed = bytearray(body)
    changed[min(int(len(body) * position), len(body) - 1)] ^= 1
    return bytes(changed)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
