"""A credential shows nowhere."""

import io
import logging
import pickle
import traceback

import pytest

from mttl_storage import Denied, NotFound, Repository, filesystem
from mttl_storage.secrets import Secret, hide, redacted

FILES = {"config.json": b"{}", "adapter_model.safetensors": b"x" * 5000}


@pytest.fixture
def all_logs():
    """Everything that any logger says, at the lowest level."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    names = [n for n in logging.root.manager.loggerDict if not n.startswith(("asyncio", "uvicorn"))]
    levels = {name: logging.getLogger(name).level for name in names}
    before = root.level
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.setLevel(logging.DEBUG)
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)
    root.setLevel(before)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(params=["local", "virtual", "az-sas", "az-key", "hf"])
def place(request, new_address, monkeypatch):
    """An address, a credential for it, and the parts of that which nobody may see."""
    kind = request.param
    if kind in ("local", "virtual"):
        return new_address(kind), "hf_SECRET-secret", ["SECRET"]
    if kind == "hf":
        token = request.getfixturevalue("hub_token")
        monkeypatch.delenv("HF_TOKEN")
        return new_address("hf"), token, [token]
    address = new_address("az")
    azurite = request.getfixturevalue("azurite")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_SERVICE_ENDPOINT", f"http://127.0.0.1:{azurite.port}")
    if kind == "az-key":
        return address, azurite.key(), [azurite.key()]
    sas = azurite.sas()
    [signature] = [part[len("sig=") :] for part in sas.split("&") if part.startswith("sig=")]
    return address, sas, [sas, signature]


def test_a_credential_shows_nowhere(place, all_logs):
    address, token, parts = place
    repository = Repository.open(address, token=token, create=True)
    repository.add("experts/a", FILES)
    store = filesystem(address, token=token)
    shown = [repr(repository), str(repository.__dict__), repr(store), str(vars(store))]
    shown += [store.to_json(), str(store.to_dict()), str(store.storage_options)]
    shown += [repr(pickle.dumps(repository)), repr(pickle.dumps(store))]
    with pytest.raises(NotFound) as caught:
        Repository.open(f"{address}-missing", token=token)
    shown += [repr(caught.value), "".join(traceback.format_exception(caught.value))]
    with pytest.raises(NotFound) as caught:
        store.cat_file("missing")
    shown += [repr(caught.value), "".join(traceback.format_exception(caught.value))]
    assert caught.value.__context__ is None or not store.distant
    for entry in repository.store.scan():
        shown.append(repr(repository.store.cat_file(entry.key)))
    shown.append(all_logs.getvalue())
    for part in parts:
        assert not [text for text in shown if part in text]
    if repository.store.distant:
        assert "GET" in all_logs.getvalue()  # the clients did say something


@pytest.mark.parametrize("error", ["refused", "wrong"])
def test_a_broken_connection_or_a_refusal_shows_no_signature(
    azurite, monkeypatch, new_address, error, all_logs
):
    from mttl_storage.store import azure_answers

    address = new_address("az")
    port = azurite.port if error == "wrong" else 9
    monkeypatch.setattr(azure_answers, "CONNECT_PATIENCE", 0.1)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_SERVICE_ENDPOINT", f"http://127.0.0.1:{port}")
    sas = "sv=2025-01-05&ss=b&srt=sco&sp=rwdlac&se=2099-01-01T00:00:00Z&sig=SECRETsignature%3D"
    with pytest.raises((Denied, Exception)) as caught:
        Repository.open(address, token=sas)
    text = "".join(traceback.format_exception(caught.value)) + all_logs.getvalue()
    assert "SECRETsignature" not in text
    assert "\n" not in str(caught.value)
    assert address in str(caught.value)


def test_a_sas_is_never_sent_over_plain_http_but_to_this_machine(monkeypatch):
    pytest.importorskip("azure.storage.blob")
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_SERVICE_ENDPOINT", "http://blobs.example.com")
    with pytest.raises(Denied, match="over plain http to 'blobs.example.com'"):
        Repository.open("az://account/container", token="sv=1&sig=SECRET-signature")


def test_a_token_is_never_sent_over_plain_http_but_to_this_machine(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example.com")
    with pytest.raises(Denied, match="over plain http to 'hub.example.com'"):
        Repository.open("hf://user/repo", token="hf_SECRET-secret")


def test_a_secret_is_not_shown_or_pickled():
    secret = Secret("hf_a-secret-to-hide")
    assert "a-secret" not in f"{secret!r} {secret}"
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(secret)
    assert redacted("it is hf_a-secret-to-hide.") == "it is ***."


def test_the_signature_of_a_sas_is_hidden_wherever_it_stands():
    hide("?sv=2025&sig=a%2Fb%3Dsignature&se=2099")
    assert redacted("GET /x?sig=a%2Fb%3Dsignature&sv=2025") == "GET /x?sig=***&sv=2025"
    assert redacted("a/b=signature") == "***"
    hide("AccountName=x;AccountKey=key-in-a-connection==;BlobEndpoint=https://x")
    assert redacted("with key-in-a-connection==") == "with ***"
