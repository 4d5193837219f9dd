"""What is special to Azure Blob Storage: credentials, containers, blocks, ranges, refusals."""

import concurrent.futures
import datetime
import email.utils
import http.client
import http.server
import os
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

from mttl_storage import (
    Denied,
    InvalidName,
    NotFound,
    Repository,
    StorageError,
    StorageFull,
    Throttled,
    cache,
    filesystem,
    retrying,
)

pytest.importorskip("azure.storage.blob")
from mttl_storage.store import azure
from mttl_storage.store.azure_account import account_of

ACCOUNT = "mttltest"
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"0123456789" * 20}
VARIABLES = ["BLOB_SAS_TOKEN", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_KEY"]
VARIABLES += ["AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SERVICE_ENDPOINT"]


class Gate:
    """A server in front of Azurite that notes each request, and can answer in its place."""

    def __init__(self, port):
        self.port_of_azurite = port
        self.requests = []
        """Method, and path with query, of each request."""
        self.sent = 0
        """Bytes of the answers to GET."""
        self.verdict = lambda method, path: None
        """Gives a status and an error code to answer a request with, or a number of bytes to stop
        after, or None."""
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.gate, self.server.daemon_threads = self, True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def count(self, method, part):
        return sum(m == method and part in urllib.parse.unquote(p) for m, p in self.requests)

    def open(self):
        """Let all pass, and count anew."""
        self.verdict = lambda method, path: None
        self.requests.clear()
        self.sent = 0


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet, or each answer takes 40 ms

    def answer(self):
        gate, body = self.server.gate, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        gate.requests.append((self.command, self.path))
        verdict = gate.verdict(self.command, self.path)
        if isinstance(verdict, tuple):
            status, code, *after = verdict
            date = email.utils.formatdate(usegmt=True)
            found = {"x-ms-error-code": code, "Content-Length": "0", "Date": date}
            self.reply(status, {**found, **({"Retry-After": after[0]} if after else {})}, b"")
            return
        there = http.client.HTTPConnection("127.0.0.1", gate.port_of_azurite)
        there.request(self.command, self.path, body, dict(self.headers))
        answer = there.getresponse()
        data = answer.read()
        there.close()
        headers = {name.title(): value for name, value in answer.getheaders()}
        if headers.pop("Transfer-Encoding", None) or "Content-Length" not in headers:
            headers["Content-Length"] = str(len(data))
        if verdict is not None:
            data, self.close_connection = data[:verdict], True
        gate.sent += len(data) if self.command == "GET" else 0
        self.reply(answer.status, headers, data)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def reply(self, status, headers, data):
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in ("Connection", "Keep-Alive"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def gate(azurite, monkeypatch):
    gate = Gate(azurite.port)
    only(monkeypatch, AZURE_STORAGE_CONNECTION_STRING=azurite.connection_string(port=gate.port))
    yield gate
    gate.server.shutdown()
    gate.server.server_close()


@pytest.fixture
def address(new_address):
    return new_address("az")


def only(monkeypatch, **variables):
    """Let these be the only variables of the environment that matter."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# Credentials.


def credentials(azurite):
    from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

    sas, key = azurite.sas(), azurite.key()
    return {
        "SAS": sas,
        "SAS with a question mark": f"?{sas}",
        "key": key,
        "connection string": azurite.connection_string(),
        "connection string with a SAS": f"BlobEndpoint={azurite.endpoint()};"
        f"SharedAccessSignature={sas}",
        "key object": AzureNamedKeyCredential(ACCOUNT, key),
        "SAS object": AzureSasCredential(sas),
    }


KINDS = ["SAS", "SAS with a question mark", "key", "connection string"]
KINDS += ["connection string with a SAS", "key object", "SAS object"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_credential_opens_and_writes(azurite, address, monkeypatch, kind):
    endpoint = f"http://127.0.0.1:{azurite.port}"
    only(monkeypatch, AZURE_STORAGE_SERVICE_ENDPOINT=endpoint, BLOB_SAS_TOKEN="sv=1&sig=wrong-one")
    token = credentials(azurite)[kind]
    repository = Repository.open(address, token=token, create=True)
    repository.add("experts/a", FILES)
    again = Repository.open(address, token=token, read_only=True)
    assert again.read("experts/a", "adapter_config.json") == b"{}"


@pytest.mark.parametrize(
    ("variable", "kind"),
    [
        ("BLOB_SAS_TOKEN", "SAS"),
        ("AZURE_STORAGE_SAS_TOKEN", "SAS with a question mark"),
        ("AZURE_STORAGE_KEY", "key"),
        ("AZURE_STORAGE_CONNECTION_STRING", "connection string"),
    ],
)
def test_each_variable_of_the_environment_is_a_credential(
    azurite, address, monkeypatch, variable, kind
):
    only(monkeypatch, AZURE_STORAGE_SERVICE_ENDPOINT=f"http://127.0.0.1:{azurite.port}")
    monkeypatch.setenv(variable, credentials(azurite)[kind])
    repository = Repository.open(address, create=True)
    repository.add("experts/a", FILES)
    assert account_of(ACCOUNT).kind == variable


def test_the_first_credential_counts_in_the_order_of_the_readme(monkeypatch):
    only(monkeypatch)
    values = {
        name: f"sv={number}&sig=signature-{name}" for number, name in enumerate(VARIABLES[:2])
    }
    values["AZURE_STORAGE_KEY"] = "a2V5LW9mLXRoZS10ZXN0"
    values["AZURE_STORAGE_CONNECTION_STRING"] = (
        "DefaultEndpointsProtocol=https;AccountName=account;AccountKey=YW5vdGhlci1rZXk=;"
        "EndpointSuffix=core.windows.net"
    )
    asked = []
    monkeypatch.setattr(
        "azure.identity.DefaultAzureCredential", lambda: asked.append(True) or object()
    )
    assert account_of("account").kind == "DefaultAzureCredential"
    assert asked == [True]
    for name in reversed(VARIABLES[:4]):  # each goes before those that were set so far
        monkeypatch.setenv(name, values[name])
        account = account_of("account")
        assert account.kind == name
        assert account.url == "https://account.blob.core.windows.net"
    assert account_of("account", "a2V5LWFzLWFyZ3VtZW50").secret.reveal() == "a2V5LWFzLWFyZ3VtZW50"
    assert account_of("account", "a2V5LWFzLWFyZ3VtZW50").kind == "token="
    assert asked == [True]


def test_the_default_credential_is_what_the_client_gets(monkeypatch):
    only(monkeypatch)
    default = object()
    monkeypatch.setattr("azure.identity.DefaultAzureCredential", lambda: default)
    store = filesystem("az://account/container/path")
    assert store._identity.credential is default
    assert store._identity.url == "https://account.blob.core.windows.net"


def test_a_connection_string_for_another_account_is_refused(azurite):
    with pytest.raises(InvalidName, match="is for the account 'mttltest', and the address for"):
        Repository.open("az://other/container", token=azurite.connection_string())


# Containers.


def test_a_container_is_made_with_create_and_not_otherwise(azurite):
    name = f"fresh-{os.getpid()}"
    for uri in (f"az://{ACCOUNT}/{name}", f"az://{ACCOUNT}/{name}/deep/er"):
        with pytest.raises(NotFound, match=uri):
            Repository.open(uri)
        with pytest.raises(NotFound, match="pass create=True"):
            Repository.open(uri)
    with pytest.raises(NotFound, match="no such container"):
        filesystem(f"az://{ACCOUNT}/{name}").pipe_file("a", b"")
    whole = Repository.open(f"az://{ACCOUNT}/{name}", create=True)
    whole.add("experts/a", FILES)
    assert filesystem(f"az://{ACCOUNT}/{name}").exists(".mttl/repository.json")
    deep = Repository.open(f"az://{ACCOUNT}/{name}/deep/er", create=True)
    assert list(deep) == []
    assert Repository.open(f"az://{ACCOUNT}/{name}").verify() == []


def test_a_sas_for_one_container_is_enough_where_it_exists(azurite, address, monkeypatch):
    Repository.open(address, create=True)
    only(monkeypatch, AZURE_STORAGE_SERVICE_ENDPOINT=f"http://127.0.0.1:{azurite.port}")
    sas = azurite.sas(container="tests")
    repository = Repository.open(f"{address}/inner", token=sas, create=True)
    repository.add("experts/a", FILES)
    assert repository.verify() == []
    elsewhere = f"az://{ACCOUNT}/elsewhere/{os.getpid()}"
    with pytest.raises(Denied, match=elsewhere):
        Repository.open(elsewhere, token=sas, create=True)


# Large files.


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.safetensors"
    path.write_bytes(os.urandom(3 * azure.BLOCK + 1000))
    return path


def test_an_upload_that_was_cut_short_goes_on_without_the_blocks_that_are_there(
    gate, address, large
):
    repository = Repository.open(address, create=True)
    gate.verdict = lambda method, path: (
        (403, "AuthorizationFailure")
        if "comp=block&" in path and gate.count(method, "comp=block&") > 2
        else None
    )
    with pytest.raises(Denied, match=address):
        repository.add("experts/a", {"large.safetensors": large})
    staged = 2
    gate.open()
    Repository.open(address).add("experts/a", {"large.safetensors": large})
    assert gate.count("PUT", "comp=block&") == 4 - staged
    assert gate.count("PUT", "comp=blocklist") == 1
    assert Repository.open(address).verify() == []


def test_a_download_that_was_cut_short_goes_on_where_it_stopped(gate, address, large):
    repository = Repository.open(address, create=True)
    item = repository.add("experts/a", {"large.safetensors": large})
    size, blob = large.stat().st_size, "large.safetensors"
    gate.open()

    def cut(method, path):
        if method == "GET" and blob in path:
            number = gate.count("GET", blob)
            if number == 2:
                return azure.BLOCK // 2
            return (403, "AuthorizationFailure") if number == 3 else None
        return None

    gate.verdict = cut
    with pytest.raises(Denied):
        repository.path("experts/a", blob)
    partial = cache.cached_folder(repository.store, item) / f".{item.files[blob].sha256}.part"
    there = partial.stat().st_size
    assert azure.BLOCK <= there < 2 * azure.BLOCK
    gate.open()
    assert repository.path("experts/a", blob).read_bytes() == large.read_bytes()
    assert gate.sent == size - there
    assert not partial.exists()


def test_two_processes_that_want_a_file_download_it_once(gate, address, large, tmp_path):
    repository = Repository.open(address, create=True)
    item = repository.add("experts/a", {"large.safetensors": large})
    gate.open()
    code = (
        "import sys; from mttl_storage import Repository;"
        "print(Repository.open(sys.argv[1]).path('experts/a', 'large.safetensors'))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(_):
        return subprocess.run(
            [sys.executable, "-c", code, address],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run, range(2)))
    assert [each.stderr for each in ended] == [""] * 2
    [path] = {each.stdout.strip() for each in ended}
    assert path.startswith(str(tmp_path / "cache" / "mttl" / "items" / item.digest[:2]))
    blob = large.stat().st_size
    assert blob <= gate.sent < blob + 100_000


# Refusals: a clear error, nothing lost, and all well again afterwards.


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (403, "AuthorizationPermissionMismatch", Denied, "check what it permits"),
        (403, "AuthenticationFailed", Denied, "check what it permits, and until when"),
        (403, "AccountIsDisabled", Denied, "AccountIsDisabled"),
        (507, "InsufficientStorage", StorageFull, "no room left"),
        (413, "RequestBodyTooLarge", StorageFull, "no room left"),
        (409, "AccountQuotaExceeded", StorageFull, "no room left"),
        (409, "BlobImmutableDueToPolicy", StorageError, "BlobImmutableDueToPolicy"),
        (400, "InvalidHeaderValue", StorageError, "InvalidHeaderValue"),
        (503, "ServerBusy", Throttled, "try again later"),
    ],
)
def test_a_refusal_is_told_in_one_line_and_harms_nothing(
    gate, address, monkeypatch, status, code, error, says
):
    monkeypatch.setattr(retrying, "PATIENCE", 0.5)
    repository = Repository.open(address, create=True)
    repository.add("experts/a", FILES)
    for what in ("experts/b", "/log/"):  # at the files of the commit, and at its entry
        gate.verdict = lambda method, path, what=what: (
            (status, code) if method == "PUT" and what in urllib.parse.unquote(path) else None
        )
        with pytest.raises(error) as caught:
            repository.add("experts/b", FILES)
        message = str(caught.value)
        assert type(caught.value) is error
        assert says in message
        assert address in message
        assert "\n" not in message
        assert "127.0.0.1" not in message
        gate.open()
        assert list(Repository.open(address)) == ["experts/a"]
    assert Repository.open(address).verify() == []
    repository.add("experts/b", FILES)
    assert Repository.open(address).verify() == []


def test_a_sas_that_may_only_read_is_denied_when_it_writes(azurite, address, monkeypatch):
    Repository.open(address, create=True).add("experts/a", FILES)
    only(monkeypatch, AZURE_STORAGE_SERVICE_ENDPOINT=f"http://127.0.0.1:{azurite.port}")
    repository = Repository.open(address, token=azurite.sas(permissions="rl"))
    assert repository.verify() == []
    assert repository.path("experts/a").is_dir()
    for change in (
        lambda: repository.add("experts/b", FILES),
        lambda: repository.update_info("experts/a", {"k": 1}),
        lambda: repository.remove("experts/a"),
    ):
        with pytest.raises(Denied, match="the credential of token=") as caught:
            change()
        assert address in str(caught.value)
        assert "\n" not in str(caught.value)
    assert Repository.open(address, token=azurite.sas()).add("experts/b", FILES).name == "experts/b"


def test_a_sas_that_has_expired_is_denied(azurite, address, monkeypatch):
    Repository.open(address, create=True)
    only(monkeypatch, AZURE_STORAGE_SERVICE_ENDPOINT=f"http://127.0.0.1:{azurite.port}")
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    with pytest.raises(Denied, match="check what it permits, and until when"):
        Repository.open(address, token=azurite.sas(expiry=past))


def test_retry_after_is_honoured(gate, address):
    repository = Repository.open(address, create=True)
    seen = []

    def busy_once(method, path):
        if method == "PUT" and "/log/" in urllib.parse.unquote(path):
            seen.append(time.monotonic())
            return (503, "ServerBusy", "1") if len(seen) == 1 else None
        return None

    gate.verdict = busy_once
    repository.add("experts/a", FILES)
    assert len(seen) == 2
    assert 1 <= seen[1] - seen[0] < 5
    assert repository.generation == 1
