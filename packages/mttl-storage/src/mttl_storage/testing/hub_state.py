"""What the parts of a loopback hub share: its options, its repositories, and who may do what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any, Literal
from urllib.parse import unquote

from starlette.requests import Request

from mttl_storage.testing.hub_repos import KINDS, Contents, Refused, Repo

Role = Literal["read", "write"]
MEGABYTE = 1024 * 1024


@dataclass(frozen=True)
class Options:
    """How a hub behaves."""

    tokens: Mapping[str, Role] = field(repr=False)
    user: str
    """Who the tokens belong to."""
    page_size: int
    """How many entries a page of a listing has at most."""
    regular_limit: int
    """Files of more bytes than this are LFS objects whatever their name."""
    multipart_threshold: int
    """LFS objects of more bytes than this come in parts."""
    part_size: int


class HubState:
    """The repositories, and the check of every request that wants one."""

    def __init__(self, options: Options, endpoint: str, storage_endpoint: str) -> None:
        """Start with no repository."""
        self.options = options
        self.endpoint = endpoint
        self.storage_endpoint = storage_endpoint
        self.contents = Contents()
        self.repos: dict[tuple[str, str], Repo] = {}

    def address(self, repo: Repo) -> str:
        """Where people would look at a repository."""
        prefix = "" if repo.kind == "model" else f"/{repo.kind}s"
        return f"{self.endpoint}{prefix}/{repo.name}"

    def role(self, request: Request) -> Role | None:
        """What the token of a request allows, or None if it has no token."""
        header = request.headers.get("authorization")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        role = self.options.tokens.get(token)
        if role is None or scheme.lower() != "bearer":
            raise Refused(401, "Invalid credentials in Authorization header")
        return role

    def require_write(self, request: Request) -> None:
        """Let nobody pass who may not write."""
        role = self.role(request)
        if role is None:
            raise Refused(401, "Invalid username or password.")
        if role != "write":
            raise Refused(403, "You must use a write token to upload to a repository")

    def repo(self, request: Request, *, write: bool = False) -> Repo:
        """The repository that the path of a request names, if it may be seen or written."""
        kind = KINDS.get(request.path_params.get("kind", "models"), "")
        name = f"{parameter(request, 'owner')}/{parameter(request, 'name')}"
        return self.named(request, kind, name, write=write)

    def named(self, request: Request, kind: str, name: str, *, write: bool = False) -> Repo:
        """The repository of a kind and a name, if it may be seen or written."""
        role = self.role(request)
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and role is None):
            # Without a token the two cases look the same, so that no name leaks.
            status = 401 if role is None else 404
            message = "Invalid username or password." if role is None else "Repository not found"
            raise Refused(status, message, "RepoNotFound")
        if write:
            self.require_write(request)
        return repo


def parameter(request: Request, name: str) -> str:
    """A part of the path. Routing sees the path as it came, so that %2F is not a slash there."""
    return unquote(request.path_params.get(name, ""))


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request."""
    try:
        body = await request.json()
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    return body
