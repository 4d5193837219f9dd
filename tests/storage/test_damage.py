"""Stored bytes that are not those that were written: found on read and by verify, and named."""

import hashlib
import json
import math
import os
import random
import re
import struct

import pytest

from mttl_storage import Corrupt, Repository, committing, copy, filesystem, log, reading
from mttl_storage.verification import verify

FULL = [pytest.mark.slow, pytest.mark.timeout(3600)]
FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": bytes(range(40))}


@pytest.fixture
def damaged(address, request, monkeypatch):
    """A repository, and what flips one bit of a stored file until it is called again."""
    for module in (log, committing):
        monkeypatch.setattr(module, "SNAPSHOT_EVERY", 2)
    repository = Repository.open(address, create=True)
    repository.add("experts/a", FILES, {"rank": 4})
    repository.add("datasets/b", {"rows.json": b"[1]"})
    repository.update_info("experts/a", {"rank": 8})
    store = repository.store
    whole = {entry.key: store.cat_file(entry.key) for entry in store.scan()}

    def flip(key, bit):
        if store.scheme == "hf":  # as if the disks of the hub had rotted: no commit tells of it
            from mttl_storage.testing.hub import Flip

            faults = request.getfixturevalue("hub").faults
            faults.clear()
            if bit is not None:
                where = (bit // 8 + 0.5) / len(whole[key])
                faults.add(Flip(position=where), method="GET", path=stored_as(key, whole[key]))
            return
        data = bytearray(whole[key])
        if bit is not None:
            data[bit // 8] ^= 1 << bit % 8
        store.pipe_file(key, data)

    yield repository, whole, flip
    if store.scheme == "hf":
        request.getfixturevalue("hub").faults.clear()


def stored_as(key, data):
    """The path of the requests that give the bytes of a file of a hub."""
    return f"({re.escape(key)}|/lfs/{hashlib.sha256(data).hexdigest()})$"


def bits_of(size, count):
    """Some bits of a file, each byte at least once if the count allows."""
    if count >= 8 * size:
        return range(8 * size)
    dice = random.Random(size)
    return sorted({0, 8 * size - 1, *(dice.randrange(8 * size) for _ in range(count - 2))})


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=FULL)])
def test_one_flipped_bit_anywhere_is_found_and_the_file_named(damaged, full):
    repository, whole, flip = damaged
    address = repository.uri
    assert repository.verify() == []
    hub = repository.store.scheme == "hf"
    count = (60 if full else 2) if repository.store.distant else (1 << 30 if full else 12)
    for key in whole:
        if hub and not key.startswith(".mttl/"):
            continue  # what a hub shows is one object with what lies in .mttl
        for bit in bits_of(len(whole[key]), count):
            flip(key, bit)
            found = [str(problem) for problem in verify(filesystem(address))]
            assert any(key in each for each in found), f"bit {bit} of {key}: {found}"
            check_reading(repository, address, key)
        flip(key, None)
    assert verify(filesystem(address)) == []


def check_reading(repository, address, key):
    """What reads a damaged file raises, and names it; what does not need it is as before."""
    if key in (log.HEAD, *(log.snapshot_key(n) for n in range(4))):
        again = Repository.open(address)  # both only save time
        assert again.item("experts/a").info == {"rank": 8}
    elif key.startswith((".mttl/repository", ".mttl/log")):
        needed = key == log.IDENTITY or key == log.entry_key(3)
        if needed:
            with pytest.raises(Corrupt, match=re.escape(key)):
                Repository.open(address)
        else:  # a snapshot stands for it, until the past is asked for
            with pytest.raises(Corrupt, match=re.escape(key)):
                Repository.open(address).history()
    else:
        name = "experts/a" if "adapter" in key else "datasets/b"
        file = key.rpartition("/")[2]
        for read in (repository.read, repository.path, repository.open_file):
            with pytest.raises(Corrupt, match=re.escape(key)):
                read(name, file)
        target = Repository.open("virtual://damage/copy", create=True)
        with pytest.raises(Corrupt, match=re.escape(key)):
            copy(repository, target, [name])
        assert len(target) == 0
        target.store.rm("", recursive=True)  # or what was right is there, and not asked for again
        other = next(each for each in [*FILES, "rows.json"] if each != file)
        repository.read("datasets/b" if other == "rows.json" else "experts/a", other)


@pytest.fixture(params=["az", "hf", "virtual"])
def cached(request, new_address):
    """A repository of which ``path`` gives copies."""
    repository = Repository.open(new_address(request.param), create=True)
    repository.add("experts/a", FILES)
    return repository


@pytest.mark.parametrize("how", ["rewritten", "rotten", "cut", "gone", "grown"])
def test_a_damaged_copy_is_fetched_again_and_not_served(cached, monkeypatch, how):
    path = cached.path("experts/a", "adapter_model.safetensors")
    written = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[7] ^= 16
    path.chmod(0o644)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:9], "grown": data + b"x"}.get(how, data))
    if (
        how == "rotten"
    ):  # which no time tells; this process has read the file in full, a new one has not
        os.utime(path, ns=(written, written))
        monkeypatch.setattr(reading, "_proven", {})
    assert cached.path("experts/a", "adapter_model.safetensors") == path
    assert path.read_bytes() == FILES["adapter_model.safetensors"]
    assert cached.path("experts/a").joinpath("adapter_model.safetensors").read_bytes() == bytes(
        range(40)
    )


def test_a_download_that_was_damaged_on_its_way_is_asked_for_again(hub, new_address, tmp_path):
    from mttl_storage.testing.hub import Flip

    repository = Repository.open(new_address("hf"), create=True)
    data = os.urandom(5000)
    item = repository.add("experts/a", {"weights.bin": data})
    where = f"/lfs/{item.files['weights.bin'].sha256}"
    hub.faults.add(Flip(), method="GET", path=where, times=1)
    assert repository.path("experts/a", "weights.bin").read_bytes() == data
    hub.faults.add(Flip(), method="GET", path=where, times=2)
    with pytest.raises(Corrupt, match="weights.bin"):
        repository.materialize(tmp_path / "plain")
    hub.faults.clear()
    repository.materialize(tmp_path / "plain")
    assert [path.name for path in (tmp_path / "plain" / "a").iterdir()] == ["weights.bin"]


# Tensors.

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
ODD = [-1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1.5, None, True, "x", [], {}, [0, 1], [-4, 4]]


def safetensors_of(dice):
    """A valid file of a few small tensors."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for number in range(dice.randint(1, 4)):
        kind = dice.choice(sorted(SIZES))
        shape = [dice.randint(1, 4) for _ in range(dice.randint(0, 3))]
        size = SIZES[kind] * math.prod(shape)
        offsets = [at, at + size]
        header[f"layer.{number}.lora_A"] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        at += size
    return header, dice.randbytes(at)


def packed(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutated(dice):
    """A file that is none, or not the one it was."""
    header, data = safetensors_of(dice)
    kind = dice.randrange(6)
    good = packed(header, data)
    whole = bytearray(good)
    if kind == 0:
        whole[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del whole[dice.randrange(len(whole)) :]
    elif kind == 2:
        size = dice.choice([0, 1, 2**16, 10**8, 10**9, 2**32, 2**63, 2**64 - 1, len(whole)])
        whole[:8] = struct.pack("<Q", size)
    elif kind == 3:
        name = dice.choice(sorted(header)[1:])
        field = dice.choice(["dtype", "shape", "data_offsets"])
        value = dice.choice([*ODD, "F8_E4M3", "C64", "Q4", [2**32, 2**32], [2**63, 2], [4, 0]])
        header[name][field] = value
        whole = bytearray(packed(header, data))
    elif kind == 4:
        text = json.dumps(header).encode()
        at = dice.randrange(len(text))
        junk = [b"NaN", b"[" * 5000, b'"a":1,', b"\xff", b"\0", b"9" * 400, b'"__metadata__":3,']
        whole = bytearray(
            packed(text[:at] + dice.choice(junk) + text[at + dice.randrange(8) :], data)
        )
    else:
        at = dice.randrange(len(whole))
        whole[at : at + dice.randrange(1, 9)] = dice.randbytes(dice.randrange(0, 16))
    return good, bytes(whole)


@pytest.fixture
def fresh():
    """Makes repositories in memory, each in place of the one before."""
    made = []

    def make():
        for store in made:
            store.rm("", recursive=True)
        repository = Repository.open("virtual://damage/tensors", create=True)
        made[:] = [repository.store]
        return repository

    yield make
    make().store.rm("", recursive=True)


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=FULL)])
def test_mutated_tensors_are_found_by_read_and_by_verify(fresh, count):
    dice, file = random.Random(1), "adapter_model.safetensors"
    for _ in range(count // 500):
        repository, pairs = fresh(), {f"experts/{n}": mutated(dice) for n in range(500)}
        with repository.batch() as batch:
            for name, (good, _) in pairs.items():
                batch.add(name, {file: good})
        for name, (_, bad) in pairs.items():
            folder = repository.store.item_folder(name, repository.item(name).digest)
            repository.store.pipe_file(f"{folder}/{file}", bad)
        for name, (good, bad) in pairs.items():
            if good == bad:
                assert repository.read(name, file) == good
                continue
            with pytest.raises(Corrupt, match="is damaged: expected"):
                repository.read(name, file)
        changed = {name for name, (good, bad) in pairs.items() if good != bad}
        assert {problem.where for problem in repository.verify()} == changed
        assert len(changed) > 480


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=FULL)])
def test_mutated_tensors_that_were_added_are_a_clear_error_or_tensors_to_their_reader(fresh, count):
    safetensors = pytest.importorskip("safetensors")
    dice, file, valid = random.Random(2), "adapter_model.safetensors", 0
    for _ in range(count // 500):
        repository, made = fresh(), {f"experts/{n}": mutated(dice)[1] for n in range(500)}
        with repository.batch() as batch:
            for name, data in made.items():
                batch.add(name, {file: data})
        assert repository.verify() == []
        for name, data in made.items():
            assert repository.read(name, file) == data
            try:
                tensors = safetensors.deserialize(data)
            except safetensors.SafetensorError as error:
                assert str(error).startswith("Error while deserializing")
                continue
            valid += 1
            for _, tensor in tensors:
                if tensor["dtype"] in SIZES:
                    size = SIZES[tensor["dtype"]] * math.prod(tensor["shape"])
                    assert len(tensor["data"]) == size
    assert count / 50 < valid < count / 2
