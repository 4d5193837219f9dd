import itertools
import os
import subprocess
import sys
import tracemalloc

import pytest

from mttl_storage import NotFound, Repository, copy
from mttl_storage.__main__ import main


@pytest.fixture
def source(local):
    with local.batch() as batch:
        for number in range(5):
            batch.add(f"experts/e{number}", {"f": b"%d" % number, "g/h": b"same"}, {"n": number})
    return local


@pytest.fixture
def target(tmp_path):
    return Repository.open(tmp_path / "target", create=True)


def test_copies_have_the_same_digests_and_are_incremental(source, address):
    target = Repository.open(address.replace("library", "copy"), create=True)
    seen = []
    assert copy(source, target, progress=lambda *args: seen.append(args)) == 5
    assert seen[-1] == (5, 5, "experts/e4")
    assert {n: (i.digest, i.info) for n, i in target.items().items()} == {
        n: (i.digest, i.info) for n, i in source.items().items()
    }
    assert target.verify() == []
    assert copy(source, target) == 0
    source.replace("experts/e1", {"f": b"new"})
    source.update_info("experts/e2", {"n": "new"})
    assert copy(source, target) == 2
    assert target.read("experts/e1", "f") == b"new"
    back = Repository.open(source.store.local_path("").parent / "back", create=True)
    assert copy(target, back) == 5
    assert back.item("experts/e2").digest == source.item("experts/e2").digest


def test_names_choose_and_addresses_are_opened(source, tmp_path):
    assert copy(source.uri, tmp_path / "new", names=["experts/e3"]) == 1
    assert list(Repository.open(tmp_path / "new")) == ["experts/e3"]
    with pytest.raises(NotFound, match="did you mean"):
        copy(source, tmp_path / "new", names=["experts/e"])
    with pytest.raises(NotFound):
        copy(tmp_path / "nothing", tmp_path / "new")


def test_a_copy_that_was_cut_short_goes_on(source, target, monkeypatch):
    from mttl_storage import copying

    monkeypatch.setattr(copying, "_BATCH_ITEMS", 2)

    def cut(done, total, name):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(source, target, progress=cut)
    assert target.verify() == []
    assert 0 < len(target.refresh()) < 5
    rest = 5 - len(target)
    assert copy(source, target) == rest


def test_memory_does_not_depend_on_sizes(target, tmp_path):
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(200 << 20)
    source = Repository.open(tmp_path / "big-source", create=True)
    tracemalloc.start()
    source.add("a", {"big": big})
    copy(source, target)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20


def test_the_command_line(source, tmp_path, capsys):
    assert main(["ls", source.uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == list(source)
    assert main(["ls", source.uri, "--json", "--prefix", "experts/e1"]) == 0
    assert '"n": 1' in capsys.readouterr().out
    assert main(["cp", source.uri, str(tmp_path / "new"), "experts/e1"]) == 0
    assert capsys.readouterr().out == "copied 1 items\n"
    assert main(["verify", source.uri]) == 0
    assert capsys.readouterr().out == "all well\n"
    assert main(["gc", source.uri, "--grace", "0"]) == 0
    assert "deleted 0 files" in capsys.readouterr().out
    source.path("experts/e1", "f").write_bytes(b"x")
    assert main(["verify", source.uri]) == 1
    assert "is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_a_missing_repository_is_one_line(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "nothing")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: there is no repository at")
    assert captured.err.count("\n") == 1


def test_the_package_needs_neither_torch_nor_a_cloud_client(source):
    code = (
        "import sys, mttl_storage.__main__ as m; code = m.main(sys.argv[1:]);"
        "bad = {'torch', 'numpy', 'azure', 'adlfs', 'huggingface_hub', 'transformers'};"
        "sys.exit(code or (3 if bad & set(sys.modules) else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, "verify", source.uri], check=False)
    assert done.returncode == 0


_COPY = """
import sys
from mttl_storage import Repository, copy
copy(Repository.open(sys.argv[1]), Repository.open(sys.argv[2], create=True))
# Not ru_maxrss: that begins with what the process that started this one had.
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak.split()[1]) // 1024)
"""


def test_a_process_that_copies_large_files_stays_small(local, new_address, azurite, hub, tmp_path):
    """Among all that are not in memory anyway: 320 MB in two items, at most 256 MB resident."""
    block = os.urandom(1 << 20)
    for number in range(2):
        with (tmp_path / "large").open("wb") as file:
            for _ in range(160):
                file.write(block)
            file.write(b"%d" % number)
        local.add(f"experts/{number}", {"adapter_model.safetensors": tmp_path / "large"})
    places = [local.uri, new_address("az"), new_address("hf"), new_address("local")]
    for source, target in itertools.pairwise(places):
        done = subprocess.run(
            [sys.executable, "-c", _COPY, source, target], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 256, (source, target)  # MB
    assert Repository.open(places[-1]).items()["experts/1"].digest == local.item("experts/1").digest
