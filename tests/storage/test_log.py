import pytest

from mttl_storage import Corrupt, Repository
from mttl_storage.log import HEAD, Log, entry_key, snapshot_key
from mttl_storage.store.virtual import VirtualStore


@pytest.fixture
def long():
    """A repository of 205 generations, with snapshots at 100 and 200."""
    repository = Repository.open("virtual://long", create=True)
    for number in range(205):
        if number % 3 == 2:
            repository.remove(f"i{number - 1}")
        else:
            repository.add(f"i{number}", {}, {"n": number})
    yield repository
    repository.store.rm("", recursive=True)


def names_at(generation):
    added = {f"i{n}" for n in range(generation) if n % 3 != 2}
    return sorted(added - {f"i{n - 1}" for n in range(generation) if n % 3 == 2})


def test_opening_reads_the_last_snapshot_and_the_entries_since(long, monkeypatch):
    read = []
    original = VirtualStore.cat_file
    monkeypatch.setattr(
        VirtualStore, "cat_file", lambda self, key, *a, **k: read.append(key) or original(self, key)
    )
    assert list(Repository.open(long.uri)) == names_at(205)
    assert snapshot_key(200) in read
    assert len(read) < 20


@pytest.mark.parametrize("generation", [0, 1, 99, 100, 101, 150, 200, 205])
def test_any_generation_can_be_read(long, generation):
    assert list(long.at(generation)) == names_at(generation)


@pytest.mark.parametrize("gone", [[HEAD], [snapshot_key(200)], [HEAD, snapshot_key(100)]])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_head_and_snapshots_only_save_time(long, gone, how):
    for key in gone:
        if how == "missing":
            long.store.rm_file(key)
        else:
            long.store.pipe_file(key, long.store.cat_file(key)[:-3] + b"???")
    assert list(Repository.open(long.uri)) == names_at(205)
    assert list(long.at(203)) == names_at(203)
    assert [c.generation for c in long.history()] == list(range(1, 206))


def test_an_entry_that_does_not_follow_is_corrupt(long):
    other = Repository.open("virtual://other", create=True)
    other.add("x", {})
    with pytest.raises(Corrupt, match="does not follow"):
        log = Log(long.store)
        log.replay(log.origin(), Log(other.store).entries_after(0))
    other.store.rm("", recursive=True)


def test_a_commit_moves_as_much_in_a_large_repository_as_in_a_small_one(monkeypatch):
    moved = []
    for count in (10, 3000):
        repository = Repository.open(f"virtual://size{count}", create=True)
        with repository.batch() as batch:
            for number in range(count):
                batch.add(f"i{number}", {}, {"n": number})
        wrote = []
        with monkeypatch.context() as patch:
            original = VirtualStore.put_if_absent
            patch.setattr(
                VirtualStore,
                "put_if_absent",
                lambda self, key, data, o=original, w=wrote: (
                    w.append(len(data)) or o(self, key, data)
                ),
            )
            repository.add("new", {"f": b"1"})
        moved.append(wrote)
        repository.store.rm("", recursive=True)
    assert moved[0] == moved[1]
    assert len(moved[0]) == 1


def test_entry_keys_are_in_order_and_a_hundred_to_a_folder():
    keys = [entry_key(number) for number in range(1, 301)]
    assert keys == sorted(keys)
    assert len({key.rpartition("/")[0] for key in keys}) == 3
    assert keys[99].rpartition("/")[0] == keys[0].rpartition("/")[0]
