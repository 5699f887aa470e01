"""JSON bodies: their type, their encoding, their shape; each fault has its own answer."""

from __future__ import annotations

from typing import Any, TypeVar

import pydantic
import pydantic_core
from fastapi import Request

from gateway.api.problems import HttpError
from gateway.intake import InvalidRequestError
from vidgen import contracts

JSON = "application/json"
FORM = "multipart/form-data"

M = TypeVar("M", bound=pydantic.BaseModel)


def media_type(request: Request, *allowed: str) -> str:
    """The body's media type, one of `allowed`; raises HttpError 415."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in allowed:
        wanted = " or ".join(allowed)
        raise HttpError(
            415, "unsupported_media_type", f"send the body as {wanted}, and say so in Content-Type",
            headers={"Accept": ", ".join(allowed)},
        )  # fmt: skip
    return given


def check_json(body: bytes, what: str = "the body") -> Any:
    """The value that JSON bytes stand for; raises HttpError 400."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise HttpError(400, "invalid_utf8", f"{what} is not UTF-8: encode the JSON as UTF-8") from None
    try:
        return pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError:
        raise HttpError(400, "not_json", f"{what} is not JSON: send one JSON object, see /docs") from None


async def read_json(request: Request) -> bytes:
    """The body, known to be JSON; raises HttpError 400 and 415."""
    media_type(request, JSON)
    body = await request.body()
    check_json(body)
    return body


async def read_model(request: Request, model: type[M], default: M | None = None) -> M:
    """The body as a model, or the `default` where it may be left out; raises HttpError and InvalidRequestError."""
    if default is not None and not await request.body():
        return default
    body = await read_json(request)
    try:
        return model.model_validate_json(body)
    except pydantic.ValidationError as exc:
        raise InvalidRequestError(contracts.field_errors(exc)) from None


def documented(model: type[pydantic.BaseModel], *, required: bool = True) -> dict[str, Any]:
    """What the documentation says of a route whose body is a small model."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # the contracts within: the job record brings them along
    return {"requestBody": {"required": required, "content": {JSON: {"schema": schema}}}}
