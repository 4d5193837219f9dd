import socket
import time

import pytest

# It is read without the extras as well, and then not used: imports are in the fixtures.


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch):
    """The client as it is by default, but for names beyond this machine and its owner's token."""
    look_up = socket.getaddrinfo

    def checked(host, *rest, **options):
        assert host in ("127.0.0.1", "localhost", b"127.0.0.1", b"localhost"), host
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", checked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")


@pytest.fixture
def slept(monkeypatch):
    """How long the client wanted to wait, each time that it did; it does not."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def hub():
    from mttl_storage.testing.hub import LoopbackHub
    from tests.storage.testing_hub.client import TOKENS

    with LoopbackHub(
        TOKENS, page_size=3, regular_limit=4000, multipart_threshold=5000, part_size=2000
    ) as hub:
        yield hub
        assert not hub.violations


@pytest.fixture
def api(hub):
    """A client that may write, and an empty repository."""
    from huggingface_hub import HfApi

    from tests.storage.testing_hub.client import REPO

    api = HfApi(endpoint=hub.endpoint, token="hf_writer")
    api.create_repo(REPO)
    return api
