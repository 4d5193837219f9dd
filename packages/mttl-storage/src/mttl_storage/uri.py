"""Addresses: ``local://``, ``virtual://``, ``az://`` and ``hf://``, parsed once, at the edge."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mttl_storage.errors import InvalidName

SCHEMES = ("local", "virtual", "az", "hf")

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
    return "/".join(parts)
