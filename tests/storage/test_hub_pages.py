"""Pages for people are in the commit of the change they tell of, and never stand in its way."""

import pickle
import warnings

import pytest

from mttl_storage import Repository
from mttl_storage.testing.hub import Status


def listing(view):
    return {"README.md": " ".join(view).encode()}


@pytest.fixture
def open_with(hub, new_address):
    """Opens the same repository again and again, with pages."""
    address = new_address("hf")
    name = address.removeprefix("hf://")
    Repository.open(address, create=True)

    def open_one(pages=listing):
        return Repository.open(address, pages=pages)

    open_one.commits = lambda: hub.commits(name)
    open_one.page = lambda: hub.files(name).get("README.md", b"").decode()
    yield open_one
    hub.faults.clear()


def test_a_change_and_its_pages_are_one_commit_of_the_hub(open_with):
    repository, before = open_with(), len(open_with.commits())
    repository.add("experts/a", {"f": b"1"})
    with repository.batch() as batch:
        batch.add("experts/b", {"f": b"2"})
        batch.remove("experts/a")
    pickle.loads(pickle.dumps(repository)).rename("experts/b", "experts/c")
    assert open_with.page() == "experts/c"
    assert len(open_with.commits()) == before + 3
    assert open_with().verify() == []


def test_pages_are_made_again_when_another_writer_was_first(open_with):
    other, views = open_with(), []

    def slowly(view):
        views.append((view.generation, list(view)))
        if len(views) == 1:
            other.add("experts/other", {"f": b"1"})
        if len(views) == 2:  # not through the log, as the hub's web page does
            other.store.pipe_file("notes.txt", b"mine")
        return listing(view)

    open_with(slowly).add("experts/mine", {"f": b"2"})
    assert views == [(1, ["experts/mine"]), *[(2, ["experts/mine", "experts/other"])] * 2]
    assert open_with.page() == "experts/mine experts/other"


def test_a_page_that_cannot_be_made_loses_no_change(open_with):
    def broken(view):
        raise KeyError("no such expert")

    with pytest.warns(UserWarning, match="committed without its pages: 'no such expert'"):
        open_with(broken).add("experts/a", {"f": b"1"})
    assert list(open_with()) == ["experts/a"]
    assert open_with.page() == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="without its pages"):
            open_with(broken).add("experts/b", {"f": b"1"})
    assert list(open_with()) == ["experts/a", "experts/b"]


@pytest.mark.parametrize("status", [400, 503])
def test_a_page_that_the_hub_refuses_loses_no_change(hub, open_with, status):
    hub.faults.add(Status(status), path="/api/validate-yaml")
    before = len(open_with.commits())
    with pytest.warns(UserWarning, match="committed without its pages"):
        open_with().add("experts/a", {"f": b"1"})
    assert list(open_with()) == ["experts/a"]
    assert open_with.page() == ""
    hub.faults.clear()
    open_with().add("experts/b", {"f": b"1"})
    assert open_with.page() == "experts/a experts/b"
    assert len(open_with.commits()) == before + 2


def test_what_fails_with_and_without_pages_is_the_error_of_the_change(hub, open_with):
    hub.faults.add(Status(403, "you cannot write"), path="/commit/")
    with pytest.raises(PermissionError, match="refuses the credential"):
        open_with().add("experts/a", {"f": b"1"})


def test_pages_are_not_made_where_they_would_be_a_change_of_their_own(tmp_path):
    repository = Repository.open(tmp_path / "library", create=True, pages=pytest.fail)
    repository.add("experts/a", {"f": b"1"})
    assert not repository.store.exists("README.md")
