"""The verbs that every store has, and fsspec's own contract suite on each."""

import os
import pickle
import threading

import fsspec
import pytest
from fsspec.tests import abstract

from mttl_storage import Conflict, Denied, NotFound, StorageError, filesystem
from mttl_storage.store import Store
from mttl_storage.store.virtual import VirtualStore


@pytest.fixture
def store(address):
    store = filesystem(address)
    store.prepare()
    return store


def test_put_if_absent_creates_once(store):
    assert store.put_if_absent("a/b", b"one")
    assert not store.put_if_absent("a/b", b"two")
    assert store.cat_file("a/b") == b"one"


def test_of_many_threads_exactly_one_creates(store):
    won = []
    barrier = threading.Barrier(8)

    def create(number):
        barrier.wait()
        if store.put_if_absent("x", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.cat_file("x")] == [b"%d" % n for n in won]


def test_compare_and_swap_needs_the_version_it_read(store):
    first = store.compare_and_swap("a", b"1", None)
    assert first == store.version("a")
    with pytest.raises(Conflict, match="read it again"):
        store.compare_and_swap("a", b"2", None)
    second = store.compare_and_swap("a", b"2", first)
    assert second != first
    with pytest.raises(Conflict):
        store.compare_and_swap("a", b"3", first)
    assert store.cat_file("a") == b"2"


def test_a_renewed_file_is_not_deleted_by_who_saw_it_before(store):
    store.pipe_file("a", b"1")
    [seen] = [entry for entry in store.scan() if entry.key == "a"]
    if store.scheme == "hf":  # where any commit after it was seen spares a file
        store.pipe_file("b", b"1")
    else:
        assert store.renew("a").version != seen.version
    assert not store.delete_if_unchanged("a", seen.version)
    assert store.delete_if_unchanged("a", store.version("a"))
    assert not store.delete_if_unchanged("a", seen.version)
    assert store.renew("a") is None


def test_a_missing_key_is_file_not_found(store):
    with pytest.raises(FileNotFoundError, match="nope") as caught:
        store.cat_file("nope")
    assert isinstance(caught.value, NotFound)
    with pytest.raises(NotFound):
        store.info("nope")
    assert list(store.scan("nope")) == []


@pytest.mark.parametrize("key", ["../x", "a/../../x", "a\0"])
def test_no_path_leaves_the_root(store, key):
    with pytest.raises(ValueError, match="leave its root"):
        store.pipe_file(key, b"")


def test_links_out_of_the_root_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("x")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    store = filesystem(root)
    for key in ("link", "folder/secret"):
        with pytest.raises(Denied, match="leads out of"):
            store.cat_file(key)
    assert [entry.key for entry in store.scan()] == []


def test_a_root_reached_through_a_link_works(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    filesystem(tmp_path / "link").pipe_file("a", b"1")
    assert (tmp_path / "real" / "a").read_bytes() == b"1"


@pytest.mark.parametrize("mode", ["wb", "w", "ab", "xb"])
def test_a_file_appears_whole_at_close_and_not_if_the_block_raises(store, mode):
    data = b"new" if "b" in mode else "new"
    with pytest.raises(ZeroDivisionError), store.open("a/f", mode) as file:
        file.write(data)
        file.flush()
        raise ZeroDivisionError
    assert not store.exists("a/f")
    with store.open("a/f", mode) as file:
        file.write(data)
        file.flush()
        assert not store.exists("a/f")
    assert store.cat_file("a/f") == b"new"
    assert [entry.key for entry in store.scan("a")] == ["a/f"]


def test_append_and_text(store):
    with store.open("f", "w", encoding="utf-8") as file:
        file.write("é")
    with store.open("f", "ab") as file:
        file.write(b"x")
    assert store.read_text("f", encoding="utf-8") == "éx"
    assert store.cat_file("f", start=-1) == b"x"
    with pytest.raises(ValueError, match="whole"):
        store.open("f", "r+b")


def test_a_dropped_file_object_leaves_nothing(store):
    file = store.open("f", "wb")
    file.write(b"x")
    del file
    assert not store.exists("f")


def test_a_transaction_is_all_or_nothing(store):
    with pytest.raises(ZeroDivisionError), store.transaction, store.open("f", "wb") as file:
        file.write(b"1")
        raise ZeroDivisionError
    assert not store.exists("f")
    with store.transaction:
        with store.open("f", "wb") as file:
            file.write(b"1")
        assert not store.exists("f")
    assert store.cat_file("f") == b"1"


def test_a_store_is_pickled_as_its_address(store):
    store.pipe_file("a", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again == store
    assert again.cat_file("a") == b"1"


def test_folders_and_files_do_not_mix(store):
    store.pipe_file("a/b", b"1")
    with pytest.raises(IsADirectoryError):
        store.open("a", "wb")
    with pytest.raises(IsADirectoryError):
        store.rm("a")
    if store.scheme != "az":  # whose keys are not folders, so both can be
        with pytest.raises((NotADirectoryError, FileExistsError, StorageError)):
            store.pipe_file("a/b/c", b"1")
    store.rm("a", recursive=True)
    assert not store.exists("a")


def test_half_written_files_are_hidden_and_tidied(tmp_path):
    store = filesystem(tmp_path)
    store.pipe_file("a/f", b"1")
    (tmp_path / "a" / ".mttl-tmp-0").write_bytes(b"half")
    assert store.ls("a", detail=False) == ["a/f"]
    assert [entry.key for entry in store.scan()] == ["a/f"]
    assert store.tidy(0) == 0
    assert store.tidy((tmp_path / "a" / ".mttl-tmp-0").stat().st_mtime + 1) == 1


def test_without_hard_links_creation_is_still_exclusive(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    store = filesystem(tmp_path)
    assert store.put_if_absent("a", b"1")
    assert not store.put_if_absent("a", b"2")
    assert store.cat_file("a") == b"1"


def test_only_virtual_is_registered_with_fsspec():
    assert fsspec.get_filesystem_class("virtual") is VirtualStore
    for protocol in ("local", "file", "memory"):
        assert not issubclass(fsspec.get_filesystem_class(protocol), Store)
    with fsspec.open("virtual://registered/f", "wb") as file:
        file.write(b"1")
    assert filesystem("virtual://registered").cat_file("f") == b"1"
    fsspec.filesystem("virtual").rm("registered", recursive=True)


class Contract(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, store):
        return store

    @pytest.fixture
    def fs_path(self):
        return "base"

    @pytest.fixture
    def supports_empty_directories(self, store):
        return not store.distant


class TestCopyContract(Contract, abstract.AbstractCopyTests):
    pass


class TestGetContract(Contract, abstract.AbstractGetTests):
    pass


class TestPutContract(Contract, abstract.AbstractPutTests):
    pass


class TestOpenContract(Contract, abstract.AbstractOpenTests):
    pass


class TestPipeContract(Contract, abstract.AbstractPipeTests):
    pass
