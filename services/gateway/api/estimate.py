"""What a request would take, before it is sent; and what there is to choose from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Self, get_args

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway import plan
from gateway.api import bodies, problems
from gateway.api.parts import PartsHere
from vidgen import contracts, images, presets
from vidgen.contracts import EditParams, Estimate, I2VParams, Lane, Quality

router = APIRouter(prefix="/v1", tags=["planning"])

Pixels = Annotated[int, Field(ge=1, le=images.MAX_PIXELS)]


class EstimateRequest(BaseModel):
    """A VideoRequest without what an estimate does not depend on."""

    model_config = ConfigDict(extra="forbid")

    edit: EditParams | None = None
    i2v: I2VParams | None = None
    lane: Lane = "interactive"
    reference_width: Pixels = Field(1024, description="Of the first reference: an edit alone takes on its shape.")
    reference_height: Pixels = 1024

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.edit is None and self.i2v is None:
            raise ValueError("give at least one of edit and i2v")
        return self


class Effort(BaseModel):
    """What a quality stands for: steps, and classifier-free guidance (1 is off)."""

    steps: int
    guidance: float


class Limits(BaseModel):
    """What a reference image may be."""

    max_references: int = contracts.MAX_REFERENCES
    max_image_bytes: int
    max_image_pixels: int = images.MAX_PIXELS
    min_image_side: int = images.MIN_IMAGE_SIDE
    max_image_aspect: int = images.MAX_ASPECT
    image_types: tuple[str, ...] = images.MEDIA_TYPES


class Options(BaseModel):
    """What a request may choose from; each preset with the sentence that it adds to the prompt."""

    backgrounds: dict[contracts.Background, str] = presets.BACKGROUNDS
    styles: dict[contracts.Style, str] = presets.STYLES
    viewpoints: dict[contracts.Viewpoint, str] = presets.VIEWPOINTS
    qualities: dict[Quality, dict[contracts.Stage, Effort]]
    limits: Limits


@router.post(
    "/estimate", response_model=Estimate, response_model_exclude_none=False,
    openapi_extra=bodies.documented(EstimateRequest), responses=problems.responses(400, 413, 415, 422, 503),
)  # fmt: skip
async def estimate(request: Request, parts: PartsHere) -> Estimate:
    """Say what a request would take if it came now, from what recent jobs took and how full the queues are."""
    wanted = await bodies.read_model(request, EstimateRequest)
    work = plan.plan(wanted.edit, wanted.i2v, "estimate", (wanted.reference_width, wanted.reference_height))
    return await parts.forecast.estimate(work, wanted.lane)


@router.get("/options", responses=problems.responses())
async def options(parts: PartsHere) -> Options:
    """What a request may choose from: presets, qualities, and the limits of a reference image."""
    efforts: dict[Quality, dict[contracts.Stage, Effort]] = {
        quality: {
            "edit": Effort(**asdict(plan.EDIT_EFFORT[quality])),
            "i2v": Effort(**asdict(plan.I2V_EFFORT[quality])),
        }
        for quality in get_args(Quality)
    }
    return Options(qualities=efforts, limits=Limits(max_image_bytes=parts.settings.max_upload_bytes))
