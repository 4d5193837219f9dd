import os
import threading
import time

import pytest

from mttl_storage import NotFound, Repository, collecting
from mttl_storage.store.transfer import Upload

OLD = {"f": b"old"}
NEW = {"f": b"new"}


def contents(repository):
    """What there is beside the log, by its name below the folder that items lie in."""
    folder = repository.store.items_folder
    keys = {entry.key.removeprefix(f"{folder}/") for entry in repository.store.scan()}
    return {key for key in keys if not key.startswith(".")}


def test_gc_deletes_what_nothing_needs_and_nothing_else(repository):
    old = repository.add("a", OLD)
    repository.replace("a", NEW)
    repository.add("b", NEW)
    repository.remove("b")
    repository.add("c", OLD)
    repository.rename("c", "d")
    repository.store.pipe_file("README.md", b"mine")
    repository.store.pipe_file(f"{repository.store.item_folder('a', old.digest)}/extra", b"orphan")
    collected = repository.gc(grace=0)
    assert (collected.items, collected.files, collected.bytes) == (1, 3, 3 + 3 + 6)
    assert contents(repository) == {
        "README.md",
        f"a/{repository.item('a').digest}/f",
        f"c/{repository.item('d').digest}/f",
    }
    assert repository.verify() == []
    assert repository.read("d", "f") == b"old"
    with pytest.raises(NotFound, match="gc has collected it"):
        repository.restore("b")
    assert repository.gc(grace=0).files == 0


def test_the_grace_period_spares_everything_young(repository):
    repository.add("a", OLD)
    repository.replace("a", NEW)
    repository.remove("a")
    before = contents(repository)
    assert repository.gc().files == 0
    assert contents(repository) == before
    assert repository.restore("a").generation == 4
    assert repository.at(1).read("a", "f") == b"old"


def test_a_replaced_item_is_kept_for_its_readers_though_its_files_are_old(local):
    item = local.add("a", OLD)
    path = local.path("a", "f")
    os.utime(path, (0, 0))
    local.replace("a", NEW)
    assert local.gc(grace=3600).files == 0
    assert local.at(1).read("a", "f") == b"old"
    assert local.gc(grace=0).files == 1
    assert not path.exists()
    with pytest.raises(NotFound, match=item.digest):
        local.at(1).read("a", "f")


def test_files_of_a_writer_in_flight_are_spared(repository):
    upload = Upload(b"x", 1, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881")
    key = f"{repository.store.item_folder('a', '0' * 64)}/f"
    repository.store.stage([lambda: {key: upload}])
    assert repository.gc(grace=60).files == 0
    seen = repository.store.exists(key)
    assert seen == (repository.store.scheme != "hf")  # there, nothing is seen before the commit
    assert repository.gc(grace=0).files == seen


def test_a_writer_renews_old_files_that_it_finds(local):
    local.add("a", OLD)
    path = local.path("a", "f")
    local.remove("a")
    os.utime(path, (0, 0))
    writer = Repository.open(local.uri)
    writer.add("b", {})
    writer.add("a", OLD)
    assert path.stat().st_mtime > time.time() - 60
    assert local.gc(grace=1).files == 0
    assert local.read("a", "f") == b"old"


def test_restoring_against_gc_has_one_winner(address, repository):
    repository.add("a", OLD)
    repository.remove("a")
    other = Repository.open(address)
    repository.gc(grace=0)
    with pytest.raises(Exception, match="someone else|collected"):
        other.restore("a")
    assert repository.verify() == []


def test_a_negative_grace_is_refused(repository):
    with pytest.raises(ValueError, match="grace"):
        repository.gc(grace=-1)


def test_readers_and_writers_go_on_during_gc(repository):
    """Nothing torn, nothing missing, with the shortest grace that the test's speed allows."""
    repository.add("keep", OLD)
    stop, errors = threading.Event(), []

    def guarded(action):
        def loop():
            own = Repository.open(repository.uri)
            try:
                while not stop.is_set():
                    action(own.refresh())
            except Exception as error:
                errors.append(error)

        return threading.Thread(target=loop)

    def read(own):
        for name, item in own.items().items():
            assert own.read(name, "f") in (b"old", b"new"), item

    def write(own):
        own.add("x", NEW)
        own.replace("x", OLD)
        own.remove("x")

    threads = [guarded(read), guarded(write), guarded(lambda own: own.gc(grace=5))]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert repository.verify() == []


def test_the_default_grace_is_a_week():
    assert collecting.GRACE == 7 * 24 * 3600
