import json
from pathlib import Path

import pytest

from mttl_experts import Expert, ExpertInfo, ExpertLibrary


@pytest.fixture
def library(tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    for name in ("one", "two"):
        library.add_expert(Expert(ExpertInfo(name, "sums")))
    return library


def test_tags_are_added_shown_and_removed(app, library):
    where = ("--library", library.uri)
    assert json.loads(app("library", "tag", "one", "x", "y", "--json", *where).stdout) == ["x", "y"]
    assert app("library", "tag", "one", *where).output == "x y\n"
    assert json.loads(app("library", "tag", "one", "x", "--remove", "--json", *where).stdout) == [
        "y"
    ]


def test_remove_asks_and_restore_brings_back(app, library):
    where = ("--library", library.uri)
    refused = app("library", "remove", "one", *where)
    assert refused.exit_code == 1
    assert "Remove one from" in refused.output
    assert library.refresh().keys() == ["one", "two"]
    before = library.generation
    assert app("library", "remove", "one", "two", "--yes", *where).exit_code == 0
    assert library.refresh().keys() == []
    assert library.generation == before + 1
    assert app("library", "restore", "two", *where).exit_code == 0
    assert library.refresh().keys() == ["two"]
    assert app("library", "remove", "two", "--hard", "--yes", *where).exit_code == 0
    failed = app("library", "restore", "two", *where)
    assert failed.exit_code == 1
    assert "'two'" in failed.output.splitlines()[-1]
    missing = app("library", "remove", "two", "--yes", *where)
    assert missing.exit_code == 1
    assert "no expert 'two'" in missing.output


def test_rename(app, library):
    outcome = app("library", "rename", "one", "three", "--library", library.uri, "--json")
    assert json.loads(outcome.stdout)["new"] == "three"
    assert library.refresh().keys() == ["three", "two"]
    taken = app("library", "rename", "three", "two", "--library", library.uri)
    assert taken.exit_code == 1
    assert "has one of that name" in taken.output


def test_copy_and_update(app, library, tmp_path):
    target = f"local://{tmp_path}/copy"
    outcome = app("library", "copy", library.uri, target, "--selection", "one", "--json")
    assert json.loads(outcome.stdout)["experts"] == 1
    copied = ExpertLibrary(target)
    copied.update_info("one", tags=("mine",))
    assert app("library", "copy", library.uri, target, "--update").exit_code == 0
    assert copied.refresh().keys() == ["one", "two"]
    assert copied.infos()["one"].tags == ("mine",)


def test_gc_asks_and_tells(app, library):
    library.remove_expert("one")
    assert app("library", "gc", library.uri, "--grace", "0").exit_code == 1
    found = json.loads(app("library", "gc", library.uri, "--grace", "0", "--yes", "--json").stdout)
    assert found["items"] == 1
    assert "deleted" in app("library", "gc", library.uri, "--yes").output


def test_card_is_printed_or_written(app, library):
    text = app("library", "card", library.uri).output
    assert text.startswith("---\nlibrary_name: peft\n")
    assert app("library", "card", library.uri, "--write").exit_code == 0
    assert (Path(library.uri.removeprefix("local://")) / "README.md").read_text() == text
