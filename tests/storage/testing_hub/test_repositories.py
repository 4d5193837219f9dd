"""Repositories of the loopback hub, and who may use them."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.storage.testing_hub.client import REPO, own_files, put


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
