"""What holds for all packages at once."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
MEMBERS = PACKAGES + sorted(path.parent for path in ROOT.glob("apps/*/pyproject.toml"))


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def test_there_are_five_packages_and_four_apps():
    assert [path.name for path in PACKAGES] == [
        "mttl-adapters", "mttl-data", "mttl-experts", "mttl-routing", "mttl-storage"
    ]  # fmt: skip
    assert len(MEMBERS) == 9


@pytest.mark.parametrize("folder", MEMBERS, ids=lambda path: path.name)
def test_all_have_one_version_and_ask_for_each_other_by_a_range_with_it(folder):
    version = project(ROOT / "packages/mttl-storage")["version"]
    assert project(folder)["version"] == version
    extras = project(folder).get("optional-dependencies", {}).values()
    for text in [*project(folder)["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        if wanted.name.startswith("mttl-"):
            assert Version(version) in wanted.specifier
            assert {each.operator for each in wanted.specifier} == {">=", "<"}


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda path: path.name)
def test_a_package_has_a_readme_and_types(folder):
    assert (folder / "README.md").read_text().startswith(f"# {folder.name}\n")
    assert list(folder.glob("src/*/py.typed"))


def test_storage_asks_for_neither_torch_nor_a_cloud_client():
    wanted = project(ROOT / "packages/mttl-storage")["dependencies"]
    names = {Requirement(text).name for text in wanted}
    assert names <= {"fsspec", "platformdirs", "tenacity"}


def test_the_first_two_bash_blocks_of_the_readme_are_the_two_commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert blocks[0].strip() == "python -m pip install uv && uv run apps/train"
    assert blocks[1].strip() == "uv run apps/eval --merge uniform"


def python_blocks():
    for path in [ROOT / "README.md", ROOT / "packages/mttl-storage/README.md"]:
        for number, code in enumerate(
            re.findall(r"^```python\n(.*?)^```", path.read_text(), re.S | re.M)
        ):
            yield pytest.param(code, id=f"{path.parent.name}-{number}")


@pytest.mark.parametrize("code", list(python_blocks()))
@pytest.mark.parametrize("scheme", ["local", "virtual"])
def test_examples_run_as_written(code, scheme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if scheme == "virtual":
        code = code.replace("local://", "virtual://").replace('"my_repo"', '"virtual://my_repo"')
    exec(compile(code, "README.md", "exec"), {})


def test_no_lock_and_no_address_is_committed():
    assert "uv.lock" in (ROOT / ".gitignore").read_text()
    assert "://" not in (ROOT / "constraints.txt").read_text()
