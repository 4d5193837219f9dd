"""The LFS side of a loopback hub: batch, verify, completion, and the other host with the objects.

The other host knows no tokens. Its addresses carry what allows their use, as signed ones do.
"""

import hashlib
import hmac
import math
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mttl_storage.testing.hub_repos import Blob, Refused, Repo
from mttl_storage.testing.hub_state import HubState, json_body

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class _Upload:
    """A permission to upload one object, whole or in parts."""

    repo: Repo
    sha256: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)


class LargeFiles:
    """Takes LFS objects in and hands them out."""

    def __init__(self, state: HubState) -> None:
        """Serve the repositories of ``state``."""
        self._state = state
        self._uploads: dict[str, _Upload] = {}
        self._secret = secrets.token_bytes(16)

    def routes(self) -> list[Route]:
        """What the hub itself answers."""
        lfs = "{owner}/{name}.git/info/lfs/objects"
        return [
            Route("/api/complete_multipart", self._complete, methods=["POST"]),
            *(
                Route(f"{prefix}/{lfs}/{verb}", handler, methods=["POST"])
                for prefix in ("", "/{kind}")
                for verb, handler in (("batch", self._batch), ("verify", self._verify))
            ),
        ]

    def storage_routes(self) -> list[Route]:
        """What the other host answers."""
        return [
            Route("/lfs/{sha256}", self._get, methods=["GET"]),
            Route("/lfs/{sha256}", self._put, methods=["PUT"]),
            Route("/lfs/{sha256}/{part:int}", self._put_part, methods=["PUT"]),
        ]

    def redirect(self, blob: Blob) -> str:
        """Where an object may be downloaded from."""
        signature = self._signature(blob.sha256)
        return f"{self._state.storage_endpoint}/lfs/{blob.sha256}?signature={signature}"

    async def _batch(self, request: Request) -> Response:
        repo = self._state.repo(request, write=True)
        body = await json_body(request)
        if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
            raise Refused(400, "only the upload of sha256 objects is known here")
        multipart = "multipart" in body.get("transfers", [])
        objects = [self._action(repo, each, multipart) for each in body["objects"]]
        transfer = "multipart" if any(_is_multipart(each) for each in objects) else "basic"
        return JSONResponse({"transfer": transfer, "objects": objects})

    def _action(self, repo: Repo, wanted: dict[str, Any], multipart: bool) -> dict[str, Any]:
        sha256, size = str(wanted["oid"]), int(wanted["size"])
        answer: dict[str, Any] = {"oid": sha256, "size": size}
        if sha256 in repo.objects:
            return answer
        token = secrets.token_urlsafe(16)
        self._uploads[token] = _Upload(repo, sha256, size)
        options = self._state.options
        href = f"{self._state.storage_endpoint}/lfs/{sha256}"
        if multipart and size > options.multipart_threshold:
            header = {"chunk_size": str(options.part_size)}
            for number in range(1, math.ceil(size / options.part_size) + 1):
                header[str(number)] = f"{href}/{number}?upload={token}"
            completion = f"{self._state.endpoint}/api/complete_multipart?upload={token}"
            upload: dict[str, Any] = {"href": completion, "header": header}
        else:
            upload = {"href": f"{href}?upload={token}"}
        verify = f"{self._state.address(repo)}.git/info/lfs/objects/verify"
        answer["authenticated"] = True
        answer["actions"] = {"upload": upload, "verify": {"href": verify}}
        return answer

    async def _verify(self, request: Request) -> Response:
        repo = self._state.repo(request, write=True)
        body = await json_body(request)
        blob = repo.objects.get(body["oid"])
        if blob is None:
            raise Refused(404, f"object {body['oid']} was not uploaded")
        if len(blob.content) != body["size"]:
            raise Refused(400, f"object {body['oid']} has {len(blob.content)} bytes")
        return JSONResponse({"message": "ok"})

    async def _complete(self, request: Request) -> Response:
        body = await json_body(request)
        upload = self._upload(request)
        if body.get("oid") != upload.sha256:
            raise Refused(400, f"this upload is of object {upload.sha256}, not {body.get('oid')}")
        if upload.sha256 in upload.repo.objects:
            return JSONResponse({"message": "ok"})
        named = {int(part["partNumber"]): part["etag"] for part in body["parts"]}
        if named != {number: _etag(part) for number, part in upload.parts.items()}:
            raise Refused(400, "the parts named are not those that were uploaded")
        self._store(upload, b"".join(upload.parts[number] for number in sorted(upload.parts)))
        return JSONResponse({"message": "ok"})

    async def _put(self, request: Request) -> Response:
        upload = self._upload(request)
        self._store(upload, await request.body())
        return Response(headers={"ETag": f'"{upload.sha256}"'})

    async def _put_part(self, request: Request) -> Response:
        upload = self._upload(request)
        part = await request.body()
        upload.parts[request.path_params["part"]] = part
        return Response(headers={"ETag": _etag(part)})

    async def _get(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        if request.query_params.get("signature") != self._signature(sha256):
            raise Refused(403, "the address is not signed")
        blob = self._state.contents.find(sha256)
        if blob is None:
            raise Refused(404, f"there is no object {sha256}")
        return content_response(request, blob.content, {"ETag": f'"{sha256}"'})

    def _store(self, upload: _Upload, content: bytes) -> None:
        if len(content) != upload.size:
            raise Refused(400, f"object of {upload.size} bytes announced, {len(content)} came")
        found = hashlib.sha256(content).hexdigest()
        if found != upload.sha256:
            raise Refused(400, f"object {upload.sha256} announced, {found} came")
        upload.repo.objects[found] = self._state.contents.large(content)
        upload.parts.clear()

    def _upload(self, request: Request) -> _Upload:
        upload = self._uploads.get(request.query_params.get("upload", ""))
        if upload is None or request.path_params.get("sha256", upload.sha256) != upload.sha256:
            raise Refused(403, "the address does not allow an upload")
        return upload

    def _signature(self, sha256: str) -> str:
        return hmac.new(self._secret, sha256.encode(), "sha256").hexdigest()


def content_response(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """Content, or the one range of it that is asked for."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    media_type = "application/octet-stream"
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or match.groups() == ("", ""):
        return Response(content, headers=headers, media_type=media_type)
    size = len(content)
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        headers["Content-Range"] = f"bytes */{size}"
        return Response(status_code=416, headers=headers)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(content[start:stop], 206, headers=headers, media_type=media_type)


def _is_multipart(answer: dict[str, Any]) -> bool:
    return "header" in answer.get("actions", {}).get("upload", {})


def _etag(part: bytes) -> str:
    return f'"{hashlib.md5(part, usedforsecurity=False).hexdigest()}"'
