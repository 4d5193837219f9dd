"""Commits, branches and tags on the loopback hub."""

import pytest
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from tests.storage.testing_hub.client import REPO, own_files, put


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
