"""Artifacts: by a presigned URL, or through the gateway where the store cannot be reached by the client."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, cast
from urllib.parse import quote

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.types import Send

from gateway.api import problems
from gateway.api.parts import JobHere, Parts, PartsHere
from gateway.api.problems import HttpError
from gateway.api.references import EXTENSIONS
from vidgen import errors
from vidgen.artifacts import Shown, is_under, job_prefix
from vidgen.contracts import Artifact, Job

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["artifacts"])

RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
SHOWN_INLINE = {*EXTENSIONS, "video/mp4"}  # not whatever is called an image: an SVG is a program
DESCRIPTIONS: dict[int | str, dict[str, object]] = {
    200: {
        "description": "The file, with `proxy=1`.",
        "content": {kind: {} for kind in (*EXTENSIONS, "video/mp4", "application/octet-stream")},
    },
    206: {"description": "A part of the file, with `proxy=1` and `Range`."},
    304: {"description": "The file that `If-None-Match` names."},
    307: {"description": "The presigned URL of the file."},
}


@dataclass(frozen=True)
class Span:
    """A part of a file, in bytes."""

    start: int
    length: int


class FileStream(StreamingResponse):
    """A file whose first chunk is there already; lets go of the store when it ends, however it ends."""

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], status: int, headers: dict[str, str], media_type: str
    ) -> None:
        super().__init__(rest, status, headers, media_type)
        self._first, self._rest = first, rest

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for chunk in self._rest:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass(frozen=True)
class Wish:
    """How a client wants a file."""

    proxy: Annotated[bool, Query(description="Send the file itself instead of a redirect.")] = False
    range: Annotated[str | None, Header()] = None
    if_range: Annotated[str | None, Header()] = None
    if_none_match: Annotated[str | None, Header()] = None


WishHere = Annotated[Wish, Depends()]
GET_FILE: dict[str, Any] = {
    "response_class": Response, "status_code": 307, "responses": DESCRIPTIONS | problems.responses(404, 416, 422, 503),
}  # fmt: skip


@router.head("/artifacts/{name}", include_in_schema=False)
@router.get("/artifacts/{name}", **GET_FILE)
async def download(request: Request, job: JobHere, name: str, parts: PartsHere, wish: WishHere) -> Response:
    """Get a file that a job made. HEAD tells size, type and checksum."""
    artifact = _named(job, name)
    if artifact is None and not job.status.final:
        artifact = _named(job := await parts.jobs.as_told(job.id), name)
    if artifact is None:
        names = ", ".join(one.name for one in job.artifacts) or "none yet"
        raise HttpError(404, "artifact_not_found", f"the job has no artifact of this name; it has: {names}")
    if not is_under(artifact.key, job_prefix(job.id)):  # a worker said so, and it may not
        raise HttpError(404, "artifact_not_found", "the artifact is said to be with another job's: it is not shown")
    return await _send(request, artifact, parts, wish)


def _named(job: Job, name: str) -> Artifact | None:
    return next((one for one in job.artifacts if one.name == name), None)


@router.head("/references/{index}", include_in_schema=False)
@router.get("/references/{index}", **GET_FILE)
async def reference(
    request: Request, job: JobHere, index: Annotated[int, Path(ge=0)], parts: PartsHere, wish: WishHere
) -> Response:
    """Get a reference image of a job, counted from 0, as its engines read it."""
    if index >= len(job.inputs):
        raise HttpError(404, "artifact_not_found", f"the job has {len(job.inputs)} references, counted from 0")
    key = job.inputs[index]
    found = await parts.store.stat(key)
    if found is None:
        raise HttpError(404, "artifact_gone", "the reference is no longer in the object store: its time there is over")
    # A client may have put it there, so its checksum is not known: what is known of it stands for it.
    mark = hashlib.sha256(f"{key}:{found.size}:{found.modified}".encode()).hexdigest()
    name = key.rsplit("/", 1)[-1]
    kind = found.content_type if found.content_type in EXTENSIONS else "application/octet-stream"
    return await _send(
        request, Artifact(name=name, key=key, content_type=kind, size=found.size, sha256=mark), parts, wish
    )


async def _send(request: Request, artifact: Artifact, parts: Parts, wish: Wish) -> Response:
    head = request.method == "HEAD"
    if not wish.proxy and not head:
        # `nosniff` cannot be had from S3: the type and what to do with it are in the signature instead.
        shown = Shown(artifact.content_type, _disposition(artifact))
        url = await parts.store.url(artifact.key, expires=parts.link_life, shown=shown)
        return RedirectResponse(url, 307, headers={"Cache-Control": "no-store"})
    headers = _headers(artifact)
    if _names(wish.if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    span = None
    if wish.range is not None and wish.if_range in (None, headers["ETag"]):
        span = span_of(wish.range, artifact.size)
    if span is not None:
        headers["Content-Range"] = f"bytes {span.start}-{span.start + span.length - 1}/{artifact.size}"
    headers["Content-Length"] = str(span.length if span else artifact.size)
    status = 206 if span else 200
    if head:
        return Response(status_code=status, headers=headers, media_type=artifact.content_type)
    chunks = parts.store.read(artifact.key, span.start, span.length) if span else parts.store.read(artifact.key)
    rest = cast("AsyncGenerator[bytes, None]", chunks)
    return FileStream(await _first_of(rest, artifact), rest, status, headers, artifact.content_type)


def span_of(wanted: str, size: int) -> Span | None:
    """The part that a Range header asks for; None where it is to be passed over, HttpError 416 where there is none."""
    match = RANGE.fullmatch(wanted.replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return None  # several ranges, or another unit: RFC 9110 lets us send the whole
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last), size - 1) if first and last else size - 1
    if first and last and int(last) < start:
        return None  # not a range at all
    if start > end:
        raise HttpError(
            416, "range_outside", f"the file has {size:,} bytes: ask for a part of them",
            headers={"Content-Range": f"bytes */{size}"},
        )  # fmt: skip
    return Span(start, end - start + 1)


async def _first_of(chunks: AsyncIterator[bytes], artifact: Artifact) -> bytes:
    # Read before the status is sent, so that what is gone is a 404 and what is down a 503.
    try:
        return await anext(chunks, b"")
    except errors.NotFoundError:
        raise HttpError(
            404, "artifact_gone", f"{artifact.name} is no longer in the object store: its time there is over"
        ) from None


def _headers(artifact: Artifact) -> dict[str, str]:
    return {
        "ETag": f'"{artifact.sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": _disposition(artifact),
    }


def _disposition(artifact: Artifact) -> str:
    kind = "inline" if artifact.content_type in SHOWN_INLINE else "attachment"
    return f"{kind}; filename*=UTF-8''{quote(artifact.name, safe='')}"


def _names(if_none_match: str | None, etag: str) -> bool:
    given = [one.strip().removeprefix("W/") for one in (if_none_match or "").split(",")]
    return etag in given or given == ["*"]
