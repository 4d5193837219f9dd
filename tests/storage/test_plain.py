"""Files that no repository keeps are read as the items of one, and never changed."""

import hashlib
import pickle

import pytest

from mttl_storage import (
    Corrupt,
    FileEntry,
    NotFound,
    PlainItem,
    PlainRepository,
    ReadOnly,
    Repository,
    copy,
    filesystem,
    parse_uri,
)

FILES = {"deep/one": b"1", "two": b"22"}


def look(store):
    """A folder that has a note is an item."""
    for key in store.find(""):
        if key.endswith("note"):
            folder, data = key.removesuffix("note"), store.cat_file(key)
            entry = FileEntry(len(data), hashlib.sha256(data).hexdigest())
            name = f"items/{folder.rstrip('/').rpartition('/')[2] or 'root'}"
            yield PlainItem(name, folder, {"note": entry}, {"size": len(data)}, 0.0)


@pytest.fixture
def store(address):
    store = filesystem(address)
    store.prepare()
    store.pipe({f"{folder}/note": data for folder, data in FILES.items()})
    return store


def test_it_reads_as_a_repository_does(store, address, new_address, tmp_path):
    plain = PlainRepository(parse_uri(address), look)
    assert plain.generation == 0
    assert {name: plain.read(name, "note") for name in plain} == {
        "items/one": b"1",
        "items/two": b"22",
    }
    assert plain.item("items/two").info == {"size": 2}
    assert plain.path("items/one", "note").read_bytes() == b"1"
    assert (plain.path("items/two") / "note").read_bytes() == b"22"
    with plain.open_file("items/two", "note") as file:
        assert file.read() == b"22"
    assert (plain.materialize(tmp_path / "plain") / "items" / "one" / "note").read_bytes() == b"1"
    assert plain.verify() == plain.history() == []
    again = pickle.loads(pickle.dumps(plain))
    assert again.items() == plain.items()
    target = Repository.open(new_address("local"), create=True)
    assert copy(plain, target) == 2
    assert target.read("items/one", "note") == b"1"
    assert target.item("items/one").digest == plain.item("items/one").digest


def test_what_was_changed_since_is_told_until_it_is_looked_at_again(store, address, tmp_path):
    plain = PlainRepository(parse_uri(address), look)
    plain.path("items/two")
    store.pipe_file("two/note", b"other")
    reads = [lambda: plain.read("items/two", "note"), lambda: plain.materialize(tmp_path / "plain")]
    if store.on_disk:  # elsewhere there is a right copy of it
        reads.append(lambda: plain.path("items/two"))
    for read in reads:
        with pytest.raises(Corrupt, match="was changed since it was looked at; open it again"):
            read()
    assert [problem.where for problem in plain.verify()] == ["items/two"]
    assert plain.refresh().verify() == []
    assert plain.read("items/two", "note") == b"other"


def test_a_file_at_the_root_has_its_place(tmp_path):
    (tmp_path / "note").write_bytes(b"3")
    plain = PlainRepository(parse_uri(tmp_path), look)
    assert plain.read("items/root", "note") == b"3"
    assert plain.path("items/root") == tmp_path


def test_it_is_only_read_and_has_no_past(store, address):
    plain, before = PlainRepository(parse_uri(address), look, what="notes"), set(store.find(""))
    for change in (
        lambda: plain.add("items/three", {}),
        lambda: plain.remove("items/one"),
        plain.gc,
    ):
        with pytest.raises(ReadOnly, match="holds plain notes, which are only read"):
            change()
    with pytest.raises(NotFound, match="have no generations"):
        plain.at(0)
    with pytest.raises(NotFound, match="has no file 'x'"):
        plain.read("items/one", "x")
    assert set(store.find("")) == before
