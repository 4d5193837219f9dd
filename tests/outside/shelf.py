"""A small project of someone else that needs mttl-storage alone, and is tested without the rest.

It keeps models on a shelf. CI installs the built wheel and pytest into a clean environment, and
runs a copy of this file elsewhere (``pytest shelf.py``), so that nothing of the workspace can be
imported. In the workspace itself it is not collected.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import mttl_storage
from mttl_storage import Conflict, Corrupt, NotFound, Repository, copy

ABSENT = ["torch", "azure", "huggingface_hub", "safetensors", "numpy", "mttl_experts", "starlette"]


class Shelf:
    """Models by name, on a repository of any kind."""

    def __init__(self, address):
        self.repository = Repository.open(address, create=True)

    def put(self, name, weights, **facts):
        self.repository.add(f"models/{name}", {"weights.bin": weights}, facts)

    def get(self, name):
        return self.repository.read(f"models/{name}", "weights.bin")

    def find(self, **facts):
        items = self.repository.refresh().items("models/").items()
        return [name for name, item in items if facts.items() <= item.info.items()]


@pytest.fixture(params=["local", "virtual"])
def address(request, tmp_path):
    return f"local://{tmp_path}/shelf" if request.param == "local" else f"virtual://{tmp_path.name}"


def command(*arguments):
    whole = [sys.executable, "-m", "mttl_storage", *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=60)


def test_this_is_the_wheel_and_nothing_else_is_here():
    assert "site-packages" in Path(mttl_storage.__file__).parts
    assert [name for name in ABSENT if importlib.util.find_spec(name)] == []
    assert Path(mttl_storage.__file__).with_name("py.typed").is_file()


def test_a_shelf_keeps_what_was_put_on_it(address):
    shelf = Shelf(address)
    shelf.put("a", b"1", task="sums")
    shelf.put("b", b"2", task="words")
    again = Shelf(address)
    assert (again.get("a"), again.find(task="words")) == (b"1", ["models/b"])
    with pytest.raises(Conflict):
        again.put("a", b"3", task="sums")
    with pytest.raises(NotFound, match="did you mean 'models/a'"):
        again.get("aa")
    assert again.repository.path("models/a", "weights.bin").read_bytes() == b"1"
    assert again.repository.verify() == []


def test_a_shelf_is_copied_and_the_copy_is_the_same(address, tmp_path):
    shelf = Shelf(address)
    shelf.put("a", bytes(100_000), task="sums")
    assert copy(address, tmp_path / "copy") == 1
    assert copy(address, tmp_path / "copy") == 0
    assert Shelf(tmp_path / "copy").find(task="sums") == ["models/a"]


def test_damage_is_found(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.put("a", b"1")
    shelf.repository.path("models/a", "weights.bin").write_bytes(b"2")
    with pytest.raises(Corrupt):
        shelf.get("a")
    ended = command("verify", tmp_path)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "models/a" in ended.stdout


def test_the_command_line_looks_after_a_shelf(tmp_path):
    Shelf(tmp_path / "one").put("a", b"1", task="sums")
    ended = command("ls", tmp_path / "one")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split("\t")[:3] == ["models/a", "1", "1"]
    assert command("cp", tmp_path / "one", tmp_path / "two").stdout == "copied 1 items\n"
    assert command("verify", f"local://{tmp_path}/two").stdout == "all well\n"
    Shelf(tmp_path / "two").repository.remove("models/a")
    assert command("gc", tmp_path / "two", "--grace", "0").stdout.startswith(
        "deleted 1 files, 1 by"
    )
    assert command("ls", tmp_path / "two").stdout == ""
    ended = command("ls", tmp_path / "three")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: there is no repository at")


@pytest.mark.parametrize(
    ("address", "extra"), [("az://account/container", "azure"), ("hf://user/repo", "hf")]
)
def test_a_cloud_names_the_extra_that_it_needs(address, extra):
    with pytest.raises(ImportError, match=rf"install mttl-storage\[{extra}\]"):
        Repository.open(address)
    ended = command("ls", address)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert f"mttl-storage[{extra}]" in ended.stderr


def test_importing_it_is_quick():
    code = "import sys, mttl_storage; print(len(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert int(ended.stdout) < 800
