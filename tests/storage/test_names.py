import pytest
from hypothesis import given
from hypothesis import strategies as st

from mttl_storage.names import LIMIT, ancestors, check_name, fold

GOOD = [
    "a",
    "experts/arithmetic",
    "experts/ai2_arc_ARC_Easy_1_0_0",
    "a/b/c.safetensors",
    "été/名前",
]
GOOD += ["microsoft/phi-2", "a+b=c", "con_text", "nulls", "com10", "x" * 200, ".hidden", "a b"]

BAD = {
    "dot dot": ["..", "a/../b", "../a", "a/..", "."],
    "absolute": ["/a", "//a", "C:\\a", "c:/a", "\\\\host\\share"],
    "empty parts": ["", "a//b", "a/", "/"],
    "reserved devices": [
        "con",
        "CON.txt",
        "a/nul",
        "Aux.safetensors",
        "com1",
        "LPT9.x",
        "com¹",
        "nul .x",
    ],
    "NUL and invisible": ["a\0b", "a\nb", "a\x7fb", "a\u200bb", "a\u202eb", "\ud800"],
    "4 KB": ["x" * 4096, "x/" * 2048 + "x", "é" * 101, "x" * 201, "/".join(["x" * 100] * 5)],
    "trailing dots and spaces": ["a.", "a ", " a", "a./b", "..."],
    "forbidden characters": ["a*b", "a?b", 'a"b', "a<b", "a|b", "a:b"],
    "our own files": [".mttl", ".MTTL/log", ".mttl/log/x", "a/.mttl-tmp-1"],
    "files of a hub": ["a/.git/x", ".Cache", "experts/README.md", "Datasets/.gitattributes/x"],
    "not NFC": ["e\u0301t\u00e9"],
}


@pytest.mark.parametrize("name", GOOD)
def test_ordinary_names_are_accepted(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", [n for names in BAD.values() for n in names], ids=ascii)
def test_names_that_some_backend_cannot_store_are_refused(name):
    with pytest.raises(ValueError, match="cannot be used") as caught:
        check_name(name)
    assert len(str(caught.value)) < 400


def test_a_name_must_be_a_string():
    with pytest.raises(TypeError, match="item name must be a str, not bytes"):
        check_name(b"a", "item name")


@pytest.mark.parametrize(
    ("one", "other"),
    [("Foo", "foo"), ("STRASSE", "straße"), ("Å", "å"), ("ﬁne", "FINE"), ("K", "k")],
)
def test_look_alikes_fold_to_the_same(one, other):
    assert fold(one) == fold(other)


@given(st.text(max_size=60))
def test_every_accepted_name_stays_below_its_root(name):
    try:
        check_name(name)
    except ValueError:
        return
    parts = name.split("/")
    assert all(part not in ("", ".", "..") for part in parts)
    assert len(name.encode()) <= LIMIT
    assert not set(name) & set('\\:*?"<>|\0')
    assert fold(fold(name)) == fold(name)


def test_ancestors_are_nearest_first():
    assert ancestors("a/b/c") == ["a/b", "a"]
    assert ancestors("a") == []
