"""Faults that the loopback hub is told to make."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from mttl_storage.testing.hub import Cut, Flip, LoopbackHub, Reset, Short, Stall, Status, Wrong
from tests.storage.testing_hub.client import REPO, TOKENS, own_files, put


@pytest.mark.parametrize("code", [429, 503, 500])
def test_an_error_is_answered_and_the_client_tries_again(hub, api, slept, code):
    hub.faults.add(Status(code, retry_after=7), path="/preupload/", times=2)
    put(api, {"a.txt": b"a"})
    assert own_files(hub) == {"a.txt": b"a"}
    assert slept == [8.0, 8.0]  # the client adds a second
    assert [each.fault.code for each in hub.faults.fired] == [code, code]


@pytest.mark.parametrize("code", [403, 404, 413, 429, 500, 503, 507])
def test_the_client_does_not_retry_the_commit(hub, api, code):
    hub.faults.add(Status(code, "no room"), method="POST", path="/commit/")
    with pytest.raises(HfHubHTTPError, match="no room") as caught:
        put(api, {"a.txt": b"a"})
    assert caught.value.response.status_code == code
    assert own_files(hub) == {}
    assert len(hub.faults.fired) == 1


def test_an_error_code_makes_the_client_raise_its_own_error(hub, api):
    hub.faults.add(Status(404, error_code="RevisionNotFound"), path="/refs")
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_refs(REPO)


def test_a_connection_is_reset_before_the_commit(hub, api):
    hub.faults.add(Reset(), method="POST", path="/commit/", nth=1)
    with pytest.raises(httpx2.TransportError):
        put(api, {"a.txt": b"a"})
    assert own_files(hub) == {}
    put(api, {"a.txt": b"a"})
    assert own_files(hub) == {"a.txt": b"a"}


def test_a_connection_is_reset_after_the_commit(hub, api):
    hub.faults.add(Reset(after=True), method="POST", path="/commit/", nth=1)
    with pytest.raises(httpx2.NetworkError):
        put(api, {"a.txt": b"a"})
    assert own_files(hub) == {"a.txt": b"a"}


def test_a_reset_upload_is_sent_again(hub, api, slept):
    hub.faults.add(Reset(), method="PUT", nth=1)
    hub.faults.add(Reset(after=True), method="PUT", nth=2)
    put(api, {"a.bin": b"w" * 3000})
    assert own_files(hub) == {"a.bin": b"w" * 3000}
    assert len(slept) == 2


def test_a_cut_answer_is_continued(hub, api, slept, tmp_path):
    put(api, {"a.bin": bytes(range(256)) * 10})
    hub.faults.add(Cut(0.3), method="GET", path="^/lfs/", nth=1)
    path = api.hf_hub_download(REPO, "a.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == bytes(range(256)) * 10
    assert len([1 for request in hub.requests if request[1].startswith("/lfs/")]) == 3
    url = f"{hub.endpoint}/{REPO}/resolve/main/a.bin"
    hub.faults.add(Cut(), method="GET", path="^/lfs/")
    with pytest.raises(httpx2.RemoteProtocolError, match="1280 bytes, expected 2560"):
        httpx2.get(url, follow_redirects=True)


@pytest.mark.parametrize(("after", "committed"), [(False, False), (True, True)])
def test_a_stalled_answer_runs_into_the_time_limit(hub, api, after, committed):
    hub.faults.add(Stall(0.5, after=after), path="/branch/", nth=1)
    url = f"{hub.endpoint}/api/models/{REPO}/branch/side"
    headers = {"Authorization": "Bearer hf_writer"}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(url, json={}, headers=headers, timeout=0.2)
    assert (len(api.list_repo_refs(REPO).branches) == 2) is committed


def test_a_stall_only_delays(hub, api):
    hub.faults.add(Stall(0.2), path="/commit/")
    start = time.monotonic()
    put(api, {"a.txt": b"a"})
    assert time.monotonic() - start > 0.2
    assert own_files(hub) == {"a.txt": b"a"}


def test_a_stalled_hub_stops_at_once():
    with ThreadPoolExecutor(1) as pool:
        with LoopbackHub(TOKENS) as hub:
            hub.faults.add(Stall(60), path="whoami")
            waiting = pool.submit(httpx2.get, f"{hub.endpoint}/api/whoami-v2", timeout=30)
            while not hub.requests:
                time.sleep(0.01)
            start = time.monotonic()
        assert time.monotonic() - start < 2
        assert isinstance(waiting.exception(), httpx2.TransportError)


@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_the_client_does_not_notice_a_flipped_bit(hub, api, tmp_path, name):
    put(api, {name: b"0" * 100})
    hub.faults.add(Flip(), method="GET", path=f"{name}$" if name == "a.txt" else "^/lfs/")
    path = api.hf_hub_download(REPO, name, cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"0" * 50 + b"1" + b"0" * 49


def test_the_client_notices_a_body_of_another_length(hub, api, tmp_path):
    put(api, {"a.bin": b"w" * 100})
    for fault in (Short(), Short(0), Wrong(b"other")):
        hub.faults.clear()
        hub.faults.add(fault, method="GET", path="^/lfs/")
        with pytest.raises(OSError, match="Consistency check failed"):
            api.hf_hub_download(REPO, "a.bin", cache_dir=tmp_path)
    hub.faults.clear()
    hub.faults.add(Wrong(b"o" * 100), method="GET", path="^/lfs/")
    path = api.hf_hub_download(REPO, "a.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"o" * 100


def test_a_seed_hits_the_same_requests_again():
    def hits(seed):
        with LoopbackHub(TOKENS, seed=seed) as hub:
            hub.faults.add(Status(503), path="whoami", probability=0.3)
            with httpx2.Client() as client:
                for _ in range(50):
                    client.get(f"{hub.endpoint}/api/whoami-v2")
                    client.get(f"{hub.endpoint}/api/models/{REPO}")
            return [each.number for each in hub.faults.fired]

    assert hits(1) == hits(1) != hits(2)
    assert 5 < len(hits(1)) < 25


def test_a_callback_sees_each_request_before_and_after(hub, api):
    seen = []
    heads = []

    def note(moment, number, method, path):
        seen.append((moment, number, method, path))
        heads.append(len(hub.commits(REPO)))

    hub.on_request(note)
    hub.requests.clear()
    put(api, {"a.txt": b"a"})
    hub.on_request(None)
    api.repo_info(REPO)
    commit = f"/api/models/{REPO}/commit/main"
    assert [each[0] for each in seen] == ["before", "after"] * 2
    assert [each[3] for each in seen][2:] == [commit, commit]
    assert seen[2][1] == seen[3][1] == seen[0][1] + 1
    assert heads == [1, 1, 1, 2]


def test_a_client_that_dies_in_an_upload_leaves_nothing(hub, api):
    put(api, {"a.txt": b"a"})
    port = int(hub.endpoint.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = (
            f"POST /api/models/{REPO}/commit/main HTTP/1.1\r\nHost: hub\r\nContent-Length: 999\r\n"
        )
        connection.sendall(f"{head}Authorization: Bearer hf_writer\r\n\r\n".encode())
        connection.sendall(b'{"key": "header", "value": {"summary": "half"}}\n')
        while len(hub.requests) < 4:
            time.sleep(0.01)
    put(api, {"b.txt": b"b"})
    assert own_files(hub) == {"a.txt": b"a", "b.txt": b"b"}


def test_a_hub_serves_from_a_process_of_its_own():
    program = (
        "import sys\n"
        "from mttl_storage.testing import LoopbackHub\n"
        "with LoopbackHub({'hf_writer': 'write'}) as hub:\n"
        "    print(hub.endpoint, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        endpoint = process.stdout.readline().strip()
        api = HfApi(endpoint=endpoint, token="hf_writer")
        api.create_repo(REPO)
        put(api, {"a.bin": b"a"})
        assert api.file_exists(REPO, "a.bin")
        process.communicate()
    assert process.returncode == 0


def test_an_unknown_repository_of_the_handle_is_named(hub, api):
    with pytest.raises(LookupError, match="no model 'user/other'"):
        hub.files("user/other")
