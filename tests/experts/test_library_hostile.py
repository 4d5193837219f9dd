"""A library made to do harm opens with clear errors, and runs nothing."""

import hashlib
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mttl_experts import ExpertInfo, LocalExpertLibrary
from mttl_experts.expert import CONFIG_FILE, WEIGHTS_FILE
from mttl_storage import Corrupt, Repository, StorageError
from mttl_storage.sealed import seal

LOG = Path(".mttl/log/00000000/0000000001.json")


class Bomb:
    """What writes a file as soon as it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the library was run"


@pytest.fixture
def folder(tmp_path, make_expert):
    path = tmp_path / "lib"
    LocalExpertLibrary(str(path), create=True).add_expert(make_expert("e1"))
    return path


def rewrite(folder, change):
    """Change the log entry and seal it again, as an attacker would."""
    path = folder / LOG
    entry = json.loads(path.read_bytes().split(b"\n", 1)[1])
    change(entry)
    path.chmod(0o644)
    path.write_bytes(seal(json.dumps(entry).encode() + b"\n"))


def use(folder):
    """Everything that a reader may do."""
    library = LocalExpertLibrary(str(folder))
    library.infos()
    library.card()
    library.scores.table()
    for name, expert in library.items():
        dict(expert.expert_weights or {})
        library.lineage(name)
        library.log(name, facts=True)
    return library


def test_pickles_in_every_slot_are_refused_and_not_run(folder, canary, tmp_path):
    bomb = pickle.dumps(Bomb(canary))
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        good = file.read_bytes()
        file.chmod(0o644)
        file.write_bytes(bomb)
        if file.name in ("adapter_config.json", "head.json"):
            LocalExpertLibrary(str(folder)).verify()
        else:
            with pytest.raises((StorageError, ValueError), match=r"e1|json|repository"):
                use(folder)
        file.write_bytes(good)
    assert use(folder).keys() == ["e1"]


def test_pickles_that_were_added_properly_are_not_run_either(folder, canary):
    bomb = pickle.dumps(Bomb(canary))
    repository = Repository.open(folder)
    info = ExpertInfo("e2").to_dict()
    repository.add("experts/e2", {CONFIG_FILE: bomb, WEIGHTS_FILE: bomb}, info)
    repository.add("experts/e3", {"e3.ckpt": bomb, "e3.meta": bomb}, ExpertInfo("e3").to_dict())
    digest = repository.item("experts/e1").digest
    info = {"format": 1, "experts": [digest], "recipe": {"kind": "x"}}
    repository.add("artifacts/a/b", {"data.safetensors": bomb, "data.json": bomb}, info)
    library = LocalExpertLibrary(str(folder))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        dict(library["e2"].expert_weights)
    assert library["e3"].expert_weights is None
    assert {problem.where for problem in library.verify()} >= {"experts/e2", "experts/e3"}
    assert dict(library["e1"].expert_weights)


@pytest.mark.parametrize(
    "name", ["experts/../../out", "/etc/e", "experts/a\\b", "experts/con", "experts/.mttl-x", ""]
)
def test_hostile_names_write_nothing_outside(folder, tmp_path, canary, name):
    def rename(entry):
        entry["changes"][0]["name"] = name

    rewrite(folder, rename)
    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    try:
        library = use(folder)
        problems = library.verify()
        assert problems
        library.repository.materialize(tmp_path / "lib" / "plain")
    except (StorageError, ValueError) as error:
        assert "\n" not in str(error)
    assert {path for path in tmp_path.rglob("*") if folder not in path.parents} == before


@pytest.mark.parametrize(
    "change",
    [
        {"info": {"format": 1, "metrics": [[[]]]}},
        {"info": {"format": 10**30}},
        {"info": "x"},
        {"digest": 5},
        {"files": {WEIGHTS_FILE: [10**30, "0" * 64]}},
        {"files": {"../../x": [1, "0" * 64]}},
        {"files": [[]]},
    ],
)
def test_facts_of_wrong_kinds_are_one_clear_error(folder, canary, change):
    rewrite(folder, lambda entry: entry["changes"][0]["item"].update(change))
    with pytest.raises((StorageError, ValueError, TypeError)) as caught:
        use(folder)
        raise Corrupt(str(LocalExpertLibrary(str(folder)).verify()[0]))
    assert "\n" not in str(caught.value)


def test_a_log_that_nests_without_end_is_one_clear_error(folder, canary):
    path = folder / LOG
    path.chmod(0o644)
    path.write_bytes(seal(b'{"format":1,"changes":' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"))
    with pytest.raises(Corrupt, match="0000000001"):
        use(folder)


def test_a_header_that_promises_gigabytes_takes_no_memory(folder, canary):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    bomb = struct.pack("<Q", len(header)) + header.encode()
    repository = Repository.open(folder)
    files = {WEIGHTS_FILE: bomb, CONFIG_FILE: b"{}"}
    repository.add("experts/e2", files, ExpertInfo("e2").to_dict())
    huge = struct.pack("<Q", 1 << 60) + b"{}"
    repository.add("experts/e3", {WEIGHTS_FILE: huge}, ExpertInfo("e3").to_dict())
    library = LocalExpertLibrary(str(folder))
    for name in ("e2", "e3"):
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            dict(library[name].expert_weights)


def test_a_digest_that_leaves_its_folder_is_not_followed(folder, tmp_path, canary):
    (tmp_path / "secret").write_bytes(b"x")
    sha = hashlib.sha256(b"x").hexdigest()

    def change(entry):
        item = entry["changes"][0]["item"]
        item["digest"], item["files"] = "../../..", {"secret": [1, sha]}

    rewrite(folder, change)
    try:
        library = LocalExpertLibrary(str(folder))
        library.repository.read("experts/e1", "secret")
    except (StorageError, ValueError):
        return
    pytest.fail("a file outside of the library was read")


def test_reading_a_library_unpickles_nothing(folder, canary):
    code = f"""
import sys
from mttl_experts import ExpertLibrary
import pickle, torch
def refuse(*args, **kwargs): raise SystemExit("unpickled")
for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
    for name in names: setattr(module, name, refuse)
library = ExpertLibrary({str(folder)!r})
print(library.keys(), len(dict(library["e1"].expert_weights)), library.verify())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "['e1'] 8 []\n"), done.stderr
