"""What the client uploads to the loopback hub."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import BadRequestError, EntryNotFoundError, HfHubHTTPError

from mttl_storage.testing.hub import Flip
from tests.storage.testing_hub.client import REPO, own_files, put


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
