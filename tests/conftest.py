"""Servers that stand in for clouds, and fresh addresses on each of the backends."""

import os
import shutil

# huggingface_hub reads this when it is imported, so it is set before any test module is.
os.environ["HF_HUB_DISABLE_XET"] = "1"  # a loopback hub does not speak Xet
if shutil.which("nvidia-smi") is None:
    # Triton reads this when it is imported: its kernels then run one program after the other.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import contextlib
import importlib.util
import itertools

import pytest

from mttl_storage import cache, filesystem

TOKEN = "hf_a-token-of-the-tests"
ACCOUNT = "mttltest"


def _installed(name):
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(name) is not None
    return False


# Without the extras, as another project may install mttl-storage, the others are not tested.
HAS = {
    "az": _installed("azure.storage.blob"),
    "hf": _installed("huggingface_hub") and _installed("starlette"),
}
collect_ignore = [
    *([] if HAS["az"] else ["storage/test_azure.py", "storage/test_testing_azurite.py"]),
    *(
        []
        if HAS["hf"]
        else ["storage/test_hub.py", "storage/test_hub_pages.py", "storage/testing_hub"]
    ),
]
_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Nothing of a test is kept in the user's cache, nor read from there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "user_cache_path", lambda _: folder)
        yield folder


@pytest.fixture(scope="session")
def azurite():
    """The real Azurite, whose account is in the environment."""
    if not HAS["az"]:
        pytest.skip("the extra [azure] is not installed")
    from mttl_storage.testing import Azurite

    with Azurite() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", server.connection_string(ACCOUNT))
        yield server


@pytest.fixture(scope="session")
def hub():
    """A loopback hub, whose address and token are in the environment."""
    if not HAS["hf"]:
        pytest.skip("the extras [hf] and [testing] are not installed")
    from mttl_storage.testing import LoopbackHub

    with LoopbackHub(tokens={TOKEN: "write"}) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.endpoint)
        # What other libraries ask by themselves, huggingface_hub read when it was imported.
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", server.endpoint)
        patch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def hub_token(hub):
    """A token that may write to the loopback hub."""
    return TOKEN


@pytest.fixture(params=["local", "virtual", *(scheme for scheme in HAS if HAS[scheme])])
def scheme(request):
    """Each backend in turn."""
    return request.param


@pytest.fixture
def new_address(request, tmp_path):
    """Makes addresses with nothing at them, for a scheme."""
    made = []

    def make(scheme):
        number = next(_numbers)
        if scheme == "local":
            return f"local://{tmp_path / f'library-{number}'}"
        if scheme == "virtual":
            made.append(f"virtual://library-{number}")
            return made[-1]
        request.getfixturevalue({"az": "azurite", "hf": "hub"}[scheme])
        if scheme == "az":
            return f"az://{ACCOUNT}/tests/library-{number}"
        return f"hf://user/library-{number}"

    yield make
    for uri in made:
        store = filesystem(uri)
        if store.exists(""):
            for name in store.ls("", detail=False):
                store.rm(name, recursive=True)
