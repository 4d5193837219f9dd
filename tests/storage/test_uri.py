from pathlib import Path

import pytest

from mttl_storage import parse_uri


@pytest.mark.parametrize("form", ["local://lib/x", "lib/x", "./lib/x", Path("lib/x"), "lib/y/../x"])
def test_relative_local_addresses_resolve_against_the_current_folder(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(parse_uri(form)) == f"local://{tmp_path}/lib/x"


@pytest.mark.parametrize("form", ["local:///abs/x", "/abs/x", Path("/abs/x"), "LOCAL:///abs/x/"])
def test_absolute_local_addresses(form):
    address = parse_uri(form)
    assert (address.scheme, address.path, str(address)) == ("local", "/abs/x", "local:///abs/x")
    assert parse_uri(address) is address


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(parse_uri("~/lib")) == "local:///home/someone/lib"


def test_the_default_scheme_is_for_addresses_without_one():
    assert str(parse_uri("user/repo", default_scheme="hf")) == "hf://user/repo"
    assert parse_uri("local:///x", default_scheme="hf").scheme == "local"
    assert parse_uri(Path("/x"), default_scheme="hf").scheme == "local"


def test_virtual_addresses_are_names():
    assert str(parse_uri("virtual://lib//x/")) == "virtual://lib/x"


@pytest.mark.parametrize(
    "bad", ["", "local://", "virtual://", "s3://x/y", "virtual://a/../b", "a\0b", "hf://"]
)
def test_addresses_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="address"):
        parse_uri(bad)


def test_an_address_must_be_text():
    with pytest.raises(TypeError, match="not int"):
        parse_uri(3)


@pytest.mark.parametrize(
    "bad", ["az://a/c?sig=SECRET", "hf://user:SECRET@x/y", "virtual://x#SECRET"]
)
def test_a_credential_in_an_address_is_refused_and_not_shown(bad):
    with pytest.raises(ValueError, match="token=") as caught:
        parse_uri(bad)
    assert "SECRET" not in str(caught.value)
