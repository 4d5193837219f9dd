"""What a client sends to a loopback hub to upload: the plan of each file, and the commit itself."""

import base64
import binascii
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache
from typing import Any

from mttl_storage.testing.hub_repos import Blob, Commit, Contents, Refused, Repo, Tree
from mttl_storage.testing.hub_state import Options


def upload_plan(
    tree: Tree, files: list[dict[str, Any]], ignore: str | None, options: Options
) -> list[dict[str, Any]]:
    """How each file is to be uploaded, whether .gitignore excludes it, and what is there now."""
    attributes = tree.blob(".gitattributes")
    large = _lfs_patterns(attributes.content if attributes else b"")
    if ignore is None:
        ignored = tree.blob(".gitignore")
        ignore = ignored.content.decode(errors="replace") if ignored else ""
    unwanted = tuple(line for line in ignore.split("\n") if line and not line.startswith("#"))
    plan = []
    for file in files:
        path = file["path"]
        is_large = file["size"] > options.regular_limit or _any_matches(large, path)
        told = {
            "path": path,
            "uploadMode": "lfs" if is_large else "regular",
            "shouldIgnore": _any_matches(unwanted, path),
        }
        if now := tree.blob(path):
            told["oid"] = now.etag
        plan.append(told)
    return plan


def decoded_commit(body: bytes, repo: Repo, branch: str, contents: Contents) -> Commit:
    """Carry out a commit sent as NDJSON. None of it happens if any of it cannot."""
    lines = _lines(body)
    key, header = next(lines, ("", {}))
    if key != "header":
        raise Refused(400, f"the first line of a commit is its header, not {key!r}")
    head = repo.branch(branch)
    if header.get("parentCommit") not in (None, head.oid):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    changes: dict[str, Blob | None] = {}
    for key, value in lines:
        path = _checked(value["path"])
        if key == "file":
            changes[path] = contents.regular(_content(value))
        elif key == "lfsFile":
            changes[path] = _object(value, repo)
        elif key == "deletedFile":
            _delete(head.tree, changes, path, [path])
        elif key == "deletedFolder":
            _delete(head.tree, changes, path, _below(head.tree, changes, path))
        else:
            raise Refused(400, f"this hub knows no operation {key!r}")
    title, description = header.get("summary", ""), header.get("description", "")
    return repo.commit(branch, title, description, changes)


def _lines(body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in filter(None, body.split(b"\n")):
        try:
            item = json.loads(line)
            yield item["key"], item["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(400, f"a line of the commit is not an operation: {error}") from error


def _checked(path: str) -> str:
    path = path.rstrip("/")
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or "\0" in path:
        raise Refused(400, f"Invalid path: {path}")
    return path


def _content(value: dict[str, Any]) -> bytes:
    if value.get("encoding", "utf-8") != "base64":
        return str(value["content"]).encode()
    try:
        return base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise Refused(400, f"the content of {value['path']} is not base64: {error}") from error


def _object(value: dict[str, Any], repo: Repo) -> Blob:
    blob = repo.objects.get(value["oid"])
    if blob is None:
        text = "Your push was rejected because an LFS pointer pointed to a file that does not exist"
        raise Refused(400, f"{text}: {value['path']} ({value['oid']})")
    if value.get("size", len(blob.content)) != len(blob.content):
        raise Refused(400, f"{value['path']} has {len(blob.content)} bytes, not {value['size']}")
    return blob


def _below(tree: Tree, changes: dict[str, Blob | None], path: str) -> list[str]:
    entry = tree.find(path)
    kept = dict(entry.node.blobs(f"{path}/")) if entry and isinstance(entry.node, Tree) else {}
    return [*kept, *(added for added in changes if added.startswith(f"{path}/"))]


def _delete(tree: Tree, changes: dict[str, Blob | None], path: str, files: list[str]) -> None:
    there = [file for file in files if (changes[file] if file in changes else tree.blob(file))]
    if not there:
        raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    changes.update(dict.fromkeys(there))


@lru_cache(maxsize=64)
def _lfs_patterns(attributes: bytes) -> tuple[str, ...]:
    lines = (line.split() for line in attributes.decode(errors="replace").splitlines())
    return tuple(line[0] for line in lines if "filter=lfs" in line[1:])


def _any_matches(patterns: tuple[str, ...], path: str) -> bool:
    """Whether a path matches a pattern as git has them, without negation and anchored folders."""
    name = path.rpartition("/")[2]
    for pattern in patterns:
        bare = pattern.rstrip("/")
        if "/" in bare:
            if fnmatch(path, bare.lstrip("/")):
                return True
        elif fnmatch(name, bare) or any(fnmatch(part, bare) for part in path.split("/")[:-1]):
            return True
    return False
