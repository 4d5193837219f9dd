import shutil

import pytest

from mttl_storage import Corrupt, NotFound, Repository
from mttl_storage.verification import verify

FILES = {"weights.bin": bytes(range(256)), "config.json": b"{}"}


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.fixture
def filled(local):
    local.add("experts/a", FILES, {"k": 1})
    local.add("experts/b", {"weights.bin": b"2"})
    local.remove("experts/b")
    local.update_info("experts/a", {"k": 2})
    return local


def test_one_flipped_bit_anywhere_is_found_by_verify(filled):
    assert filled.verify() == []
    for path in sorted(filled.store.local_path("").rglob("*")):
        if path.is_file():
            size = 8 * path.stat().st_size
            for bit in {0, 1, size // 3, size // 2, size - 9, size - 8, size - 1}:
                flip(path, bit)
                assert verify(filled.store), f"bit {bit} of {path}"
                flip(path, bit)
    assert filled.verify() == []


def test_one_flipped_bit_is_found_on_read(filled):
    path = filled.path("experts/a", "weights.bin")
    flip(path, 100)
    for read in (filled.read, filled.open_file, filled.path):
        with pytest.raises(Corrupt, match="is damaged: expected 256 bytes"):
            read("experts/a", "weights.bin")
    with pytest.raises(Corrupt):
        filled.path("experts/a")
    assert filled.read("experts/a", "config.json") == b"{}"


def test_one_flipped_bit_in_an_entry_is_found_on_opening(filled):
    folder = filled.store.local_path("")
    for path in [*sorted(folder.rglob(".mttl/log/*/*.json")), folder / ".mttl/repository.json"]:
        for bit in range(0, 8 * path.stat().st_size, 97):
            flip(path, bit)
            with pytest.raises(Corrupt):
                Repository.open(folder)
            flip(path, bit)


def test_adding_the_files_again_heals_them(filled):
    path = filled.path("experts/a", "weights.bin")
    flip(path, 100)
    other = Repository.open(filled.uri)
    other.add("copy", FILES)
    assert other.verify() != []
    other.replace("experts/a", {})
    other.replace("experts/a", FILES)
    assert other.verify() == []
    assert other.read("experts/a", "weights.bin") == FILES["weights.bin"]


def test_a_missing_file_is_not_found_on_read_and_by_verify(filled):
    filled.path("experts/a", "config.json").unlink()
    with pytest.raises(NotFound, match="config.json"):
        filled.read("experts/a", "config.json")
    with pytest.raises(NotFound):
        filled.path("experts/a", "config.json")
    [problem] = filled.verify()
    assert problem.where == "experts/a"


def test_a_gap_in_the_log_is_found(filled):
    (filled.store.local_path("") / ".mttl/log/00000000/0000000002.json").unlink()
    problems = [str(problem) for problem in verify(filled.store)]
    assert any("beyond a gap" in problem for problem in problems)


def test_verify_reports_progress(filled):
    seen = []
    filled.verify(lambda *args: seen.append(args))
    assert [done for done, _, _ in seen] == [1, 2, 3]
    assert {total for _, total, _ in seen} == {3}


def test_a_mapped_file_is_read_in_full_only_once(filled, monkeypatch):
    filled.path("experts/a")
    monkeypatch.setattr(type(filled.store), "read_chunks", lambda *_: pytest.fail("read again"))
    filled.path("experts/a")


def test_snapshots_that_differ_from_the_log_are_found(local):
    for number in range(100):
        local.update_info("a", {"n": number}) if number else local.add("a", {})
    assert local.verify() == []
    folder = local.store.local_path("")
    [snapshot] = folder.glob(".mttl/snapshots/*")
    other = Repository.open(folder.parent / "other", create=True)
    for number in range(100):
        other.update_info("a", {"m": number}) if number else other.add("a", {})
    shutil.copy(other.store.local_path(f".mttl/snapshots/{snapshot.name}"), snapshot)
    [problem] = local.verify()
    assert "differs from the log" in problem.what
    snapshot.unlink()
    assert "missing" in local.verify()[0].what
    assert Repository.open(folder).item("a").info == {"n": 99}


def test_there_must_be_a_repository(tmp_path):
    from mttl_storage import filesystem

    with pytest.raises(NotFound):
        verify(filesystem(tmp_path))
