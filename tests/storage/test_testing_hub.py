import hashlib
import io
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    get_token,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mttl_storage.testing.hub import (
    Cut,
    Flip,
    LoopbackHub,
    Reset,
    Short,
    Stall,
    Status,
    Wrong,
)

TOKENS = {"hf_writer": "write", "hf_reader": "read"}
REPO = "user/library"


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch):
    """The client as it is by default, but for names beyond this machine and its owner's token."""
    look_up = socket.getaddrinfo

    def checked(host, *rest, **options):
        assert host in ("127.0.0.1", "localhost", b"127.0.0.1", b"localhost"), host
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", checked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")


@pytest.fixture
def slept(monkeypatch):
    """How long the client wanted to wait, each time that it did; it does not."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def hub():
    with LoopbackHub(
        TOKENS, page_size=3, regular_limit=4000, multipart_threshold=5000, part_size=2000
    ) as hub:
        yield hub
        assert not hub.violations


@pytest.fixture
def api(hub):
    """A client that may write, and an empty repository."""
    api = HfApi(endpoint=hub.endpoint, token="hf_writer")
    api.create_repo(REPO)
    return api


def put(api, files, repo_type="model", **options):
    """Commit files as the stores do, from open files, which the client uploads over HTTP."""
    operations = [CommitOperationAdd(path, io.BytesIO(data)) for path, data in files.items()]
    options = {"commit_message": "put", "repo_type": repo_type, **options}
    return api.create_commit(REPO, operations, **options)


def own_files(hub, **options):
    files = hub.files(REPO, **options)
    files.pop(".gitattributes")
    return files


# Repositories and who may use them


def test_a_repository_is_created_once_and_found_again(hub, api):
    assert api.create_repo(REPO, exist_ok=True) == f"{hub.endpoint}/{REPO}"
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api.repo_info(REPO).sha == hub.commits(REPO)[-1].oid
    assert api.repo_exists(REPO)
    assert not api.repo_exists("user/other")


def test_a_deleted_repository_is_gone(api):
    api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)
    api.delete_repo(REPO, missing_ok=True)


def test_models_and_datasets_do_not_share_names(hub, api, tmp_path):
    api.create_repo(REPO, repo_type="dataset")
    put(api, {"data.txt": b"rows", "data.parquet": b"columns"}, repo_type="dataset")
    assert own_files(hub) == {}
    expected = {"data.txt": b"rows", "data.parquet": b"columns"}
    assert own_files(hub, kind="dataset") == expected
    path = api.hf_hub_download(REPO, "data.parquet", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"columns"
    assert "data.txt" in [file.rfilename for file in api.dataset_info(REPO).siblings]


def test_a_private_repository_is_not_there_without_a_token(hub, api):
    api.create_repo("user/secret", private=True)
    anonymous = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError) as caught:
        anonymous.repo_info("user/secret")
    assert caught.value.response.status_code == 401
    assert api.repo_info("user/secret").private
    assert HfApi(endpoint=hub.endpoint, token="hf_reader").repo_info("user/secret").private
    assert not anonymous.repo_info(REPO).private


def test_a_read_token_cannot_write(hub, api):
    reader = HfApi(endpoint=hub.endpoint, token="hf_reader")
    for refused in (
        lambda: reader.create_repo("user/mine"),
        lambda: put(reader, {"a.txt": b"a"}),
        lambda: reader.create_branch(REPO, branch="b"),
        lambda: reader.delete_repo(REPO),
    ):
        with pytest.raises(HfHubHTTPError, match="write token") as caught:
            refused()
        assert caught.value.response.status_code == 403
    assert len(hub.commits(REPO)) == 1


@pytest.mark.parametrize("token", ["hf_unknown", False])
def test_an_unknown_or_missing_token_cannot_write(hub, api, token):
    with pytest.raises(HfHubHTTPError) as caught:
        put(HfApi(endpoint=hub.endpoint, token=token), {"a.txt": b"a"})
    assert caught.value.response.status_code == 401


def test_the_owner_of_a_token_is_told(hub, api):
    assert api.whoami()["name"] == "user"
    assert get_token() is None
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.endpoint, token="hf_unknown").whoami()


# Uploads


def test_small_large_and_multipart_files_arrive_in_one_commit(hub, api):
    files = {
        "notes.txt": b"hello",
        "empty.safetensors": b"",
        "long.txt": b"l" * 4001,
        "weights.safetensors": b"w" * 5000,
        "more.safetensors": bytes(range(256)) * 40,
    }
    info = put(api, files, commit_description="why")
    assert own_files(hub) == files
    assert [commit.oid for commit in hub.commits(REPO)][1:] == [info.oid]
    assert hub.commits(REPO)[-1].description == "why"
    parts = [path for method, path in hub.requests if method == "PUT" and path[5:].count("/")]
    assert len(parts) == 6  # 10,240 bytes in parts of 2,000
    assert ("POST", "/api/complete_multipart") in hub.requests
    large = {file.path for file in api.list_repo_tree(REPO, recursive=True) if file.lfs}
    assert large == {"long.txt", "weights.safetensors", "more.safetensors"}


def test_an_object_that_is_already_there_is_not_sent_again(hub, api):
    data = b"w" * 9000
    addition = CommitOperationAdd("a.bin", io.BytesIO(data))
    api.preupload_lfs_files(REPO, [addition], free_memory=False)
    assert own_files(hub) == {}
    hub.requests.clear()
    put(api, {"a.bin": data, "b/again.bin": data})
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert own_files(hub) == {"a.bin": data, "b/again.bin": data}


def test_unchanged_files_make_no_commit(hub, api):
    files = {"a.txt": b"a", "b.bin": b"b"}
    first = put(api, files)
    assert put(api, files).oid == first.oid
    assert put(api, {"a.txt": b"other"}).oid != first.oid
    body = '{"key": "header", "value": {"summary": "nothing"}}\n'
    headers = {"Authorization": "Bearer hf_writer"}
    url = f"{hub.endpoint}/api/models/{REPO}/commit/main"
    head = hub.commits(REPO)[-1].oid
    assert httpx2.post(url, content=body, headers=headers).json()["commitOid"] == head
    assert len(hub.commits(REPO)) == 3


def test_a_commit_on_a_stale_parent_is_refused_and_changes_nothing(hub, api):
    parent = api.repo_info(REPO).sha
    put(api, {"a.txt": b"a"}, parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        put(api, {"b.txt": b"b"}, parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert own_files(hub) == {"a.txt": b"a"}


def test_of_two_writers_on_one_parent_one_succeeds(hub, api):
    parent = api.repo_info(REPO).sha

    def write(number):
        try:
            put(api, {f"{number}.bin": b"%d" % number}, parent_commit=parent)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(write, range(8))) == [200] + 7 * [412]
    assert len(hub.commits(REPO)) == 2


def test_files_and_folders_are_deleted(hub, api):
    put(api, {"a.txt": b"a", "d/b.txt": b"b", "d/e/c.bin": b"c", "dd.txt": b"d"})
    api.delete_file("a.txt", REPO)
    api.delete_folder("d", REPO)
    assert own_files(hub) == {"dd.txt": b"d"}
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("a.txt", REPO)
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_folder("d", REPO)


def test_a_folder_is_replaced_in_one_commit(hub, api):
    put(api, {"d/a.txt": b"a", "d/b.txt": b"b"})
    delete = CommitOperationDelete("d/", is_folder=True)
    add = CommitOperationAdd("d/a.txt", b"new")
    api.create_commit(REPO, [delete, add], commit_message="replace")
    assert own_files(hub) == {"d/a.txt": b"new"}
    delete = CommitOperationDelete("d/", is_folder=True)
    api.create_commit(REPO, [delete, CommitOperationAdd("d", b"file")], commit_message="file")
    assert own_files(hub) == {"d": b"file"}
    with pytest.raises(BadRequestError, match="both a file and a folder"):
        put(api, {"d/a.txt": b"a"})


def test_files_are_copied_also_from_another_revision(hub, api):
    old = put(api, {"a.bin": b"old", "a.txt": b"old text"}).oid
    put(api, {"a.bin": b"new", "a.txt": b"new text"})
    hub.requests.clear()
    operations = [
        CommitOperationCopy("a.bin", "copy/now.bin"),
        CommitOperationCopy("a.bin", "copy/then.bin", src_revision=old),
        CommitOperationCopy("a.txt", "copy/then.txt", src_revision=old),
    ]
    api.create_commit(REPO, operations, commit_message="copy")
    files = own_files(hub)
    assert files["copy/now.bin"] == b"new"
    assert files["copy/then.bin"] == b"old"
    assert files["copy/then.txt"] == b"old text"
    assert not [path for method, path in hub.requests if method == "PUT"]
    with pytest.raises(EntryNotFoundError):
        operation = CommitOperationCopy("nope.bin", "copy/nope.bin")
        api.create_commit(REPO, [operation], commit_message="copy")


def test_a_pointer_to_an_object_that_was_not_uploaded_is_refused(hub, api):
    missing = hashlib.sha256(b"missing").hexdigest()
    lines = (
        '{"key": "header", "value": {"summary": "pointer"}}\n'
        '{"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}}\n'
        f'{{"key": "lfsFile", "value": {{"path": "a.bin", "oid": "{missing}", "size": 7}}}}\n'
    )
    url = f"{hub.endpoint}/api/models/{REPO}/commit/main"
    answer = httpx2.post(url, content=lines, headers={"Authorization": "Bearer hf_writer"})
    assert answer.status_code == 400
    assert "LFS pointer" in answer.json()["error"]
    assert own_files(hub) == {}


@pytest.mark.parametrize("size", [100, 9000])
def test_an_object_damaged_on_the_way_is_refused(hub, api, size):
    hub.faults.add(Flip(request=True), method="PUT", nth=1)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'a.bin'") as caught:
        put(api, {"a.bin": b"w" * size})
    assert "announced" in str(caught.value.__cause__)
    assert own_files(hub) == {}
    put(api, {"a.bin": b"w" * size})
    assert own_files(hub) == {"a.bin": b"w" * size}


def test_ignored_files_are_left_out(hub, api):
    put(api, {".gitignore": b"*.log\n# no\nbuild/\n"})
    put(api, {"a.log": b"a", "build/b.txt": b"b", "c.txt": b"c"})
    assert set(own_files(hub)) == {".gitignore", "c.txt"}


def test_gitattributes_decides_what_is_large(hub, api):
    put(api, {".gitattributes": b"*.txt filter=lfs diff=lfs merge=lfs -text\n"})
    put(api, {"a.txt": b"a", "a.bin": b"b"})
    large = {file.path: bool(file.lfs) for file in api.list_repo_tree(REPO)}
    assert large == {".gitattributes": False, "a.txt": True, "a.bin": False}


def test_a_path_or_bytes_need_xet_and_open_files_do_not(hub, api, tmp_path, monkeypatch):
    """As of huggingface_hub 2.4 the client asks for Xet first and does not fall back."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"w")
    for source in (path, b"w"):
        with pytest.raises(ConnectionError, match="xet-write-token"):
            api.upload_file(path_or_fileobj=source, path_in_repo="a.bin", repo_id=REPO)
    with path.open("rb") as file:
        api.upload_file(path_or_fileobj=file, path_in_repo="a.bin", repo_id=REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    api.upload_file(path_or_fileobj=path, path_in_repo="b.bin", repo_id=REPO)
    api.upload_folder(folder_path=tmp_path, path_in_repo="folder", repo_id=REPO)
    assert own_files(hub) == {"a.bin": b"w", "b.bin": b"w", "folder/a.bin": b"w"}


def test_a_model_card_is_accepted(hub, api):
    put(api, {"README.md": b"---\nlicense: mit\n---\n# Library\n"})
    assert ("POST", "/api/validate-yaml") in hub.requests


# Listings


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


# Revisions


def test_commits_are_listed_newest_first_page_by_page(hub, api):
    for number in range(7):
        put(api, {"a.txt": b"%d" % number}, commit_message=f"number {number}")
    told = api.list_repo_commits(REPO, formatted=True)
    assert [each.commit_id for each in told] == [each.oid for each in hub.commits(REPO)][::-1]
    assert [each.title for each in told] == [f"number {6 - n}" for n in range(7)] + [
        "initial commit"
    ]
    assert told[0].authors == ["user"]
    assert hub.files(REPO, revision=told[2].commit_id)["a.txt"] == b"4"


def test_branches_and_tags_keep_what_they_name(hub, api):
    old = put(api, {"a.txt": b"old"}).oid
    api.create_branch(REPO, branch="side/way")
    api.create_tag(REPO, tag="v 1/x", revision=old)
    put(api, {"a.txt": b"new"})
    put(api, {"a.txt": b"side"}, revision="side/way")
    refs = api.list_repo_refs(REPO)
    assert {each.name for each in refs.branches} == {"main", "side/way"}
    assert [(each.name, each.target_commit) for each in refs.tags] == [("v 1/x", old)]
    assert own_files(hub) == {"a.txt": b"new"}
    assert own_files(hub, revision="side/way") == {"a.txt": b"side"}
    assert own_files(hub, revision="v 1/x") == {"a.txt": b"old"}
    assert api.repo_info(REPO, revision="v 1/x").sha == old
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch="side/way")
    api.create_branch(REPO, branch="side/way", exist_ok=True)
    api.create_tag(REPO, tag="v 1/x", exist_ok=True)
    api.delete_branch(REPO, branch="side/way")
    api.delete_tag(REPO, tag="v 1/x")
    for gone in ("side/way", "v 1/x", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.repo_info(REPO, revision=gone)


def test_a_branch_starts_where_it_is_told(hub, api):
    old = put(api, {"a.txt": b"old"}).oid
    put(api, {"a.txt": b"new"})
    api.create_branch(REPO, branch="back", revision=old)
    assert hub.commits(REPO, revision="back")[-1].oid == old


def test_only_a_branch_takes_commits(api):
    old = put(api, {"a.txt": b"old"}).oid
    with pytest.raises(RevisionNotFoundError):
        put(api, {"a.txt": b"new"}, revision=old)


def test_a_squashed_history_keeps_the_files(hub, api):
    put(api, {"a.txt": b"a", "b.bin": b"b"})
    files = hub.files(REPO)
    api.super_squash_history(REPO, commit_message="one")
    assert [each.title for each in hub.commits(REPO)] == ["one"]
    assert hub.files(REPO) == files


# Downloads


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


# Faults


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
