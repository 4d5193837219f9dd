"""Addresses: ``local://``, ``virtual://``, ``az://`` and ``hf://``, parsed once, at the edge."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mttl_storage.errors import InvalidName

SCHEMES = ("local", "virtual", "az", "hf")

_CONTAINER = re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]|\$root|\$web")
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_FOLDER_LIMIT = 150
"""Most characters in the path of az://, which leaves room for an item, its digest and a file."""
_HUB_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")


@dataclass(frozen=True)
class Address:
    """Where a repository is. ``str`` gives the canonical form, without credentials.

    Args:
        scheme: one of SCHEMES.
        path: an absolute folder for local, a name for virtual, ``account/container/path`` for az,
            ``user/repo`` (or ``datasets/user/repo``) for hf.
    """

    scheme: str
    path: str

    def __str__(self) -> str:
        """The canonical address."""
        return f"{self.scheme}://{self.path}"


def parse_uri(uri: str | os.PathLike[str] | Address, default_scheme: str = "local") -> Address:
    """The address in canonical form; relative local paths become absolute.

    Args:
        uri: an address with a scheme, a path, or an address that was parsed before.
        default_scheme: what an address without a scheme belongs to. A Path is always local.
    """
    if isinstance(uri, Address):
        return uri
    if not isinstance(uri, (str, os.PathLike)):
        raise TypeError(f"an address must be a str or a Path, not {type(uri).__name__}")
    text = os.fspath(uri)
    if isinstance(uri, os.PathLike):
        return _local(text)
    match = _SCHEME.match(text)
    scheme, rest = (match[1].lower(), text[match.end() :]) if match else (default_scheme, text)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InvalidName(f"unknown scheme {scheme!r} in an address; use one of {known}")
    if scheme == "local":
        return _local(rest)
    return Address(scheme, _remote(scheme, rest))


def _local(path: str) -> Address:
    if not path:
        raise InvalidName("a local address needs a folder, as in 'local://my/library'")
    if "\0" in path:
        raise InvalidName(f"the local address {path!r} contains a NUL character")
    # abspath, not resolve: the address a user gave stays recognisable where links are in play.
    return Address("local", os.path.abspath(Path(path).expanduser()))  # noqa: PTH100


def _remote(scheme: str, rest: str) -> str:
    # What follows ? or # could be a signature, so it is never shown.
    if "?" in rest or "#" in rest or "@" in rest.split("/")[0]:
        raise InvalidName(
            f"the {scheme}:// address carries more than a name (a query, or a user part); "
            "pass credentials as token= or in the environment"
        )
    parts = [part for part in rest.split("/") if part]
    if not parts:
        raise InvalidName(f"a {scheme}:// address needs a name, as in '{scheme}://my-library'")
    if any(part in (".", "..") for part in parts) or any(ord(c) < 32 for c in rest):
        raise InvalidName(f"the {scheme}:// address {rest!r} has a part that cannot be used")
    path = "/".join(parts)
    if scheme == "az":
        azure_parts(path)
    if scheme == "hf":
        hub_parts(path)
    return path


def azure_parts(path: str) -> tuple[str, str, str]:
    """Account, container and the folder in it (empty if none) of an az:// address."""
    account, _, rest = path.partition("/")
    container, _, folder = rest.partition("/")
    if not _ACCOUNT.fullmatch(account):
        raise InvalidName(
            f"the account {account!r} of an az:// address cannot be: it has 3 to 24 lower-case "
            "letters and digits; the form is 'az://account/container/path'"
        )
    if not container:
        raise InvalidName(
            f"'az://{path}' names no container; the form is 'az://{account}/container/path'"
        )
    if not _CONTAINER.fullmatch(container):
        raise InvalidName(
            f"Azure allows no container {container!r}: 3 to 63 lower-case letters, digits and "
            f"single hyphens are legal; {_legal(container)!r} would be"
        )
    if len(folder) > _FOLDER_LIMIT:
        raise InvalidName(
            f"the path of an az:// address has {len(folder)} characters; at most {_FOLDER_LIMIT} "
            "are allowed, since Azure ends names at 1024"
        )
    return account, container, folder


def hub_parts(path: str) -> tuple[str, str]:
    """The kind of repository ("model" or "dataset") and its id, of an hf:// address."""
    kind = "dataset" if path.startswith("datasets/") else "model"
    repo = path.removeprefix("datasets/")
    names = repo.split("/")
    if len(names) != 2:
        raise InvalidName(
            f"'hf://{path}' names no repository; the form is 'hf://user/repo', or "
            "'hf://datasets/user/repo' for a dataset repository"
        )
    for name in names:
        if not _HUB_NAME.fullmatch(name) or name.endswith((".git", ".ipynb")):
            raise InvalidName(
                f"the hub allows no name {name!r}: up to 96 letters, digits, '-', '_' and '.' are "
                f"legal, no '--' or '..', no '.git' at the end; {_legal_on_hub(name)!r} would be"
            )
    return kind, repo


def _legal(container: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", container.lower()).strip("-")[:63].strip("-")
    return name if len(name) >= 3 else f"{name}-library".lstrip("-")


def _legal_on_hub(name: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    name = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", name)).removesuffix(".git")
    return name.strip("-.")[:96].strip("-.") or "library"
