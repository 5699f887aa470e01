"""Errors as RFC 9457 problem documents: what is wrong, where, and what to do; never a value, never internals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from gateway.intake import InvalidRequestError
from gateway.jobs import JobNotFoundError
from gateway.keyring import UnknownKeyError
from gateway.quotas import LimitError
from vidgen import errors
from vidgen.contracts import FieldError

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_FULL_S = 5
RETRY_AFTER_LOST_S = 2

MEANINGS: dict[int, str] = {
    400: "The body cannot be read: not JSON, not UTF-8, or not a form.",
    401: "No key, or one that opens nothing; see `WWW-Authenticate`.",
    403: "The key is not the operator's, or a page elsewhere sent the request.",
    404: "There is no such thing.",
    405: "This address does not know that method.",
    409: "The state of the job does not allow that.",
    413: "The body is too large; it was not read to its end.",
    415: "The body has a content type that is not taken here.",
    416: "The range lies outside the file.",
    422: "The request does not validate; `errors` names every wrong field.",
    429: "More than the tenant may ask for; try again after `Retry-After`.",
    500: "Something went wrong inside the gateway.",
    503: "The bus or the object store is full or out of reach; try again after `Retry-After`.",
}


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    type: str = Field(description="`urn:vidgen:problem:<code>`.")
    title: str
    status: int
    detail: str = Field(description="What happened and what to do about it.")
    code: str = Field(description="Stable and machine-readable.")
    errors: tuple[FieldError, ...] | None = Field(None, description="Every wrong field, where fields are wrong.")


class HttpError(errors.VidgenError):
    """Something that only HTTP knows went wrong."""

    def __init__(
        self, status: int, code: str, message: str, *, fields: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message, code=code)
        self.status, self.fields, self.headers = status, tuple(fields), dict(headers or {})


def document(
    status: int, code: str, detail: str, fields: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None
) -> Response:
    """A problem document as a response."""
    problem = Problem(
        type=f"urn:vidgen:problem:{code}", title=HTTPStatus(status).phrase, status=status, detail=detail, code=code,
        errors=tuple(fields) or None,
    )  # fmt: skip
    return Response(problem.model_dump_json(exclude_none=True), status, dict(headers or {}), MEDIA_TYPE)


def of(exc: errors.VidgenError) -> Response:
    """The problem document of one of our own errors."""
    match exc:
        case HttpError():
            return document(exc.status, exc.code, exc.message, exc.fields, exc.headers)
        case InvalidRequestError():
            return document(422, exc.code, exc.message, exc.errors)
        case UnknownKeyError():
            return document(401, exc.code, exc.message, headers={"WWW-Authenticate": 'Bearer realm="vidgen"'})
        case LimitError():
            return document(429, exc.code, exc.message, headers={"Retry-After": str(exc.retry_after_s)})
        case JobNotFoundError():
            return document(404, exc.code, exc.message)
        case errors.RejectedError():
            fields = [FieldError(field=exc.field, message=exc.message)] if exc.field else []
            return document(413 if exc.code == "too_large" else 422, exc.code, exc.message, fields)
        case errors.ConflictError():
            return document(409, exc.code, exc.message)
        case errors.RetryableError():
            wait = RETRY_AFTER_FULL_S if isinstance(exc, errors.QueueFullError) else RETRY_AFTER_LOST_S
            return document(503, exc.code, exc.message, headers={"Retry-After": str(wait)})
    return internal(exc)


def internal(exc: BaseException) -> Response:
    """The problem document of what nobody foresaw: it goes to the log, not to the client."""
    log.error("a request failed", _event="request_failed", exc_info=exc)
    return document(500, "internal", "something went wrong inside the gateway: its log says what")


def install(app: FastAPI) -> None:
    """Make every error of the app a problem document."""
    app.add_exception_handler(errors.VidgenError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's documentation says of its errors."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": MEANINGS[status], "content": {MEDIA_TYPE: schema}}
        for status in sorted({*statuses, 500})
    }


async def _on_error(_request: Request, exc: Exception) -> Response:
    return of(exc) if isinstance(exc, errors.VidgenError) else internal(exc)


async def _on_invalid(_request: Request, exc: Exception) -> Response:
    found = exc.errors() if isinstance(exc, RequestValidationError) else []
    # The first part of a place says "query", "path" or "header".
    fields = [
        FieldError(field=".".join(map(str, error["loc"][1:])) or "request", message=error["msg"]) for error in found
    ]
    return document(422, "invalid_request", "; ".join(f"{e.field}: {e.message}" for e in fields), fields)


async def _on_http(request: Request, exc: Exception) -> Response:
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    headers = exc.headers if isinstance(exc, HTTPException) else None
    match status:
        case 404:
            return document(404, "no_such_address", "there is nothing at this address: see /docs", headers=headers)
        case 405:
            allowed = ", ".join(_methods_at(request))
            return document(405, "method_not_allowed", f"use {allowed} at this address", headers={"Allow": allowed})
    return document(status, "http_error", MEANINGS.get(status, HTTPStatus(status).description), headers=headers)


def _methods_at(request: Request) -> list[str]:
    """All that an address knows: the exception names those of the first route there alone."""
    found = (route for route in request.app.state.routes if route.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in found for method in getattr(route, "methods", None) or ()})
