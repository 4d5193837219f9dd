"""What the client lists and downloads from the loopback hub."""

import hashlib
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from mttl_storage.testing.hub import LoopbackHub
from tests.storage.testing_hub.client import REPO, TOKENS, own_files, put

NAMES = ["a.txt", "d/a.bin", "d/b.txt", "d/e/f/c.txt", "d/g.txt", "h i/\u00fc?#%2F.txt", "z.txt"]


def test_the_tree_is_listed_page_by_page(hub, api):
    put(api, {name: name.encode() for name in NAMES})
    hub.requests.clear()
    found = list(api.list_repo_tree(REPO, recursive=True))
    files = [each.path for each in found if hasattr(each, "blob_id")]
    folders = [each.path for each in found if not hasattr(each, "blob_id")]
    assert files == [".gitattributes", *NAMES]
    assert folders == ["d", "d/e", "d/e/f", "h i"]
    assert len(hub.requests) == 4  # 12 entries by 3
    assert [each.path for each in api.list_repo_tree(REPO)] == [
        ".gitattributes", "a.txt", "d", "h i", "z.txt",
    ]  # fmt: skip
    below = ["d/a.bin", "d/b.txt", "d/e", "d/e/f", "d/e/f/c.txt", "d/g.txt"]
    assert [each.path for each in api.list_repo_tree(REPO, "d", recursive=True)] == below
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nope"))


def test_every_page_size_lists_the_same():
    for size in (1, 2, 5, 100):
        with LoopbackHub(TOKENS, page_size=size) as hub:
            api = HfApi(endpoint=hub.endpoint, token="hf_writer")
            api.create_repo(REPO)
            put(api, dict.fromkeys(NAMES, b"x"))
            found = [each.path for each in api.list_repo_tree(REPO, recursive=True)]
            assert len(found) == len(set(found)) == 12
            assert found == sorted(found, key=lambda path: path.split("/"))


def test_entries_tell_size_ids_and_last_commit(hub, api):
    first = put(api, {"d/a.txt": b"hello", "d/a.bin": b"weights"}, commit_message="first").oid
    second = put(api, {"e/b.txt": b"b"}, commit_message="second").oid
    paths = ["d/a.txt", "d/a.bin", "d", "e/", "nope"]
    text, weights, folder, other = api.get_paths_info(REPO, paths, expand=True)
    assert (text.size, text.lfs) == (5, None)
    assert text.blob_id == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"  # git hash-object
    assert weights.lfs.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert (weights.size, weights.lfs.size) == (7, 7)
    assert weights.blob_id != weights.lfs.sha256
    assert [each.last_commit.oid for each in (text, folder)] == [first, first]
    assert (other.last_commit.oid, other.last_commit.title) == (second, "second")
    assert api.get_paths_info(REPO, "d/a.txt")[0].last_commit is None
    detailed = {each.rfilename: each for each in api.model_info(REPO, files_metadata=True).siblings}
    assert detailed["d/a.bin"].lfs.sha256 == weights.lfs.sha256
    assert detailed["d/a.txt"].size == 5


def test_only_what_is_asked_of_a_repository_is_told(hub, api):
    info = api.model_info(REPO, expand=["sha"])
    assert info.sha == hub.commits(REPO)[-1].oid
    assert info.siblings is None


def test_too_many_paths_at_once_are_refused(api):
    assert len(api.get_paths_info(REPO, 1000 * [".gitattributes"])) == 1000
    with pytest.raises(HfHubHTTPError, match="too many parameters"):
        api.get_paths_info(REPO, 1001 * ["a"])


def test_files_are_downloaded_into_the_cache(hub, api, tmp_path):
    files = {"a.txt": b"hello", "d/a.safetensors": b"w" * 9000, "d/e.txt": b""}
    commit = put(api, files).oid
    for name, data in files.items():
        path = api.hf_hub_download(REPO, name, cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == data
        assert f"/snapshots/{commit}/" in path
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "nope.txt", cache_dir=tmp_path / "cache")


def test_a_snapshot_is_downloaded(hub, api, tmp_path):
    old = put(api, {"a.txt": b"old", "d/b.bin": b"b"}).oid
    put(api, {"a.txt": b"new"})
    for revision, text in ((None, b"new"), (old, b"old")):
        folder = api.snapshot_download(REPO, revision=revision, cache_dir=tmp_path / "cache")
        assert Path(folder, "a.txt").read_bytes() == text
        assert Path(folder, "d/b.bin").read_bytes() == b"b"


def test_objects_lie_on_another_host_that_never_sees_the_token(hub, api):
    put(api, {"a.bin": b"weights"})
    url = f"{hub.endpoint}/{REPO}/resolve/main/a.bin"
    headers = {"Authorization": "Bearer hf_writer"}
    answer = httpx2.head(url, headers=headers, follow_redirects=False)
    assert answer.status_code == 302
    assert answer.headers["X-Linked-Size"] == "7"
    assert answer.headers["X-Linked-Etag"].strip('"') == hashlib.sha256(b"weights").hexdigest()
    assert answer.headers["X-Repo-Commit"] == hub.commits(REPO)[-1].oid
    location = answer.headers["Location"]
    assert location.startswith(hub.storage_endpoint)
    assert httpx2.get(location).content == b"weights"
    assert httpx2.get(location.partition("?")[0]).status_code == 403
    assert hub.violations == ()


def test_a_token_sent_to_the_other_host_is_recorded():
    with LoopbackHub(TOKENS) as hub:
        headers = {"Authorization": "Bearer hf_writer"}
        answer = httpx2.get(f"{hub.storage_endpoint}/lfs/abc", headers=headers)
        assert answer.status_code == 400
        assert len(hub.violations) == 1
        assert "hf_writer" not in f"{hub.violations} {hub.requests}"


@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
@pytest.mark.parametrize(
    ("asked", "status", "content", "told"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=7-99", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
    ],
)
def test_a_range_is_served(hub, api, name, asked, status, content, told):
    put(api, {name: b"0123456789"})
    url = f"{hub.endpoint}/{REPO}/resolve/main/{name}"
    answer = httpx2.get(url, headers={"Range": asked}, follow_redirects=True)
    assert (answer.status_code, answer.content) == (status, content)
    assert answer.headers.get("Content-Range") == told


def test_the_file_system_of_the_client_reads_and_writes(hub, api):
    put(api, {"d/a.bin": bytes(range(256)) * 8})
    files = HfFileSystem(endpoint=hub.endpoint, token="hf_writer", skip_instance_cache=True)
    with files.open(f"{REPO}/d/new.txt", "wb") as file:
        file.write(b"written")
    assert own_files(hub)["d/new.txt"] == b"written"
    assert files.cat_file(f"{REPO}/d/a.bin") == bytes(range(256)) * 8
    assert files.cat_file(f"{REPO}/d/a.bin", start=10, end=20) == bytes(range(10, 20))
    with files.open(f"{REPO}/d/a.bin", block_size=100) as file:
        file.seek(1000)
        assert file.read(4) == bytes([232, 233, 234, 235])
    assert files.ls(f"{REPO}/d", detail=False) == [f"{REPO}/d/a.bin", f"{REPO}/d/new.txt"]
    assert set(files.find(REPO)) == {f"{REPO}/{name}" for name in hub.files(REPO)}
    files.rm(f"{REPO}/d/new.txt")
    assert not files.exists(f"{REPO}/d/new.txt")
    with pytest.raises(FileNotFoundError):
        files.cat_file(f"{REPO}/nope")
