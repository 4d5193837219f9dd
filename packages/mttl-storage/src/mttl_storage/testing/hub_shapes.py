"""How a loopback hub writes files, folders, commits and references as JSON."""

from typing import Any

from mttl_storage.testing.hub_repos import Blob, Commit, Entry


def listed(path: str, entry: Entry, expand: bool) -> dict[str, Any]:
    """One file or folder of a listing."""
    node = entry.node
    told: dict[str, Any] = {"type": "directory", "oid": node.oid, "size": 0, "path": path}
    if isinstance(node, Blob):
        told.update(type="file", size=len(node.content))
        if node.sha256:
            told["lfs"] = _lfs(node)
    if expand:
        oid, title, date = entry.stamp
        told["lastCommit"] = {"id": oid, "title": title, "date": date}
    return told


def _lfs(blob: Blob) -> dict[str, Any]:
    size = len(blob.content)
    return {"oid": blob.sha256, "size": size, "pointerSize": blob.pointer_size}


def sibling(path: str, blob: Blob, detailed: bool) -> dict[str, Any]:
    """One file in what is told of a repository."""
    told: dict[str, Any] = {"rfilename": path}
    if detailed:
        told.update(size=len(blob.content), blobId=blob.oid)
        if blob.sha256:
            told["lfs"] = {**_lfs(blob), "sha256": blob.sha256}
    return told


def ref(name: str, kind: str, commit: Commit) -> dict[str, str]:
    """One branch or tag."""
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit.oid}


def told(commit: Commit, user: str) -> dict[str, Any]:
    """One commit."""
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.description,
        "authors": [{"user": user}],
        "date": commit.date,
        "formatted": {"title": commit.title, "message": commit.description},
    }


def is_true(value: str | None) -> bool:
    """Whether a parameter of a request is set."""
    return (value or "").lower() in ("true", "1")
