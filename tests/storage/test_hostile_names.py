"""Names of every kind: refused with a clear error, or stored by every backend as they are."""

import random
import unicodedata
import warnings
from pathlib import PurePosixPath, PureWindowsPath

import pytest

from mttl_storage import Conflict, InvalidName, Repository, check_name, copy, names

FULL = [pytest.mark.slow, pytest.mark.timeout(3600)]
WORDS = r"""
.. . / // \ : * ' " ~ $HOME %2e%2e %2F # + & @ = -rf C: //server/share /etc/passwd
con NUL aux.txt COM1 lpt9.tar.gz com¹ conin$ CLOCK$ .mttl .MTTL-tmp-1
experts datasets README.md .git .cache
ﬁ ß ẞ İ Å µ ᾳ ½ ① Ω 😀 👩‍👩‍👧 名前 имя اسم नाम
"""
TOKENS = WORDS.split()
TOKENS += [" ", "\0", "\n", "\x7f", "\x85", "\u200b", "\u202e", "\ufeff", "\ud800", "\udfff"]
TOKENS += ["e\u0301", "\u0301", "\u0345", "\u0131", "\u017f", "\u212a", "\U0001d49c", "\U0010ffff"]
LETTERS = "abcXYZ019_-.éßΣςд字"


def made_up(dice):
    """A name."""
    kind = dice.random()
    if kind < 0.35:
        parts = dice.choices(TOKENS, k=dice.randint(1, 4))
        return dice.choice(["", "/", "x"]).join(parts)
    if kind < 0.6:
        size = dice.randint(1, 12)
        return "".join(dice.choices(LETTERS + "/", k=size)) + dice.choice(
            ["", ".json", dice.choice(TOKENS)]
        )
    if kind < 0.75:
        return "".join(chr(dice.randrange(0x110000)) for _ in range(dice.randint(1, 6)))
    if kind < 0.9:
        return "".join(chr(dice.randrange(0x20, 0x3000)) for _ in range(dice.randint(1, 6)))
    return dice.choice([*LETTERS, "x/", "é", "../", "名"]) * dice.choice([199, 201, 400, 4096])


def accepted(count):
    """The made up names that can be used."""
    found = []
    for seed in range(count):
        name = made_up(random.Random(seed))
        try:
            found.append(check_name(name))
        except InvalidName as error:
            assert 20 < len(str(error)) < 700
            assert "\n" not in str(error)
            str(error).encode()  # it can be printed
    return found


@pytest.mark.parametrize("count", [4000, pytest.param(20_000, marks=FULL)])
def test_a_name_is_refused_clearly_or_safe_on_every_system(count):
    usable = accepted(count)
    assert count / 10 < len(usable) < count * 0.9
    for name in usable:
        assert name == unicodedata.normalize("NFC", name)
        assert not set(name) & set('\\:*?"<>|\0\n')
        for path in (PurePosixPath(name), PureWindowsPath(name)):
            assert not path.is_absolute()
            assert not path.drive
            assert ".." not in path.parts
            assert "/".join(path.parts) == name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert not any(PureWindowsPath(part).is_reserved() for part in name.split("/"))
        assert all(len(part.encode()) <= 200 for part in name.split("/"))
        assert all(part == part.strip() and part[-1] != "." for part in name.split("/"))


@pytest.mark.parametrize("count", [4000, pytest.param(20_000, marks=FULL)])
def test_a_short_cut_for_ordinary_names_changes_nothing(count, monkeypatch):
    def is_accepted(name):
        try:
            return bool(check_name(name))
        except InvalidName:
            return False

    dice = random.Random(0)
    mixed = [
        f"{dice.choice(TOKENS)}{dice.choice('/._x')}{dice.choice(TOKENS)}" for _ in range(count)
    ]
    known = [made_up(random.Random(seed)) for seed in range(count)] + mixed
    quick = [is_accepted(name) for name in known]
    monkeypatch.setattr(names, "_ORDINARY", names.re.compile("(?!)"))
    assert quick == [is_accepted(name) for name in known]


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=FULL)])
def test_names_that_look_alike_are_not_both_taken(count):
    repository = Repository.open("virtual://look-alikes", create=True)
    state, pairs = repository._state, 0
    for name in accepted(count):
        forms = {name.casefold(), name.lower(), name.swapcase(), name.title()}
        forms |= {unicodedata.normalize(form, name) for form in ("NFKC", "NFC")}
        # An upper-case letter is alike only if it comes back: dotless i becomes an I, which is not.
        alike = {form for form in forms if form.casefold() == name.casefold()} | {name.casefold()}
        taken = state.successor("", "")
        item = {"digest": "", "files": {}, "info": {}}
        taken.apply({"kind": "add", "name": name, "item": item})
        for form in alike - {name}:
            pairs += 1
            with pytest.raises(Conflict, match="are the same where case is ignored"):
                taken.check_free(form)
        for inside in (f"{name}/x", f"{name.swapcase()}/x" if name.swapcase() in alike else name):
            with pytest.raises(Conflict):
                taken.check_free(inside)
    assert pairs > count / 10
    repository.store.rm("", recursive=True)


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=FULL)])
def test_names_come_back_as_they_went_in(address, local, tmp_path, count):
    distant = not address.startswith(("local", "virtual"))
    usable = accepted(count // 8 if distant else count)
    repository = Repository.open(address, create=True)
    state = repository._state.successor("", "")
    stored = {}
    for name in usable:
        try:
            state.check_free(f"experts/{name}")
            check_name(f"experts/{name}")
        except (Conflict, InvalidName):
            continue
        item = {"digest": "", "files": {}, "info": {}}
        state.apply({"kind": "add", "name": f"experts/{name}", "item": item})
        stored[f"experts/{name}"] = {name: name.encode(), "adapter_config.json": b"{}"}
    assert len(stored) > len(usable) / 2
    every = list(stored)
    for start in range(0, len(every), 100):
        with repository.batch() as batch:
            for name in every[start : start + 100]:
                batch.add(name, stored[name])
    again = Repository.open(address)
    assert list(again) == sorted(every)
    for name in every[:: 10 if distant else 1]:
        for file, data in stored[name].items():
            assert again.read(name, file) == data
    assert again.verify() == []
    copy(again, local)
    assert local.verify() == []
    assert {name: item.digest for name, item in local.items().items()} == {
        name: item.digest for name, item in again.items().items()
    }
    plain = local.materialize(tmp_path / "plain")
    for name in every:
        for file, data in stored[name].items():
            assert (plain / name.removeprefix("experts/") / file).read_bytes() == data
