"""Manifests and files that mean harm: a clear error or a valid result, and nothing else happens."""

import contextlib
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from mttl_storage import (
    Corrupt,
    Denied,
    Repository,
    StorageError,
    __main__,
    cache,
    committing,
    copy,
    filesystem,
    log,
    verification,
)
from mttl_storage.log import HEAD, IDENTITY, LogEntry, entry_key
from mttl_storage.sealed import digest_of, seal
from mttl_storage.store.virtual import _TREE

FULL = [pytest.mark.slow, pytest.mark.timeout(3600)]
SECONDS = 5.0
"""That anything done to one hostile repository may take, on a busy machine."""
MEGABYTE = 1 << 20
WEIGHTS = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0weights"}


@pytest.fixture
def jail(tmp_path, monkeypatch):
    """A folder deep inside of which files may be written, and nowhere else."""
    inside = tmp_path / "a" / "b" / "c"
    process = inside / "process"
    process.mkdir(parents=True)
    monkeypatch.setattr(cache, "_process_folder", lambda _: process)
    monkeypatch.chdir(inside)
    yield inside
    outside = [path for path in tmp_path.rglob("*") if not path.is_relative_to(inside)]
    assert set(outside) == {tmp_path / "a", tmp_path / "a" / "b"}
    assert {path.name for path in inside.iterdir()} <= {"process", "plain"}


@pytest.fixture
def honest(monkeypatch):
    """The files of a repository that has everything: a snapshot, and each kind of change."""
    for module in (log, committing):
        monkeypatch.setattr(module, "SNAPSHOT_EVERY", 4)
    repository = Repository.open("virtual://hostile/honest", create=True)
    with repository.batch() as batch:
        batch.add("artifacts/a", {"data.json": b"{}"}, {"nested": {"x": [None, True]}})
        batch.add("experts/a", WEIGHTS, {"rank": 4, "loss": [0.5, 1.25]})
    repository.add("experts/b", {"adapter_config.json": b"[]"}, {"task": "sums"})
    repository.add("artifacts/c", {"deep/er.bin": b"1"})
    repository.replace("experts/a", {**WEIGHTS, "more.bin": b"2"})
    repository.rename("experts/b", "experts/d")
    repository.remove("artifacts/c")
    repository.update_info("experts/a", {"rank": 8})
    yield {entry.key: repository.store.cat_file(entry.key) for entry in repository.store.scan()}
    _TREE.pop("hostile", None)


def planted(files):
    """The address of a repository with these files."""
    _TREE.pop("hostile", None)
    store = Repository.open("virtual://hostile/planted", create=True).store
    store.rm("", recursive=True)
    for key, data in files.items():
        store.pipe_file(key, data)
    return store.address


class Outcomes(dict):
    """How often each step succeeded or raised which error; any other error is raised."""

    @contextlib.contextmanager
    def step(self, name):
        found = "fine"
        try:
            yield
        except StorageError as error:
            found = type(error).__name__
            assert 10 < len(str(error)) < 2000
        except ValueError as error:
            found = "ValueError"
            assert re.search("would share the file|^info must be|^info has", str(error))
        self[name, found] = self.get((name, found), 0) + 1


def use(address, jail, outcomes):
    """Do everything that can be done with a repository."""
    step = outcomes.step
    with step("verify"):
        verify(address)
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with step("ls"), silent[0], silent[1]:
        __main__.main(["ls", address])
        __main__.main(["ls", address, "--json"])
    repository = None
    with step("open"):
        repository = Repository.open(address)
    if repository is None:
        return
    with step("history"):
        repository.history()
    for generation in (1, 4, 7):
        with step("at"):
            repository.at(generation).items()
    with step("diff"):
        repository.diff(1, 6)
    names = list(repository)
    with step("items"):
        for item in [*repository.items().values(), *repository.removed().values()]:
            assert item.size >= 0
            assert isinstance(item.info, dict)
    for name in names:
        with step("read"):
            for file in repository.item(name).files:
                repository.read(name, file)
        with step("path"):
            assert repository.path(name).is_relative_to(jail)
            for file in repository.item(name).files:
                assert repository.path(name, file).is_relative_to(jail)
    with step("materialize"):
        repository.materialize(jail / "plain")
    with step("copy"):
        target = Repository.open("virtual://hostile/copy", create=True)
        copy(repository, target)
        assert set(target) == set(names)
        assert not target.verify()
    for name in names[:1]:
        with step("info"):
            repository.update_info(name, {"rank": 16})
        with step("rename"):
            repository.rename(name, "experts/renamed")
        with step("remove"):
            repository.remove("experts/renamed")
    with step("add"):
        repository.add("experts/new", WEIGHTS)
        assert repository.read("experts/new", "adapter_config.json") == b"{}"
    with step("gc"):
        repository.gc(0)


def verify(address):
    return verification.verify(filesystem(address))


# How a manifest is made to mean harm.

ESCAPES = ["..", "../../../../escaped", "a/../../../../escaped", "/etc/escaped", "C:\\x", "con"]
ESCAPES += ["NUL.txt", "a\0b", "\ud800", ".mttl/log", "x" * 5000, "", ".", "a/", "experts/a/", " a"]
NUMBERS = [-1, 0, 1, 2**31, 10**30, 10**4299, -0.5, 1e308, float("nan"), float("inf"), True]
DEEP = json.loads("[" * 200 + "]" * 200)
ODD = [None, [], {}, "x", [[]], {"a": {}}, DEEP, "2024-01-01", "0001-01-01T00:00:00", "a" * 64]
KEYS = ["format", "generation", "chain", "time", "changes", "kind", "name", "item", "was", "files"]
KEYS += ["digest", "info", "home", "source", "snapshot", "live", "message", "transaction"]
RAW = [b"NaN", b"1e999", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff\xfe", b"\xc3("]
RAW += [b"\0", b"\\ud800", b'"', b"-", b"\r", b"\x85", b'"a":1,"a":2', b"],[", b'{"format":1}\n']


def nodes(value, path=()):
    """The path of every value inside a value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(each, (*path, key))


def changed(value, dice):
    """A JSON value in which one thing is another."""
    *above, last = dice.choice([path for path in nodes(value) if path] or [(None,)])
    folder = value
    for key in above:
        folder = folder[key]
    if last is None:
        return dice.choice(ODD)
    kind = dice.random()
    if kind < 0.6:
        others = [[ESCAPES, NUMBERS, ODD][dice.randrange(3)]]
        folder[last] = dice.choice(dice.choice(others))
    elif kind < 0.75:
        path, other = dice.choice(list(nodes(value))), value
        for key in path:
            other = other[key]
        folder[last] = json.loads(json.dumps(other))
    elif kind < 0.85:
        del folder[last]
    elif isinstance(folder, dict):
        folder[dice.choice([*KEYS, *ESCAPES, *folder])] = folder.pop(last)
    else:
        folder.insert(dice.randrange(len(folder) + 1), json.loads(json.dumps(folder[last])))
    return value


def scrambled(data, others, dice):
    """Bytes of which some are others, or gone, or from elsewhere."""
    data, at = bytearray(data), dice.randrange(len(data) + 1)
    kind = dice.randrange(6)
    if kind == 0 and data:
        data[at - 1] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        other = dice.choice(others)
        data[at:] = other[dice.randrange(len(other) + 1) :]
    elif kind == 3:
        data[at : at + dice.randrange(20)] = dice.choice(RAW)
    elif kind == 4:
        del data[at : at + dice.randrange(1, 30)]
    else:
        data[at:at] = data[dice.randrange(len(data) + 1) :][:40]
    return bytes(data)


def mutated(files, dice):
    """The files of a repository, of which one manifest means harm."""
    files = dict(files)
    manifests = sorted(key for key in files if key.startswith(".mttl/"))
    key = dice.choice(manifests)
    bodies = {each: files[each].partition(b"\n")[2] for each in manifests}
    kind = dice.random()
    if kind < 0.15:
        files[key] = scrambled(files[key], [files[each] for each in manifests], dice)
        return files
    if kind < 0.4:
        bodies[key] = scrambled(bodies[key], list(bodies.values()), dice)
    else:
        lines = bodies[key].splitlines()
        for _ in range(dice.choice([1, 1, 2, 3])):
            number = dice.randrange(len(lines))
            lines[number] = json.dumps(changed(json.loads(lines[number]), dice)).encode()
        if len(lines) > 1 and dice.random() < 0.2:
            dice.shuffle(lines)
        bodies[key] = b"\n".join(lines) + b"\n"
    if dice.random() < 0.8:
        chain_again(bodies, key)
    files.update({each: seal(bodies[each]) for each in manifests})
    return files


def chain_again(bodies, key):
    """Let what follows a manifest name the digest that it has now, so that the rest is reached."""
    entries = [IDENTITY, *sorted(each for each in bodies if "/log/" in each)]
    if key not in entries:
        return
    for before, entry in list(itertools.pairwise(entries))[entries.index(key) :]:
        bodies[entry] = renamed_chain(bodies[entry], digest_of(bodies[before]))
    for each in bodies:
        if "/snapshots/" in each:
            made_by = next(entry for entry in entries if each[-15:] == entry[-15:])
            bodies[each] = renamed_chain(bodies[each], digest_of(bodies[made_by]))


def renamed_chain(body, digest):
    return re.sub(rb'"chain":"[0-9a-f]*"', b'"chain":"%s"' % digest.encode(), body, count=1)


@pytest.mark.parametrize("count", [250, pytest.param(50_000, marks=FULL)])
def test_a_mutated_manifest_is_a_clear_error_or_valid(honest, jail, count):
    outcomes, slowest = Outcomes(), 0.0
    use(planted(honest), jail, outcomes)
    assert {found for _, found in outcomes} == {"fine"}
    before = resident()
    for seed in range(count):
        address = planted(mutated(honest, random.Random(seed)))
        began = time.monotonic()
        try:
            use(address, jail, outcomes)
        except Exception as error:
            raise AssertionError(f"manifests of seed {seed}") from error
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < SECONDS
    assert resident() - before < 128 * MEGABYTE
    reached = {name for name, found in outcomes if found == "fine"}
    assert reached >= {"verify", "ls", "open", "read", "path", "copy", "materialize", "gc"}
    assert outcomes["open", "Corrupt"] > count / 10


def resident():
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_manifest_that_was_changed_without_a_new_seal_is_always_found(honest):
    manifests = sorted(key for key in honest if key.startswith(".mttl/"))
    for seed in range(300):
        dice = random.Random(seed)
        key = dice.choice(manifests)
        data = scrambled(honest[key], [honest[each] for each in manifests], dice)
        if data not in honest.values():
            assert verify(planted({**honest, key: data})), f"seed {seed}"


@pytest.mark.parametrize("place", ["name", "home", "file", "digest", "sha256"])
@pytest.mark.parametrize("where", ["entry", "snapshot"])
def test_a_name_that_leads_elsewhere_is_corrupt_wherever_it_stands(honest, jail, place, where):
    for escape in [*ESCAPES, str(jail.parents[2] / "escaped")]:
        address = planted(led_astray(honest, place, where, escape))
        assert verify(address)
        outcomes = Outcomes()
        use(address, jail, outcomes)
        assert outcomes.keys() & {("open", "Corrupt"), ("items", "Corrupt")}, escape


@pytest.mark.parametrize("place", ["source", "was"])
def test_a_name_that_leads_elsewhere_is_corrupt_in_what_is_told_of_a_change(honest, jail, place):
    for escape in [*ESCAPES, str(jail.parents[2] / "escaped")]:
        address = planted(led_astray(honest, place, "entry", escape))
        with pytest.raises(Corrupt):
            Repository.open(address)


def led_astray(files, place, where, escape):
    """A repository that an entry or the snapshot would lead elsewhere."""
    bodies = {key: data.partition(b"\n")[2] for key, data in files.items() if ".mttl" in key}
    snapshot, entry = ".mttl/snapshots/0000000004.json", ".mttl/log/00000000/0000000002.json"
    if where == "snapshot":
        header, line, *rest = bodies[snapshot].splitlines()
        name, record = json.loads(line)
        change = {"name": name, "item": record}
        spoil(change, place, escape)
        line = json.dumps([change["name"], record]).encode()
        bodies[snapshot] = b"\n".join([header, line, *rest]) + b"\n"
    else:
        value = json.loads(bodies[entry])
        spoil(value["changes"][0], place, escape)
        bodies[entry] = json.dumps(value).encode() + b"\n"
        chain_again(bodies, entry)
        del bodies[HEAD], bodies[snapshot]
    kept = {key: data for key, data in files.items() if ".mttl" not in key}
    return {**kept, **{key: seal(body) for key, body in bodies.items()}}


def spoil(change, place, escape):
    """Put a name that leads elsewhere into a change."""
    record = change["item"]
    [(file, (size, sha256)), *_] = record["files"].items()
    if place == "name":
        change["name"] = escape
    elif place == "source":
        change |= {"kind": "rename", "source": escape}
    elif place == "was":
        change["was"] = [escape, record["digest"]]
    elif place == "file":
        record["files"] = {escape: [size, sha256]}
    elif place == "sha256":
        record["files"] = {file: [size, escape]}
    else:
        record[place] = escape


def test_an_item_cannot_claim_the_files_of_another(honest, jail):
    """Its record names another's folder; what is read is what the record says, or nothing."""
    repository = Repository.open(planted(honest))
    record = {
        "digest": repository.item("experts/a").digest,
        "home": "experts/a",
        "files": {"adapter_config.json": [2, "0" * 64]},
        "info": {},
    }
    changes = [{"kind": "add", "name": "experts/thief", "item": record}]
    state = repository._state
    entry = LogEntry(state.generation + 1, state.chain, state.time, "", "x", changes)
    repository.store.pipe_file(entry_key(entry.generation), seal(entry.to_bytes()))
    repository.refresh()
    for read in (repository.read, repository.path, repository.open_file):
        with pytest.raises(Corrupt, match="is damaged"):
            read("experts/thief", "adapter_config.json")
    problems = [str(problem) for problem in repository.verify()]
    assert any("its digest is not that of its files" in problem for problem in problems)
    assert repository.read("experts/a", "adapter_config.json") == b"{}"


HUGE = {
    "lists": b"[" * 2_000_000,
    "objects": b'{"a":' * 500_000,
    "number": b'{"format":1,"x":' + b"9" * 2_000_000 + b"}",
    "keys": b'{"format":1,' + b'"a":1,' * 500_000 + b'"b":2}',
    "infinity": b'{"format":1,"generation":1e400}',
    "bytes": b"\xff" * 2_000_000,
    "lines": b"\n" * 500_000,
    "nothing": b"",
}


@pytest.mark.parametrize("key", [HEAD, ".mttl/snapshots/0000000004.json", entry_key(7)])
@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_manifest_takes_little_more_memory_than_its_size(honest, kind, key):
    address = planted({**honest, key: seal(HUGE[kind])})
    tracemalloc.start()
    began = time.monotonic()
    assert verify(address)
    with contextlib.suppress(Corrupt):
        Repository.open(address).items()
    assert time.monotonic() - began < SECONDS
    assert tracemalloc.get_traced_memory()[1] < 20 * len(HUGE[kind]) + 2 * MEGABYTE
    tracemalloc.stop()


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def traps(jail):
    """Files that do harm where something unpickles, unpacks or runs them."""
    marker = jail / "executed"
    pickled = [pickle.dumps(Trap(marker), protocol) for protocol in (0, 2, 5)]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled[1])
        archive.writestr("../../../../escaped", b"x")
        archive.writestr("bomb", bytes(64 * MEGABYTE))
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n".encode()
    yield {
        "pytorch_model.bin": pickled[0],
        "adapter_model.bin": pickled[1],
        "data.pkl": pickled[2],
        "adapter_model.safetensors": packed.getvalue(),
        "archive.zip": packed.getvalue(),
        "modeling.py": code,
        "conftest.py": code,
        "sitecustomize.py": code,
    }
    assert not marker.exists()
    pickle.loads(pickled[2])
    assert marker.exists()  # it would have done it
    marker.unlink()


def test_files_that_mean_harm_are_only_stored(honest, jail, traps):
    address = planted(honest)
    Repository.open(address).add("experts/trap", traps)
    outcomes = Outcomes()
    tracemalloc.start()
    use(address, jail, outcomes)
    assert tracemalloc.get_traced_memory()[1] < 8 * MEGABYTE  # the bomb stays what it is
    tracemalloc.stop()
    assert {found for _, found in outcomes} == {"fine"}
    plain = jail / "plain" / "trap"
    assert {path.name: path.read_bytes() for path in plain.iterdir()} == traps


def test_manifests_that_are_pickles_or_archives_are_corrupt(honest, jail, traps):
    for key in sorted(key for key in honest if key.startswith(".mttl/")):
        for file in ("data.pkl", "archive.zip", "modeling.py"):
            for manifest in (traps[file], seal(traps[file])):
                address = planted({**honest, key: manifest})
                assert verify(address)
                outcomes = Outcomes()
                use(address, jail, outcomes)
                if key in (IDENTITY, entry_key(7)):
                    assert ("open", "Corrupt") in outcomes


def test_a_pipe_or_a_folder_in_place_of_a_file_is_told_and_blocks_nothing(local, tmp_path):
    local.add("experts/a", WEIGHTS)
    weights, config = (local.path("experts/a", file) for file in sorted(WEIGHTS, reverse=True))
    for path in (weights, config):
        path.unlink()
    os.mkfifo(weights)
    config.mkdir()
    for read in (local.read, local.path, local.open_file):
        with pytest.raises(Denied, match="is a pipe or a device"):
            read("experts/a", "adapter_model.safetensors")
        with pytest.raises(Corrupt, match="a folder lies where a file should be"):
            read("experts/a", "adapter_config.json")
    with pytest.raises(StorageError):
        local.materialize(tmp_path / "plain")
    assert len(local.verify()) == 2


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("key", [IDENTITY, entry_key(1)])
def test_a_pipe_or_a_folder_in_place_of_a_manifest_is_told(local, key, make):
    local.add("experts/a", WEIGHTS)
    manifest = local.store.local_path(key)
    manifest.unlink()
    make(manifest)
    with pytest.raises((Denied, Corrupt), match=manifest.name):
        Repository.open(local.uri)
    assert local.verify()
