"""The HTTP interface of a loopback hub, as the client of huggingface_hub 2.4 uses it."""

import re
from itertools import islice
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mttl_storage.testing.hub_commits import decoded_commit, upload_plan
from mttl_storage.testing.hub_lfs import LargeFiles, content_response
from mttl_storage.testing.hub_repos import MAIN, Blob, Entry, Refused, Repo
from mttl_storage.testing.hub_shapes import is_true, listed, ref, sibling, told
from mttl_storage.testing.hub_state import HubState, json_body, parameter

_NAME = re.compile(r"[\w.-]{1,96}", re.ASCII)
_SMALL_PAGE = 50
"""What the real hub gives of commits and of expanded listings at once."""
_MOST_PATHS = 1000


def hub_app(state: HubState, large_files: LargeFiles) -> Starlette:
    """The hub itself. Paths must come to it as they were sent, percent signs included."""
    api = _Api(state, large_files)
    routes = [*api.routes(), *large_files.routes()]
    return Starlette(routes=routes, exception_handlers={Refused: _answer})


def storage_app(large_files: LargeFiles) -> Starlette:
    """The other host, which holds the LFS objects."""
    return Starlette(routes=large_files.storage_routes(), exception_handlers={Refused: _answer})


def _answer(request: Request, error: Any) -> Response:
    message = error.message.encode("ascii", "backslashreplace").decode().replace("\n", " ")
    headers = {**error.headers, "X-Error-Message": message}
    if error.code:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message}, error.status, headers)


class _Api:
    def __init__(self, state: HubState, large_files: LargeFiles) -> None:
        self._state = state
        self._large_files = large_files

    def routes(self) -> list[Route]:
        repo = "/api/{kind}/{owner}/{name}"
        at = "{revision}"
        return [
            Route("/api/whoami-v2", self._whoami),
            Route("/api/validate-yaml", self._validate_yaml, methods=["POST"]),
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/repos/delete", self._delete, methods=["DELETE"]),
            Route(repo, self._info),
            Route(f"{repo}/revision/{at}", self._info),
            Route(f"{repo}/tree/{at}", self._tree),
            Route(f"{repo}/tree/{at}/{{path:path}}", self._tree),
            Route(f"{repo}/paths-info/{at}", self._paths_info, methods=["POST"]),
            Route(f"{repo}/refs", self._refs),
            Route(f"{repo}/commits/{at}", self._commits),
            Route(f"{repo}/branch/{at}", self._create_branch, methods=["POST"]),
            Route(f"{repo}/branch/{at}", self._delete_branch, methods=["DELETE"]),
            Route(f"{repo}/tag/{at}", self._create_tag, methods=["POST"]),
            Route(f"{repo}/tag/{at}", self._delete_tag, methods=["DELETE"]),
            Route(f"{repo}/super-squash/{at}", self._squash, methods=["POST"]),
            Route(f"{repo}/preupload/{at}", self._preupload, methods=["POST"]),
            Route(f"{repo}/commit/{at}", self._commit, methods=["POST"]),
            Route(f"{repo}/xet-read-token/{at}", self._no_xet),
            Route(f"{repo}/xet-write-token/{at}", self._no_xet),
            Route(f"/{{owner}}/{{name}}/resolve/{at}/{{path:path}}", self._resolve),
            Route(f"/{{kind}}/{{owner}}/{{name}}/resolve/{at}/{{path:path}}", self._resolve),
        ]

    # Accounts and repositories

    async def _whoami(self, request: Request) -> Response:
        role = self._state.role(request)
        if role is None:
            raise Refused(401, "Invalid username or password.")
        user = self._state.options.user
        token = {"displayName": "loopback", "role": role}
        auth = {"type": "access_token", "accessToken": token}
        who = {"type": "user", "id": user, "name": user, "fullname": user, "orgs": []}
        return JSONResponse({**who, "auth": auth})

    async def _validate_yaml(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def _create(self, request: Request) -> Response:
        self._state.require_write(request)
        body = await json_body(request)
        kind, name = self._kind_and_name(body)
        if kind not in ("model", "dataset"):
            raise Refused(400, f"a loopback hub has models and datasets, no {kind}")
        if not all(_NAME.fullmatch(part) for part in name.split("/")):
            raise Refused(400, f"Invalid repo name: {name}")
        found = self._state.repos.get((kind, name))
        if found:
            url = self._state.address(found)
            text = f"You already created this {kind} repo: {name}"
            return JSONResponse({"error": text, "url": url}, 409, {"X-Error-Message": text})
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repo = Repo(kind, name, private, self._state.contents)
        self._state.repos[kind, name] = repo
        return JSONResponse({"url": self._state.address(repo), "name": name})

    async def _delete(self, request: Request) -> Response:
        self._state.require_write(request)
        kind, name = self._kind_and_name(await json_body(request))
        self._state.named(request, kind, name, write=True)
        del self._state.repos[kind, name]
        return Response("OK")

    def _kind_and_name(self, body: dict[str, Any]) -> tuple[str, str]:
        owner = body.get("organization") or self._state.options.user
        return body.get("type") or "model", f"{owner}/{body.get('name')}"

    # Reading

    async def _info(self, request: Request) -> Response:
        repo = self._state.repo(request)
        commit = repo.revision(parameter(request, "revision") or MAIN)
        query = request.query_params
        asked = query.getlist("expand") + query.getlist("expand[]")
        info: dict[str, Any] = {
            "_id": repo.branches[MAIN].oid[:24],
            "id": repo.name,
            "author": repo.name.partition("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "createdAt": repo.created,
            "lastModified": commit.date,
            "downloads": 0,
            "likes": 0,
            "tags": [],
        }
        if repo.kind == "model":
            info["modelId"] = repo.name
        if not asked or "siblings" in asked:
            detailed = query.get("blobs", "").lower() in ("true", "1")
            info["siblings"] = [sibling(path, blob, detailed) for path, blob in commit.tree.blobs()]
        kept = {"_id", "id", *asked} if asked else info.keys()
        return JSONResponse({key: value for key, value in info.items() if key in kept})

    async def _tree(self, request: Request) -> Response:
        repo = self._state.repo(request)
        commit = repo.revision(parameter(request, "revision"))
        path = parameter(request, "path").strip("/")
        entry = commit.tree.find(path) if path else Entry(commit.tree, commit.stamp)
        if entry is None or isinstance(entry.node, Blob):
            raise Refused(404, f"{path} does not exist on {commit.oid}", "EntryNotFound")
        query = request.query_params
        recursive, expand = (is_true(query.get(name)) for name in ("recursive", "expand"))
        size = self._page_size(_SMALL_PAGE if expand else None)
        after = query.get("cursor", "")
        prefix = f"{path}/" if path else ""
        found = entry.node.walk(recursive=recursive, after=after, prefix=prefix)
        page = list(islice(found, size + 1))
        shown = [listed(where, entry, expand) for where, entry in page[:size]]
        more = {"cursor": page[size - 1][0].removeprefix(prefix)} if len(page) > size else None
        return self._page(request, shown, more)

    async def _paths_info(self, request: Request) -> Response:
        repo = self._state.repo(request)
        commit = repo.revision(parameter(request, "revision"))
        form = parse_qs((await request.body()).decode(), keep_blank_values=True)
        paths = form.get("paths", [])
        if len(paths) > _MOST_PATHS:
            raise Refused(413, "too many parameters")
        expand = is_true(form.get("expand", [""])[0])
        found = ((path, commit.tree.find(path.rstrip("/"))) for path in paths)
        return JSONResponse([listed(path, entry, expand) for path, entry in found if entry])

    async def _resolve(self, request: Request) -> Response:
        repo = self._state.repo(request)
        commit = repo.revision(parameter(request, "revision"))
        path = parameter(request, "path")
        blob = commit.tree.blob(path)
        if blob is None:
            text = f"Entry not found: {path}"
            raise Refused(404, text, "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if not blob.sha256:
            return content_response(request, blob.content, headers)
        headers["X-Linked-ETag"] = f'"{blob.sha256}"'
        headers["X-Linked-Size"] = str(len(blob.content))
        headers["Location"] = self._large_files.redirect(blob)
        return Response("Found. Redirecting", 302, headers)

    # History

    async def _refs(self, request: Request) -> Response:
        repo = self._state.repo(request)
        branches = [ref(name, "heads", commit) for name, commit in repo.branches.items()]
        tags = [ref(name, "tags", commit) for name, commit in repo.tags.items()]
        answer = {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}
        return JSONResponse(answer)

    async def _commits(self, request: Request) -> Response:
        repo = self._state.repo(request)
        head = repo.revision(parameter(request, "revision"))
        number = int(request.query_params.get("p", "0"))
        size = self._page_size(_SMALL_PAGE)
        page = list(islice(head.line(), number * size, (number + 1) * size + 1))
        user = self._state.options.user
        more = {"p": number + 1} if len(page) > size else None
        return self._page(request, [told(commit, user) for commit in page[:size]], more)

    async def _create_branch(self, request: Request) -> Response:
        repo = self._state.repo(request, write=True)
        name = parameter(request, "revision")
        if name in repo.branches:
            raise Refused(409, f"Reference already exists: {name}")
        start = (await json_body(request)).get("startingPoint") or MAIN
        repo.branches[name] = repo.revision(start)
        return JSONResponse({"success": True}, 201)

    async def _delete_branch(self, request: Request) -> Response:
        repo = self._state.repo(request, write=True)
        name = parameter(request, "revision")
        repo.branch(name)
        if name == MAIN:
            raise Refused(403, "The branch main cannot be deleted")
        del repo.branches[name]
        return Response(status_code=204)

    async def _create_tag(self, request: Request) -> Response:
        repo = self._state.repo(request, write=True)
        name = str((await json_body(request))["tag"])
        if name in repo.tags:
            raise Refused(409, f"Reference already exists: {name}")
        repo.tags[name] = repo.revision(parameter(request, "revision"))
        return JSONResponse({"success": True}, 201)

    async def _delete_tag(self, request: Request) -> Response:
        repo = self._state.repo(request, write=True)
        name = parameter(request, "revision")
        if name not in repo.tags:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        del repo.tags[name]
        return Response(status_code=204)

    async def _squash(self, request: Request) -> Response:
        repo = self._state.repo(request, write=True)
        message = str((await json_body(request)).get("message", ""))
        repo.squash(parameter(request, "revision"), message)
        return JSONResponse({"success": True})

    # Writing

    async def _preupload(self, request: Request) -> Response:
        repo = self._state.repo(request, write=True)
        body = await json_body(request)
        tree = repo.revision(parameter(request, "revision")).tree
        plan = upload_plan(tree, body["files"], body.get("gitIgnore"), self._state.options)
        return JSONResponse({"files": plan})

    async def _commit(self, request: Request) -> Response:
        repo = self._state.repo(request, write=True)
        branch = parameter(request, "revision")
        if is_true(request.query_params.get("create_pr")):
            raise Refused(400, "a loopback hub has no pull requests")
        body = await request.body()
        commit = decoded_commit(body, repo, branch, self._state.contents)
        url = f"{self._state.address(repo)}/commit/{commit.oid}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}
        return JSONResponse(answer)

    async def _no_xet(self, request: Request) -> Response:
        text = (
            "this loopback hub has no Xet storage; give the client an open file, which it uploads"
            " with LFS, or set HF_HUB_DISABLE_XET=1"
        )
        raise Refused(404, text)

    # Pages

    def _page_size(self, most: int | None) -> int:
        size = self._state.options.page_size
        return min(size, most) if most else size

    def _page(self, request: Request, shown: list[Any], more: dict[str, Any] | None) -> Response:
        if more is None:
            return JSONResponse(shown)
        following = request.url.include_query_params(**more)
        return JSONResponse(shown, headers={"Link": f'<{following}>; rel="next"'})
