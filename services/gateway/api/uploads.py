"""Uploads: a presigned URL to which a client puts an image itself."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import uuid_utils
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from gateway.api import bodies, problems
from gateway.api.parts import CallerHere, PartsHere
from gateway.api.references import EXTENSIONS
from vidgen import artifacts

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


class UploadRequest(BaseModel):
    """What is going to be uploaded."""

    model_config = ConfigDict(extra="forbid")

    content_type: Literal["image/png", "image/jpeg", "image/webp", "image/avif"]
    size: int = Field(gt=0, description="The image's bytes: the URL is good for exactly as many.")


class Upload(BaseModel):
    """Where to put the image, with which headers; `key` is what a request then names in `references`."""

    key: str
    url: str
    method: Literal["PUT"] = "PUT"
    headers: dict[str, str]
    expires_at: datetime


@router.post(
    "", status_code=201, response_model=Upload, openapi_extra=bodies.documented(UploadRequest),
    responses=problems.responses(400, 413, 415, 422, 503),
)  # fmt: skip
async def prepare(request: Request, parts: PartsHere, caller: CallerHere) -> Upload:
    """Make a presigned URL for one image of this type and size. It is checked when a request refers to it."""
    wanted = await bodies.read_model(request, UploadRequest)
    if wanted.size > parts.settings.max_upload_bytes:
        raise artifacts.too_large(wanted.size, parts.settings.max_upload_bytes, "size")
    key = f"{artifacts.uploads_prefix(caller.tenant)}{uuid_utils.uuid7()}.{EXTENSIONS[wanted.content_type]}"
    expires_at = datetime.now(UTC) + parts.link_life
    url = await parts.store.upload_url(key, wanted.content_type, wanted.size, expires=parts.link_life)
    headers = artifacts.upload_headers(wanted.content_type, wanted.size)
    return Upload(key=key, url=url, headers=headers, expires_at=expires_at)
