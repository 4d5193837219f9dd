"""The JSON files of a repository, each with its own checksum.

A sealed file is one header line with the SHA-256 of the rest, and then one or more lines of JSON.
One flipped bit anywhere in it is Corrupt.
"""

import hashlib
import json
import math
from typing import Any

from mttl_storage.errors import Corrupt, StorageError

FORMAT = 1


def to_json(value: Any) -> bytes:
    """Canonical JSON on one line: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seal(body: bytes) -> bytes:
    """The body with a header line before it that proves it whole."""
    return _header(body) + body


def unseal(data: bytes, where: str) -> bytes:
    """The body of a sealed file, or Corrupt."""
    header, newline, body = data.partition(b"\n")
    if header + newline != _header(body):
        raise Corrupt(
            f"{where!r} is damaged: its checksum does not match; "
            "restore that file from a copy of the repository, and run verify"
        )
    return body


def from_json(data: bytes) -> Any:
    """The value in JSON, or ValueError. NaN and infinities are not JSON, though json reads them."""
    return _DECODER.decode(data.decode())


def parse(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object on a line, of a format that this version reads."""
    try:
        value = from_json(line)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{where!r} is not JSON: {error!s:.200}") from None
    if not isinstance(value, dict):
        raise Corrupt(f"{where!r} holds {type(value).__name__}, not a JSON object")
    found = value.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise StorageError(f"{where!r} has format {found!r:.80}; this version reads up to {FORMAT}")
    if found != FORMAT:
        raise Corrupt(f"{where!r} has no known format: {found!r:.80}")
    return value


def digest_of(body: bytes) -> str:
    """SHA-256 of a body, which the next log entry names."""
    return hashlib.sha256(body).hexdigest()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.80} is no number of JSON")
    return value


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


def _header(body: bytes) -> bytes:
    return to_json({"sha256": digest_of(body), "size": len(body)}) + b"\n"
