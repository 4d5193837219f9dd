"""Plain data: what JSON can hold, in one canonical form, and its digest.

Configs and recipes are kept as plain data, so that equal ones have equal bytes and equal digests.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any, where: str = "value") -> Any:
    """The same value made of dict, list, str, int, float, bool and None alone.

    Tuples become lists, sets become sorted lists, enums their value. Anything that JSON cannot
    hold (a tensor, a class, NaN, a key that is not a string) is an error.

    Args:
        value: what to convert.
        where: how errors name the value; parts of it are named by their path.

    Raises:
        TypeError: naming the part that is not plain.
        ValueError: naming the number that JSON does not have.
    """
    try:
        return _plain(value)
    except _NotPlainError as error:
        raise error.kind(f"{where}{''.join(reversed(error.path))} {error.problem}") from None


class _NotPlainError(Exception):
    """Gathers the path to the part that is not plain, from the inside out."""

    def __init__(self, kind: type[TypeError] | type[ValueError], problem: str) -> None:
        self.kind = kind
        self.problem = problem
        self.path: list[str] = []


def _plain(value: Any) -> Any:
    kind = type(value)
    if value is None or kind is str or kind is int or kind is bool:
        return value
    if kind is dict or isinstance(value, Mapping):
        return {_key(key): _part(part, ".", key) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_part(part, "[", i) for i, part in enumerate(value)]
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=lambda part: (str(part), repr(part)))
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        raise _NotPlainError(ValueError, f"is {value!r}, a number that JSON cannot hold")
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    raise _NotPlainError(
        TypeError,
        f"is a {kind.__name__}, which JSON cannot hold; give plain data (str, int, float, bool, "
        "None, lists and dicts of them)",
    )


def _key(key: Any) -> str:
    if isinstance(key, str):
        return str(key)
    raise _NotPlainError(TypeError, f"has a key {key!r} that is not a string")


def _part(part: Any, sign: str, place: object) -> Any:
    try:
        return _plain(part)
    except _NotPlainError as error:
        error.path.append(f".{place}" if sign == "." else f"[{place}]")
        raise


def canonical_json(value: Any, where: str = "value") -> bytes:
    """UTF-8 JSON with sorted keys and no spaces, the same for equal values."""
    text = json.dumps(
        plain(value, where), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return text.encode()


def recipe_digest(recipe: Any) -> str:
    """SHA-256, in hex, of a recipe's canonical JSON: what was done, told apart by content alone.

    Key order, tuple or list, and spaces make no difference; ``1`` and ``1.0`` do.
    """
    return hashlib.sha256(canonical_json(recipe, "recipe")).hexdigest()
