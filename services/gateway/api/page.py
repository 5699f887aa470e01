"""The page, and the API's documentation: files of packages, read once, that load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.api.problems import HttpError

router = APIRouter(include_in_schema=False)

INDEX, DOCS = "index.html", "docs.html"
SWAGGER_UI = frozenset({"swagger-ui-bundle.js", "swagger-ui.css"})  # as fastapi-offline brings it
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob:", "media-src 'self'",
    "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    "require-trusted-types-for 'script'", "trusted-types 'none'",
))  # fmt: skip
# Swagger UI sets styles on its elements, has icons in its style sheet, and makes markup of descriptions.
DOCS_POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self' 'unsafe-inline'", "img-src 'self' data:",
    "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
))  # fmt: skip
HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked for anew by its ETag: a new version shows at the next load
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class File:
    """One file of the page."""

    body: bytes
    media_type: str
    etag: str


@cache
def files() -> dict[str, File]:
    """The files of our own by name."""
    return _read(resources.files("gateway").joinpath("web"))


@cache
def swagger_ui() -> dict[str, File]:
    """Swagger UI's files by name."""
    found = _read(resources.files("fastapi_offline").joinpath("static"))
    return {name: file for name, file in found.items() if name in SWAGGER_UI}


def _read(folder: Traversable) -> dict[str, File]:
    found = {}
    for entry in folder.iterdir():
        media_type = TYPES.get(entry.name[entry.name.rfind(".") :])
        if media_type is not None:
            body = entry.read_bytes()
            found[entry.name] = File(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page itself."""
    return _answer(request, INDEX)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs(request: Request) -> Response:
    """The API's documentation."""
    return _answer(request, DOCS, DOCS_POLICY)


@router.api_route("/web/{name}", methods=["GET", "HEAD"])
async def part(request: Request, name: str) -> Response:
    """What the page is made of."""
    return _answer(request, name)


def _answer(request: Request, name: str, policy: str = POLICY) -> Response:
    file = files().get(name) or swagger_ui().get(name)
    if file is None:
        raise HttpError(404, "no_such_address", "there is nothing at this address: see /docs")
    headers = HEADERS | {"Content-Security-Policy": policy, "ETag": file.etag}
    given = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.etag in given:
        return Response(status_code=304, headers=headers)
    body = b"" if request.method == "HEAD" else file.body
    return Response(body, headers=headers | {"Content-Length": str(len(file.body))}, media_type=file.media_type)
