import json
import pickle

import pytest

from mttl_storage import Conflict, Corrupt, NotFound, ReadOnly, Repository, StorageError

FILES = {"weights.bin": b"\0" * 1000, "config.json": b"{}"}


def test_a_new_repository_has_generation_zero_and_opening_it_again_keeps_it(address):
    with pytest.raises(NotFound, match="create=True"):
        Repository.open(address)
    repository = Repository.open(address, create=True)
    assert (repository.generation, repository.items(), repository.uri) == (0, {}, address)
    repository.add("experts/a", FILES)
    again = Repository.open(address, create=True)
    assert again.generation == 1
    assert again.read("experts/a", "config.json") == b"{}"


def test_an_item_is_what_was_added(repository):
    item = repository.add("experts/a", FILES, {"metrics": {"acc": 0.5}, "tags": ("x", "y")})
    assert item == repository.item("experts/a") == repository.items()["experts/a"]
    assert item.info == {"metrics": {"acc": 0.5}, "tags": ["x", "y"]}
    assert {n: e.size for n, e in item.files.items()} == {"weights.bin": 1000, "config.json": 2}
    assert (item.generation, item.size) == (1, 1002)
    assert repository.open_file("experts/a", "config.json").read() == b"{}"
    folder = repository.path("experts/a")
    assert folder.name == item.digest
    assert (folder / "weights.bin").read_bytes() == FILES["weights.bin"]
    assert repository.path("experts/a", "config.json").read_bytes() == b"{}"


def test_the_files_lie_under_name_and_digest(repository):
    item = repository.add("experts/a", FILES)
    folder = repository.store.items_folder or "."
    key = f"{folder}/experts/a/{item.digest}/config.json"
    assert repository.store.cat_file(key) == b"{}"


def test_files_can_be_paths_and_folders_within_an_item(repository, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"abc" * 10**6)
    repository.add("a", {"x/y": source, "x/z": b""})
    assert repository.read("a", "x/y") == source.read_bytes()
    assert (repository.path("a") / "x" / "z").read_bytes() == b""


def test_an_item_may_have_no_files(repository):
    repository.add("a", {}, {"k": 1})
    assert repository.items()["a"].files == {}
    assert repository.verify() == []
    assert repository.path("a").is_dir()


def test_items_are_sorted_and_chosen_by_prefix(repository):
    with repository.batch() as batch:
        for name in ("b", "a/y", "c", "a/x"):
            batch.add(name, {})
    assert list(repository.items()) == list(repository) == ["a/x", "a/y", "b", "c"]
    assert list(repository.items("a/")) == ["a/x", "a/y"]
    assert len(repository) == 4
    assert "b" in repository


def test_adding_the_same_again_changes_nothing(repository):
    first = repository.add("a", FILES, {"k": 1})
    assert repository.add("a", FILES, {"k": 1}) == first
    assert repository.generation == 1
    with pytest.raises(Conflict, match="other content"):
        repository.add("a", {"config.json": b"[]"}, {"k": 1})
    with pytest.raises(Conflict, match="other info"):
        repository.add("a", FILES, {"k": 2})
    assert repository.generation == 1


def test_replace_checks_what_it_expects(repository):
    first = repository.add("a", FILES, {"k": 1})
    with pytest.raises(Conflict, match="as expected"):
        repository.replace("a", {}, expected="0" * 64)
    second = repository.replace("a", {"new": b"1"}, expected=first.digest)
    assert (second.info, list(second.files), second.generation) == ({"k": 1}, ["new"], 2)
    assert repository.replace("a", {"new": b"1"}, {"k": 2}).info == {"k": 2}
    with pytest.raises(NotFound):
        repository.replace("b", {})


def test_info_can_be_updated_without_touching_files(repository):
    first = repository.add("a", FILES, {"k": 1})
    second = repository.update_info("a", {"m": 2})
    assert (second.digest, second.info, second.generation) == (first.digest, {"m": 2}, 2)
    assert repository.update_info("a", {"m": 2}).generation == 2


def test_removed_items_can_be_restored(repository):
    item = repository.add("a", FILES, {"k": 1})
    repository.remove("a")
    assert list(repository.removed()) == ["a"]
    with pytest.raises(NotFound, match="was removed, and can be restored"):
        repository.read("a", "config.json")
    restored = repository.restore("a")
    assert (restored.digest, restored.info) == (item.digest, {"k": 1})
    assert repository.restore("a") == restored
    with pytest.raises(NotFound, match="no item 'b' was removed"):
        repository.restore("b")


def test_renaming_moves_no_files(repository):
    item = repository.add("a", FILES, {"k": 1})
    renamed = repository.rename("a", "B")
    assert (renamed.digest, renamed.info, list(repository)) == (item.digest, {"k": 1}, ["B"])
    assert repository.read("B", "config.json") == b"{}"
    assert repository.rename("B", "b").name == "b"
    repository.add("a", {"other": b"1"})
    with pytest.raises(Conflict):
        repository.rename("a", "b")
    assert repository.replace("b", {"new": b"2"}).files.keys() == {"new"}
    assert repository.verify() == []


def test_an_unknown_item_or_file_names_near_ones(repository):
    repository.add("experts/arithmetic", FILES)
    with pytest.raises(NotFound, match="did you mean 'experts/arithmetic'"):
        repository.item("experts/aritmetic")
    with pytest.raises(NotFound, match="has no file 'x'; it has 'config.json', 'weights.bin'"):
        repository.read("experts/arithmetic", "x")


@pytest.mark.parametrize(
    "name", ["A", "a/b", "..", "con", "a\0", ".mttl/log/0", "/abs", "x" * 4096, "é" + "x" * 4096]
)
def test_names_that_clash_or_cannot_be_stored_are_refused(repository, name):
    repository.add("a", {})
    with pytest.raises((Conflict, ValueError)):
        repository.add(name, {})
    with pytest.raises(ValueError, match=r"cannot|lie in|case"):
        repository.add("ok", {name: b"", "a": b"", "c": b""})
    assert list(repository) == ["a"]


def test_an_item_cannot_lie_around_another(repository):
    repository.add("a/b/c", {})
    for name in ("a", "A/b"):
        with pytest.raises(Conflict, match="folder"):
            repository.add(name, {})
    repository.remove("a/b/c")
    repository.add("a", {})
    with pytest.raises(Conflict, match="inside"):
        repository.restore("a/b/c")


@pytest.mark.parametrize(
    ("info", "error"),
    [
        ({1: 2}, "str"),
        ({"a": float("nan")}, "JSON"),
        ({"a": {1}}, "JSON"),
        ({"a": "x" * 10**6}, "at most"),
    ],
)
def test_info_that_json_cannot_keep_is_refused(repository, info, error):
    with pytest.raises(ValueError, match=error):
        repository.add("a", {}, info)


def test_files_are_bytes_or_paths(repository, tmp_path):
    with pytest.raises(TypeError, match="bytes or a Path, not str"):
        repository.add("a", {"x": "text"})
    with pytest.raises(NotFound, match="missing"):
        repository.add("a", {"x": tmp_path / "missing"})


def test_a_batch_is_one_commit_or_nothing(repository):
    repository.add("old", FILES)
    with repository.batch("three changes") as batch:
        batch.add("new", FILES)
        batch.update_info("new", {"k": 1})
        batch.remove("old")
    assert repository.generation == 2
    assert repository.items()["new"].info == {"k": 1}
    assert [c.kind for c in repository.history()[1].changes] == ["add", "info", "remove"]
    with pytest.raises(ZeroDivisionError), repository.batch() as batch:
        batch.add("more", {})
        raise ZeroDivisionError
    with pytest.raises(NotFound), repository.batch() as batch:
        batch.add("more", {})
        batch.remove("missing")
    with repository.batch():
        pass
    assert (repository.generation, list(repository)) == (2, ["new"])


def test_history_at_and_diff(repository):
    a = repository.add("a", {"f": b"1"})
    repository.add("b", {})
    new = repository.replace("a", {"f": b"2"})
    repository.update_info("b", {"k": 1})
    repository.remove("b")
    assert [c.generation for c in repository.history()] == [1, 2, 3, 4, 5]
    assert [c.changes[0].kind for c in repository.history()] == [
        "add",
        "add",
        "replace",
        "info",
        "remove",
    ]
    assert repository.history()[2].changes[0].previous == a.digest
    past = repository.at(2)
    assert (past.generation, list(past), past.read("a", "f")) == (2, ["a", "b"], b"1")
    assert len(past.history()) == 2
    assert past.refresh().generation == 2
    with pytest.raises(ReadOnly, match="past generation"):
        past.remove("a")
    assert [(c.kind, c.name) for c in repository.diff(2, 5)] == [("replace", "a"), ("remove", "b")]
    assert repository.diff(1, 3)[0].digest == new.digest
    for missing in (6, -1):
        with pytest.raises(NotFound, match="no generation"):
            repository.at(missing)


def test_readers_stay_at_their_generation_until_refreshed(address, repository):
    reader = Repository.open(address)
    repository.add("a", FILES)
    assert (reader.generation, list(reader)) == (0, [])
    assert list(reader.refresh()) == ["a"]


def test_writers_of_different_items_both_succeed(address, repository):
    other = Repository.open(address)
    repository.add("a", FILES)
    other.add("b", FILES)
    assert (other.generation, list(other)) == (2, ["a", "b"])


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.add("a", {"x": b"other"}),
        lambda r: r.replace("a", {"x": b"other"}),
        lambda r: r.update_info("a", {"k": 9}),
        lambda r: r.remove("a"),
        lambda r: r.rename("a", "z"),
        lambda r: r.rename("c", "a"),
    ],
)
def test_the_second_writer_of_the_same_item_gets_a_conflict(address, repository, change):
    repository.add("a", FILES)
    repository.add("c", FILES)
    other = Repository.open(address)
    repository.update_info("a", {"k": 1})
    with pytest.raises(Conflict):
        change(other)
    assert other.refresh().item("a").info == {"k": 1}


def test_two_writers_of_the_same_bytes_agree(address, repository):
    other = Repository.open(address)
    assert repository.add("a", FILES) == other.add("a", FILES)
    assert other.generation == 1


def test_look_alikes_added_at_once_conflict(address, repository):
    other = Repository.open(address)
    repository.add("Foo", {})
    with pytest.raises(Conflict, match="case"):
        other.add("foo", {})


def test_read_only_refuses_every_change(address, repository):
    repository.add("a", FILES)
    reader = Repository.open(address, read_only=True)
    for change in (
        lambda: reader.add("b", {}),
        lambda: reader.remove("a"),
        lambda: reader.gc(),
        lambda: reader.batch().__enter__(),
    ):
        with pytest.raises(ReadOnly, match="read_only=True"):
            change()
    with pytest.raises(NotFound):
        Repository.open(f"{address}-not-there", create=True, read_only=True)


def test_a_repository_is_pickled_as_address_and_generation(repository):
    repository.add("a", FILES)
    again = pickle.loads(pickle.dumps(repository))
    repository.add("b", FILES)
    assert (again.uri, again.generation, list(again)) == (repository.uri, 1, ["a"])
    past = pickle.loads(pickle.dumps(repository.at(1)))
    assert (list(past), past.read_only) == (["a"], True)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFound):
        Repository.open(tmp_path / "file")
    with pytest.raises(StorageError, match="a file is in the way"):
        Repository.open(tmp_path / "file", create=True)


def test_a_newer_format_is_told_apart_from_damage(repository):
    from mttl_storage.sealed import seal

    body = json.dumps({"format": 2}).encode()
    repository.store.pipe_file(".mttl/repository.json", seal(body))
    with pytest.raises(StorageError, match="has format 2; this version reads up to 1") as caught:
        Repository.open(repository.uri)
    assert not isinstance(caught.value, Corrupt)


def test_materialize_writes_plain_folders(repository, tmp_path):
    repository.add("experts/a", FILES)
    repository.add("datasets/d", {"x/train.parquet": b"1"})
    dest = tmp_path / "plain"
    assert repository.materialize(dest) == dest
    assert (dest / "a" / "config.json").read_bytes() == b"{}"
    assert (dest / "datasets" / "d" / "x" / "train.parquet").read_bytes() == b"1"
    inode = (dest / "a" / "config.json").stat().st_ino
    repository.materialize(dest, ["experts/a"])
    assert (dest / "a" / "config.json").stat().st_ino == inode
    repository.add("a", {"config.json": b"3"})
    with pytest.raises(ValueError, match="would share"):
        repository.materialize(dest)
