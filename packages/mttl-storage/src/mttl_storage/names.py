"""Which names items and files may have.

The rule is one for every backend, so that anything can be copied anywhere.
"""

import re
import unicodedata

from mttl_storage.errors import InvalidName

LIMIT = 400
"""Most UTF-8 bytes in a whole name."""
SEGMENT_LIMIT = 200
"""Most UTF-8 bytes between two slashes; file systems stop at 255, and temporary names need room."""
PRIVATE = ".mttl"
"""The folder of a repository that holds its log."""

_PLAIN = re.compile(r"[A-Za-z0-9_\-./ ]*")
_PART = r"(?!aux|clock|com|con|lpt|nul|prn|readme)[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_-])?"
_ORDINARY = re.compile(f"{_PART}(?:/{_PART})*", re.ASCII | re.IGNORECASE)
"""Most names there are, and no name that cannot be used; others are looked at more closely."""
_FORBIDDEN = set('\\:*?"<>|')
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_DEVICES = {"con", "prn", "aux", "nul", "clock$", "conin$", "conout$"} | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"
}


_REPOSITORY_FOLDERS = {".git", ".cache"}
_SHOWN_FOLDERS = {"experts", "datasets"}
_SHOWN_FILES = {"readme.md", ".gitattributes", ".gitignore", PRIVATE}
"""What lies at the root of a hub repository, where experts and datasets are shown by name."""


def check_name(name: str, what: str = "name") -> str:
    """The name itself, if every backend can store it; InvalidName says what is wrong otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a str, not {type(name).__name__}")
    problem = _problem(name)
    if problem:
        shown = repr(name if len(name) <= 80 else name[:77] + "...")
        raise InvalidName(f"{what} {shown} cannot be used: {problem}")
    return name


def fold(name: str) -> str:
    """What a name becomes on a file system that ignores case and Unicode form."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def ancestors(name: str) -> list[str]:
    """Every folder above a name, nearest first: "a/b/c" gives ["a/b", "a"]."""
    found = []
    while "/" in name:
        name = name.rpartition("/")[0]
        found.append(name)
    return found


def _problem(name: str) -> str | None:
    if len(name) <= SEGMENT_LIMIT and _ORDINARY.fullmatch(name):
        return None
    if not name:
        return "it is empty"
    for character in () if _PLAIN.fullmatch(name) else name:
        if character in _FORBIDDEN:
            return f"it contains {character!r}"
        if unicodedata.category(character) in _HIDDEN_CATEGORIES:
            return f"it contains the invisible character {character!r}"
    if len(name.encode()) > LIMIT:
        return f"it has {len(name.encode())} bytes; at most {LIMIT} are allowed"
    if name != unicodedata.normalize("NFC", name):
        return "its characters are not in Unicode form NFC; unicodedata.normalize makes it so"
    if name.startswith("/"):
        return "it is absolute; names are relative to the repository"
    segments = name.split("/")
    if fold(segments[0]) == PRIVATE:
        return f"{PRIVATE!r} is where the repository keeps its log"
    folder, shown = segments[0], segments[1:2]
    if fold(folder) in _SHOWN_FOLDERS and shown and fold(shown[0]) in _SHOWN_FILES:
        return f"{shown[0]!r} is a file of the repository itself"
    return next(filter(None, map(_segment_problem, segments)), None)


def _segment_problem(segment: str) -> str | None:
    if not segment:
        return "it has an empty part; single slashes separate parts, and none ends it"
    if segment in (".", ".."):
        return f"{segment!r} is not allowed as a part"
    if len(segment.encode()) > SEGMENT_LIMIT:
        return f"a part has {len(segment.encode())} bytes; at most {SEGMENT_LIMIT} are allowed"
    if segment != segment.strip() or segment.endswith("."):
        return f"its part {segment!r} begins or ends with a space, or ends with a dot"
    if fold(segment) in _REPOSITORY_FOLDERS:
        return f"no hub takes files in a folder {segment!r}"
    if segment.startswith(f"{PRIVATE}-"):
        return f"parts that begin with '{PRIVATE}-' are temporary files"
    if fold(segment.split(".")[0].rstrip()) in _DEVICES or segment.lower() in _DEVICES:
        return f"its part {segment!r} is a device on some systems"
    return None
