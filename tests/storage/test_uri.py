import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mttl_storage import InvalidName, Repository, filesystem, parse_uri


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


@pytest.mark.parametrize(
    ("address", "canonical"),
    [
        ("az://account/container", "az://account/container"),
        ("AZ://account/container/", "az://account/container"),
        ("az://account/container//deep/er/", "az://account/container/deep/er"),
        ("az://account/$web", "az://account/$web"),
        ("az://acc/a-1/Ünïcode and space", "az://acc/a-1/Ünïcode and space"),
        ("hf://user/repo", "hf://user/repo"),
        ("hf://datasets/user/Repo_1.x-y/", "hf://datasets/user/Repo_1.x-y"),
    ],
)
def test_distant_addresses_have_one_form(address, canonical):
    assert str(parse_uri(address)) == canonical
    assert parse_uri(canonical) == parse_uri(address)


@pytest.mark.parametrize(
    ("container", "legal"),
    [
        ("my_lora_library", "my-lora-library"),
        ("MyLibrary", "mylibrary"),
        ("a--b", "a-b"),
        ("-a-b-", "a-b"),
        ("ab", "ab-library"),
        ("x" * 64, "x" * 63),
        ("été", "t-library"),
        ("___", "library"),
    ],
)
def test_an_illegal_container_is_refused_with_a_legal_one(container, legal):
    with pytest.raises(ValueError, match="Azure allows no container") as caught:
        parse_uri(f"az://account/{container}/path")
    assert repr(legal) in str(caught.value)
    assert parse_uri(f"az://account/{legal}/path")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("az://account", "names no container"),
        ("az://account/", "names no container"),
        ("az://My_Account/container", "3 to 24 lower-case letters and digits"),
        ("az://ab/container", "3 to 24 lower-case letters and digits"),
        ("az://account/container/../other", "has a part that cannot be used"),
        ("az://account/container/a\x01", "has a part that cannot be used"),
        ("az://account/container/" + "x" * 200, "at most 150"),
        ("hf://user", "names no repository"),
        ("hf://datasets/user", "names no repository"),
        ("hf://user/repo/more", "names no repository"),
        ("hf://user/re--po", "'re-po' would be"),
        ("hf://user/repo.git", "'repo' would be"),
        ("hf://user/-repo", "'repo' would be"),
        ("hf://us er/repo", "'us-er' would be"),
        ("hf://user/" + "x" * 97, "up to 96 letters"),
        ("hf://datasets/user/a..b", "'a.b' would be"),
    ],
)
def test_an_address_that_a_service_would_refuse_says_what_is_legal(bad, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        parse_uri(bad)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=80).filter(lambda text: not set(text) & set("/?#@")))
def test_what_is_proposed_is_always_legal(name):
    for form in ("az://account/{}/path", "hf://user/{}", "hf://datasets/{}/repo"):
        try:
            parse_uri(form.format(name))
        except ValueError as error:
            for proposed in re.findall(r"; '([^']*)' would be", str(error)):
                parse_uri(form.format(proposed))


@pytest.mark.parametrize("open_it", [filesystem, Repository.open])
@pytest.mark.parametrize("bad", ["az://account/my_lora_library", "hf://user/re--po", "s3://x/y"])
def test_an_illegal_address_is_refused_before_anything_is_asked(open_it, bad):
    with pytest.raises(InvalidName):
        open_it(bad)
