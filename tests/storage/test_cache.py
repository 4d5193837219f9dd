"""Copies on the local disk of files that are elsewhere, where that disk is full or closed."""

import errno
import os
import resource
import signal
import tempfile
import time

import pytest

from mttl_storage import Denied, ReadOnly, Repository, StorageError, StorageFull, cache
from mttl_storage.testing import fail_at, faulty_store, repository_on


@pytest.fixture
def data():
    """What no test before has brought into the cache."""
    return os.urandom(300_000)


@pytest.fixture(params=["virtual", "az", "hf"])
def elsewhere(request, new_address, data):
    """A repository whose files are not on the disk."""
    repository = Repository.open(new_address(request.param), create=True)
    repository.add("experts/a", {"weights.bin": data})
    return repository


@pytest.fixture
def small_disk():
    """No file of this process can be larger than 100 kB, as if the disk ended there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def partials(repository):
    return list(cache.cached_folder(repository.store, repository.item("experts/a")).glob(".*.part"))


def test_a_full_disk_is_told_and_what_came_is_not_asked_for_again(
    elsewhere, data, request, tmp_path
):
    request.getfixturevalue("small_disk")
    for read in (elsewhere.path, elsewhere.open_file):
        with pytest.raises(StorageFull, match="free some space") as caught:
            read("experts/a", "weights.bin")
        assert "weights.bin" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageFull):
        elsewhere.materialize(tmp_path / "plain")
    assert elsewhere.read("experts/a", "weights.bin") == data  # which needs no disk
    [partial] = partials(elsewhere)
    assert partial.stat().st_size <= 100_000
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    asked = []
    kind = type(elsewhere.store)
    original = kind.read_chunks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kind,
            "read_chunks",
            lambda self, key, start=0: asked.append(start) or original(self, key, start),
        )
        assert elsewhere.path("experts/a", "weights.bin").read_bytes() == data
    assert asked == [100_000]
    assert elsewhere.verify() == []


def test_a_local_repository_on_a_full_disk_is_as_it_was(local, data, request):
    local.add("experts/a", {"weights.bin": b"small"})
    request.getfixturevalue("small_disk")
    for change in (local.add, local.replace):
        with pytest.raises(StorageFull, match="free some space") as caught:
            change("experts/b" if change == local.add else "experts/a", {"weights.bin": data})
        assert local.uri in str(caught.value)
    assert list(Repository.open(local.uri)) == ["experts/a"]
    assert local.verify() == []
    assert not list(local.store.local_path("").rglob(".mttl-tmp-*"))
    local.add("experts/b", {"weights.bin": b"fits"})
    assert local.verify() == []


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EACCES, Denied), (errno.EROFS, ReadOnly), (errno.EDQUOT, StorageFull)],
)
def test_a_cache_that_cannot_be_written_is_told_in_one_line(
    elsewhere, data, monkeypatch, number, error
):
    def refuse(folder):
        raise OSError(number, os.strerror(number), folder)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "make_folders", refuse)
        with pytest.raises(error) as caught:
            elsewhere.path("experts/a", "weights.bin")
        folder = cache.cached_folder(elsewhere.store, elsewhere.item("experts/a"))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert elsewhere.read("experts/a", "weights.bin") == data
    assert elsewhere.path("experts/a", "weights.bin").read_bytes() == data


def test_something_in_the_way_of_a_copy_is_told(elsewhere, tmp_path):
    for target in ("a", "a/weights.bin/x"):
        plain = tmp_path / target.replace("/", "-")
        place = plain / target
        place.parent.mkdir(parents=True)
        place.write_bytes(b"mine")
        with pytest.raises(StorageError, match="move that away"):
            elsewhere.materialize(plain)
        assert place.read_bytes() == b"mine"


def test_a_store_that_breaks_off_leaves_nothing_wrong_behind(local, data, tmp_path):
    local.add("experts/a", {"weights.bin": data})
    for step in range(1, 20):
        broken = faulty_store(local.store, fail_at(step, StorageError("it broke")))
        plain = tmp_path / f"plain{step}"
        try:
            repository_on(broken).materialize(plain)
        except StorageError:
            assert not (plain / "a" / "weights.bin").exists()
        else:
            assert (plain / "a" / "weights.bin").read_bytes() == data
        local.materialize(plain)
        assert [path.name for path in (plain / "a").iterdir()] == ["weights.bin"]


def test_what_is_there_is_kept_and_nothing_is_left_beside_it(elsewhere, monkeypatch, tmp_path):
    for _ in range(2):
        elsewhere.materialize(tmp_path)
        elsewhere.path("experts/a")
        monkeypatch.setattr("mttl_storage.reading._proven", {})  # as a new process begins
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["weights.bin"]
    assert partials(elsewhere) == []


def test_threads_that_are_the_first_to_want_files_in_memory_share_one_folder(
    new_address, monkeypatch, tmp_path
):
    """Else the folder that one of them is told lacks the files that others put into theirs."""
    made = tempfile.mkdtemp

    def slowly(**options):
        time.sleep(0.05)
        return made(dir=tmp_path, **options)

    monkeypatch.setattr(tempfile, "mkdtemp", slowly)
    monkeypatch.setattr(cache, "_folders", {})
    repository = Repository.open(new_address("virtual"), create=True)
    files = {f"{number}.bin": b"%d" % number for number in range(8)}
    repository.add("experts/a", files)
    folder = repository.path("experts/a")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert len(list(tmp_path.iterdir())) == 1
