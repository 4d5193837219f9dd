"""A Hugging Face hub on the loopback interface, for tests of anything that stores on the hub.

The unmodified client of ``huggingface_hub`` accepts it. It needs the extra ``[testing]``, keeps all
in memory, and can be told to fail. Xet is not spoken: the client uploads LFS objects over HTTP only
if it is given open files, or if ``HF_HUB_DISABLE_XET`` is set. ::

    with LoopbackHub(tokens={"hf_writer": "write"}) as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_writer")
        api.create_repo("user/library")
        hub.faults.add(Reset(after=True), method="POST", path="/commit/", nth=1)
        ...
        assert hub.files("user/library")["notes.txt"] == b"hello"
"""

import asyncio
import socket
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import uvicorn

from mttl_storage.testing.hub_api import hub_app, storage_app
from mttl_storage.testing.hub_faults import (
    Cut,
    Fault,
    Faults,
    Fired,
    Flip,
    Reset,
    Short,
    Stall,
    Status,
    Wrong,
)
from mttl_storage.testing.hub_gate import Connections, Gate, OnRequest
from mttl_storage.testing.hub_lfs import LargeFiles
from mttl_storage.testing.hub_repos import MAIN, Commit, Repo
from mttl_storage.testing.hub_state import MEGABYTE, HubState, Options, Role

__all__ = [
    "Commit",
    "Cut",
    "Fault",
    "Faults",
    "Fired",
    "Flip",
    "LoopbackHub",
    "Reset",
    "Short",
    "Stall",
    "Status",
    "Wrong",
]


class LoopbackHub:
    """A hub on a free port of 127.0.0.1, in a thread of this process, while the with-block runs.

    LFS objects lie on another host, as on the real hub: ``localhost`` on a second port. What a test
    sees of it may be read from any thread.
    """

    endpoint: str
    """Where it is, for HF_ENDPOINT or ``HfApi(endpoint=...)``."""
    faults: Faults
    """What is to go wrong."""

    def __init__(
        self,
        tokens: Mapping[str, Role] | None = None,
        *,
        user: str = "user",
        page_size: int = 1000,
        regular_limit: int = 10 * MEGABYTE,
        multipart_threshold: int = 64 * MEGABYTE,
        part_size: int = 16 * MEGABYTE,
        seed: int = 0,
    ) -> None:
        """Describe a hub.

        Args:
            tokens: Tokens and what they allow, "read" or "write"; any other is refused.
            user: Whose tokens they are.
            page_size: Entries a page of a listing, at most. 50 where the real hub has so few.
            regular_limit: A file of more bytes is an LFS object whatever its name.
            multipart_threshold: An LFS object of more bytes is uploaded in parts.
            part_size: Bytes of each such part.
            seed: What the faults with a probability depend on.
        """
        self.faults = Faults(seed)
        self._options = Options(
            tokens=dict(tokens or {}),
            user=user,
            page_size=page_size,
            regular_limit=regular_limit,
            multipart_threshold=multipart_threshold,
            part_size=part_size,
        )

    def __enter__(self) -> Self:
        """Start it."""
        hub_socket, storage_socket = _listening(), _listening()
        port, storage_port = (each.getsockname()[1] for each in (hub_socket, storage_socket))
        self.endpoint = f"http://127.0.0.1:{port}"
        self._state = HubState(self._options, self.endpoint, f"http://localhost:{storage_port}")
        large_files = LargeFiles(self._state)
        connections = Connections()
        apps = {port: hub_app(self._state, large_files), storage_port: storage_app(large_files)}
        self._gate = Gate(apps, storage_port, self.faults, connections)
        config = uvicorn.Config(
            self._gate,
            http=connections.protocol(),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=75,
        )
        self._server = uvicorn.Server(config)
        self._sockets = [hub_socket, storage_socket]
        self._thread = threading.Thread(target=self._run, name="loopback-hub", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it, and what it is still doing."""
        self._gate.stop()
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        serving = asyncio.create_task(self._server.serve(self._sockets))
        await self._gate.wait_for_stop()
        # Asked to end, the server would take 0.2 seconds for it.
        serving.cancel()
        if open_requests := set(self._server.server_state.tasks):
            await asyncio.wait(open_requests, timeout=1)
        for server in self._server.servers:
            server.close()
        for listener in self._sockets:
            listener.close()

    @property
    def storage_endpoint(self) -> str:
        """Where the LFS objects are."""
        return self._state.storage_endpoint

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Method and unquoted path, without query, of every request so far; clear it at will."""
        return self._gate.requests

    @property
    def violations(self) -> Sequence[str]:
        """Requests that no client may make: those with a token to the host of the objects."""
        return tuple(self._gate.violations)

    def on_request(self, callback: OnRequest | None) -> None:
        """Call something before and after each request is handled, in the thread of the hub.

        "before" nothing is done yet; "after" all is done and nothing of the answer is sent. It gets
        the moment, the number of the request from 1, the method and the path. None: call nothing.
        """
        self._gate.on_request = callback

    def commits(self, name: str, *, revision: str = MAIN, kind: str = "model") -> list[Commit]:
        """The commits of a branch, tag or commit, oldest first."""
        return list(self._repo(name, kind).revision(revision).line())[::-1]

    def files(self, name: str, *, revision: str = MAIN, kind: str = "model") -> dict[str, bytes]:
        """The path and the content of every file, ``.gitattributes`` among them."""
        tree = self._repo(name, kind).revision(revision).tree
        return {path: blob.content for path, blob in tree.blobs()}

    def _repo(self, name: str, kind: str) -> Repo:
        if (kind, name) not in self._state.repos:
            raise LookupError(
                f"this hub has no {kind} {name!r}; it has {sorted(self._state.repos)}"
            )
        return self._state.repos[kind, name]


def _listening() -> socket.socket:
    """A socket that takes connections at once, so that nobody has to wait for the server."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    listener.setblocking(False)
    # Inherited by what it accepts. The server writes head and body apart: 40 ms a request without.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
