"""Put, get and list against the libraries one would otherwise use, on this machine.

    uv run --with adlfs --with obstore benchmarks/storage.py [local] [az] [hf]

Each row is one JSON line: seconds (median over the rounds), and the ratio to the fastest peer that
does the same work, which is SHA-256 on get, and SHA-256 and fsync (local) on put. The bare peers,
which do neither, are shown beside them. All contenders use eight threads and take turns within
each round, in one process; Azurite and the loopback hub are the servers.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # which a loopback hub does not speak

from mttl_storage import Repository
from mttl_storage.testing import Azurite, LoopbackHub

THREADS = 8
SIZE = 2 * 10**6
Blobs = dict[str, bytes]


class Contender:
    """Stores blobs somewhere new, gets them back, and lists them."""

    same_work = True

    def __init__(self, name: str) -> None:
        self.name = name

    def begin(self, where: str) -> None:
        """Make the place; not timed."""

    def put(self, blobs: Blobs) -> None:
        raise NotImplementedError

    def get(self, names: list[str]) -> int:
        """Bytes read."""
        raise NotImplementedError

    def list(self) -> int:
        """How many there are, with size and name."""
        raise NotImplementedError

    def end(self) -> None:
        """Delete everything; not timed."""


class Ours(Contender):
    def __init__(self, address: Callable[[str], str]) -> None:
        super().__init__("mttl-storage")
        self.address = address

    def begin(self, where: str) -> None:
        self.repository = Repository.open(self.address(where), create=True)

    def put(self, blobs: Blobs) -> None:
        with self.repository.batch() as batch:
            for name, data in blobs.items():
                batch.add(f"experts/{name}", {"adapter_model.safetensors": data})

    def get(self, names: list[str]) -> int:
        def read(name: str) -> int:
            return len(self.repository.read(f"experts/{name}", "adapter_model.safetensors"))

        return sum(in_threads(read, names))

    def list(self) -> int:
        items = Repository.open(self.repository.uri).items()
        return len([(name, item.size) for name, item in items.items()])

    def end(self) -> None:
        if self.repository.store.on_disk:
            shutil.rmtree(self.repository.store.local_path(""))


class Peer(Contender):
    """A store of keys and bytes: ``write``, ``read``, ``names``; hashing is added here."""

    def __init__(self, name: str, bare: bool) -> None:
        super().__init__(name + (" (bare)" if bare else ""))
        self.same_work = not bare
        self.bare = bare

    def write(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        raise NotImplementedError

    def put(self, blobs: Blobs) -> None:
        self.digests = {}

        def write(name: str) -> None:
            if not self.bare:
                self.digests[name] = hashlib.sha256(blobs[name]).hexdigest()
            self.write(name, blobs[name])

        in_threads(write, list(blobs))

    def get(self, names: list[str]) -> int:
        def read(name: str) -> int:
            data = self.read(name)
            if not self.bare and hashlib.sha256(data).hexdigest() != self.digests[name]:
                raise ValueError(f"{name!r} is damaged")
            return len(data)

        return sum(in_threads(read, names))


class PlainFiles(Peer):
    """fsspec's local filesystem."""

    def begin(self, where: str) -> None:
        import fsspec

        self.fs = fsspec.filesystem("file")
        self.root = where
        Path(where).mkdir(parents=True)

    def write(self, name: str, data: bytes) -> None:
        folder = f"{self.root}/{name}"
        self.fs.makedirs(folder)
        with self.fs.open(f"{folder}/adapter_model.safetensors", "wb") as file:
            file.write(data)
            if not self.bare:
                file.flush()
                os.fsync(file.fileno())

    def read(self, name: str) -> bytes:
        data: bytes = self.fs.cat_file(f"{self.root}/{name}/adapter_model.safetensors")
        return data

    def list(self) -> int:
        return len(self.fs.find(self.root, detail=True))

    def end(self) -> None:
        shutil.rmtree(self.root)


class ObjectStore(Peer):
    """obstore, on disk or on Azurite."""

    def __init__(self, name: str, bare: bool, make: Callable[[str], Any]) -> None:
        super().__init__(name, bare)
        self.make = make

    def begin(self, where: str) -> None:
        self.where = where
        self.store = self.make(where)

    def write(self, name: str, data: bytes) -> None:
        self.store.put(f"{name}/adapter_model.safetensors", data)
        if not self.bare and Path(self.where).is_dir():
            descriptor = os.open(f"{self.where}/{name}/adapter_model.safetensors", os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def read(self, name: str) -> bytes:
        return bytes(self.store.get(f"{name}/adapter_model.safetensors").bytes())

    def list(self) -> int:
        return sum(len(page) for page in self.store.list())

    def end(self) -> None:
        shutil.rmtree(self.where, ignore_errors=True)


class Adlfs(Peer):
    """adlfs, with its own way of doing many at once."""

    def __init__(self, bare: bool, connection: str) -> None:
        super().__init__("adlfs", bare)
        self.connection = connection

    def begin(self, where: str) -> None:
        from adlfs import AzureBlobFileSystem

        self.fs = AzureBlobFileSystem(
            connection_string=self.connection, skip_instance_cache=True, use_listings_cache=False
        )
        self.root = f"bench/{where}"

    def put(self, blobs: Blobs) -> None:
        self.digests = {}
        if not self.bare:
            for name, data in blobs.items():
                self.digests[name] = hashlib.sha256(data).hexdigest()
        self.fs.pipe({self._key(name): data for name, data in blobs.items()})

    def get(self, names: list[str]) -> int:
        found = self.fs.cat([self._key(name) for name in names])
        for name in [] if self.bare else names:
            if hashlib.sha256(found[self._key(name)]).hexdigest() != self.digests[name]:
                raise ValueError(f"{name!r} is damaged")
        return sum(map(len, found.values()))

    def list(self) -> int:
        return len(self.fs.find(self.root, detail=True))

    def _key(self, name: str) -> str:
        return f"{self.root}/{name}/adapter_model.safetensors"


class AzureBlobs(Peer):
    """azure-storage-blob."""

    def __init__(self, bare: bool, connection: str) -> None:
        super().__init__("azure-storage-blob", bare)
        self.connection = connection

    def begin(self, where: str) -> None:
        from azure.storage.blob import ContainerClient

        self.client = ContainerClient.from_connection_string(self.connection, "bench")
        self.root = where

    def write(self, name: str, data: bytes) -> None:
        self.client.upload_blob(f"{self.root}/{name}/adapter_model.safetensors", data)

    def read(self, name: str) -> bytes:
        data: bytes = self.client.download_blob(
            f"{self.root}/{name}/adapter_model.safetensors"
        ).readall()
        return data

    def list(self) -> int:
        return len([(b.name, b.size) for b in self.client.list_blobs(f"{self.root}/")])


class HubFiles(Peer):
    """huggingface_hub: one commit of all files, and its own download of each."""

    def __init__(self, bare: bool, endpoint: str, cache: str) -> None:
        super().__init__("huggingface_hub", bare)
        self.endpoint, self.cache = endpoint, cache

    def begin(self, where: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self.api, self.repo = HfApi(endpoint=self.endpoint, token="hf_bench"), f"user/{where}"
        self.folder = f"{self.cache}/{where}"
        self.api.create_repo(self.repo)

    def put(self, blobs: Blobs) -> None:
        from huggingface_hub import CommitOperationAdd

        # The client hashes by itself.
        self.digests = {name: hashlib.sha256(data).hexdigest() for name, data in blobs.items()}
        files = [
            CommitOperationAdd(f"{name}/adapter_model.safetensors", data)
            for name, data in blobs.items()
        ]
        self.api.create_commit(self.repo, files, commit_message="put", num_threads=THREADS)

    def read(self, name: str) -> bytes:
        path = self.api.hf_hub_download(
            self.repo, f"{name}/adapter_model.safetensors", cache_dir=self.folder
        )
        return Path(path).read_bytes()

    def list(self) -> int:
        return len(list(self.api.list_repo_tree(self.repo, recursive=True, expand=False)))


def in_threads(action: Callable[[str], Any], names: list[str]) -> list[Any]:
    """What an action gives for each name."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(action, names))


def measure(backend: str, contenders: list[Contender], count: int, rounds: int) -> None:
    """Time every contender in every round, and print a row for each thing it did."""
    blobs = {f"expert-{n:04d}": os.urandom(SIZE) for n in range(count)}
    seconds: dict[tuple[str, str], list[float]] = {}
    folder = tempfile.mkdtemp(prefix="mttl-bench-")
    for number in range(rounds):
        for contender in contenders:
            where = f"{contender.name.split()[0]}-{contender.same_work}-{number}".lower()
            contender.begin(f"{folder}/{where}" if backend == "local" else where)
            steps: dict[str, Callable[[], Any]] = {
                "put": lambda: contender.put(blobs),  # noqa: B023
                "get": lambda: contender.get(list(blobs)),  # noqa: B023
                "list": lambda: contender.list(),  # noqa: B023
            }
            for step, action in steps.items():
                began = time.perf_counter()
                found = action()
                seconds.setdefault((contender.name, step), []).append(time.perf_counter() - began)
                if (step == "get" and found != count * SIZE) or (step == "list" and found < count):
                    sys.exit(f"{contender.name} did not {step} everything: {found}")
            contender.end()
    shutil.rmtree(folder)
    for step in ("put", "get", "list"):
        medians = {c.name: statistics.median(seconds[c.name, step]) for c in contenders}
        peers = [medians[c.name] for c in contenders if c.same_work and not isinstance(c, Ours)]
        for contender in contenders:
            row = {
                "backend": backend,
                "what": step,
                "who": contender.name,
                "files": count,
                "bytes": SIZE,
                "rounds": rounds,
                "seconds": round(medians[contender.name], 4),
                "ratio_to_best_peer": round(medians[contender.name] / min(peers), 3),
            }
            print(json.dumps(row), flush=True)


def local_contenders() -> list[Contender]:
    """Who stores on the local disk."""
    from obstore.store import LocalStore

    def store(where: str) -> Any:
        return LocalStore(where, mkdir=True)

    return [
        Ours(lambda where: f"local://{where}"),
        PlainFiles("fsspec", bare=False),
        ObjectStore("obstore", False, store),
        PlainFiles("fsspec", bare=True),
        ObjectStore("obstore", True, store),
    ]


def azure_contenders(azurite: Azurite) -> list[Contender]:
    """Who stores in Azure Blob Storage."""
    from azure.storage.blob import BlobServiceClient
    from obstore.store import AzureStore

    connection = azurite.connection_string()
    BlobServiceClient.from_connection_string(connection).create_container("bench")
    os.environ["AZURE_STORAGE_CONNECTION_STRING"] = connection

    def store(where: str) -> Any:
        return AzureStore(
            "bench",
            prefix=where,
            account_name="mttltest",
            account_key=azurite.key(),
            endpoint=azurite.endpoint(),
            client_options={"allow_http": True},
        )

    return [
        Ours(lambda where: f"az://mttltest/bench/{where}"),
        Adlfs(False, connection),
        AzureBlobs(False, connection),
        ObjectStore("obstore", False, store),
        Adlfs(True, connection),
        AzureBlobs(True, connection),
        ObjectStore("obstore", True, store),
    ]


def hub_contenders(hub: LoopbackHub, cache: str) -> list[Contender]:
    """Who stores on the hub."""
    os.environ.update(HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_bench")
    return [
        Ours(lambda where: f"hf://user/{where}"),
        HubFiles(False, hub.endpoint, cache),
        HubFiles(True, hub.endpoint, cache),
    ]


def main() -> None:
    """Measure the backends that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", help="Any of local, az and hf; all by default.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local-files", type=int, default=1000)
    parser.add_argument("--remote-files", type=int, default=200)
    options = parser.parse_args()
    backends = options.backends or ["local", "az", "hf"]
    if "local" in backends:
        measure("local", local_contenders(), options.local_files, options.rounds)
    if "az" in backends:
        with Azurite() as azurite:
            measure("az", azure_contenders(azurite), options.remote_files, options.rounds)
    if "hf" in backends:
        with (
            LoopbackHub(tokens={"hf_bench": "write"}) as hub,
            tempfile.TemporaryDirectory() as cache,
        ):
            measure("hf", hub_contenders(hub, cache), options.remote_files, options.rounds)


if __name__ == "__main__":
    main()
