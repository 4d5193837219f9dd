"""The real Azurite, which serves Azure Blob Storage on this machine while a block runs."""

import base64
import contextlib
import datetime
import os
import re
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from mttl_storage.testing.node import find_node, npm_package

VERSION = "3.37.0"
ACCOUNT = "mttltest"
"""The name of the account that there is by default."""
PATIENCE = 60.0
"""Seconds that Azurite may take to start."""

# Its input is a pipe that the kernel closes when this process ends, however it ends. Reading that
# alone keeps nothing alive (unref).
_RUN = "process.stdin.on('end', () => process.exit()).resume().unref(); require(process.argv[1])"
_OPTIONS = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--silent", "--disableTelemetry"]


class Azurite:
    """Azurite on a free port of 127.0.0.1.

    ::

        with Azurite() as azurite:
            service = BlobServiceClient(azurite.endpoint(), credential=azurite.key())
    """

    def __init__(
        self,
        accounts: Mapping[str, str] | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """Nothing is started or installed yet.

        Args:
            accounts: names, each with its base64 key; by default "mttltest" with a new key.
            folder: where to keep the data; by default it stays in memory.
        """
        self._accounts = dict(
            accounts or {ACCOUNT: base64.b64encode(secrets.token_bytes(32)).decode()}
        )
        self._folder = None if folder is None else Path(folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._log = ""
        self.port = 0

    def __repr__(self) -> str:
        """Where it answers, and for which accounts, without their keys."""
        return f"Azurite(port={self.port}, accounts={sorted(self._accounts)})"

    def endpoint(self, account: str = ACCOUNT, port: int | None = None) -> str:
        """The address of an account, or the same behind a proxy that listens on ``port``."""
        self.key(account)
        return f"http://127.0.0.1:{port or self.port}/{account}"

    def key(self, account: str = ACCOUNT) -> str:
        """The key of an account."""
        if account not in self._accounts:
            raise LookupError(
                f"this Azurite has no account {account!r}; it has {sorted(self._accounts)}"
            )
        return self._accounts[account]

    def connection_string(self, account: str = ACCOUNT, port: int | None = None) -> str:
        """What goes into AZURE_STORAGE_CONNECTION_STRING, with the key."""
        return (
            f"DefaultEndpointsProtocol=http;AccountName={account};AccountKey={self.key(account)};"
            f"BlobEndpoint={self.endpoint(account, port)};"
        )

    def sas(
        self,
        account: str = ACCOUNT,
        container: str | None = None,
        permissions: str = "racwdl",
        expiry: datetime.datetime | None = None,
    ) -> str:
        """A shared access signature, without a question mark.

        Args:
            account: that signs.
            container: that it is for; None for the whole account.
            permissions: one letter each: read, add, create, write, delete, list.
            expiry: with a time zone; by default an hour from now.
        """
        from azure.storage.blob import (
            AccountSasPermissions,
            ContainerSasPermissions,
            ResourceTypes,
            generate_account_sas,
            generate_container_sas,
        )

        key = self.key(account)
        expiry = expiry or datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
        if container is None:
            everything = ResourceTypes(service=True, container=True, object=True)
            allowed = AccountSasPermissions.from_string(permissions)  # type: ignore[no-untyped-call]
            return generate_account_sas(account, key, everything, allowed, expiry)
        permitted = ContainerSasPermissions.from_string(permissions)
        return generate_container_sas(account, container, key, permission=permitted, expiry=expiry)

    @property
    def log(self) -> str:
        """What Azurite has printed; it stays after the block."""
        if self._output is not None:
            size = os.fstat(self._output.fileno()).st_size
            # Azurite writes at the offset that it shares with this file, so it must not be moved.
            self._log = os.pread(self._output.fileno(), size, 0).decode(errors="replace")
        return self._log

    def __enter__(self) -> "Azurite":
        """Start it, installed first if it never was, and wait until it answers."""
        node = find_node()
        main = npm_package(node, "azurite", VERSION) / "dist" / "src" / "blob" / "main.js"
        options = [*_OPTIONS, "--skipApiVersionCheck"]  # or a new client gets 400 on every call
        if self._folder is None:
            options.append("--inMemoryPersistence")
        else:
            options += ["--location", str(self._folder.resolve())]
        accounts = ";".join(f"{name}:{key}" for name, key in self._accounts.items())
        self._output = tempfile.TemporaryFile()
        self._process = subprocess.Popen(  # noqa: S603
            [node.program, "-e", _RUN, "--", str(main), *options],
            env={**os.environ, "AZURITE_ACCOUNTS": accounts},
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which then ends it
        )
        try:
            self.port = self._wait_for_port(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Stop it; what a ``folder`` holds is flushed before."""
        self._stop()

    def _wait_for_port(self, process: subprocess.Popen[bytes]) -> int:
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            ended = process.poll() is not None
            if found := re.search(r"listens on http://127\.0\.0\.1:(\d+)", self.log):
                return int(found[1])
            if ended:
                raise RuntimeError(
                    f"Azurite {VERSION} ended with {process.returncode} before it answered; "
                    f"it said:\n{self.log[-2000:]}"
                )
            time.sleep(0.02)
        raise TimeoutError(
            f"Azurite {VERSION} did not answer within {PATIENCE:.0f} s; "
            f"it said:\n{self.log[-2000:]}"
        )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if self._folder is not None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin:
                process.stdin.close()
        if self._output is not None:
            self._log = self.log
            self._output.close()
            self._output = None
