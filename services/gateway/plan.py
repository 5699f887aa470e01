"""From a request to work with every number decided: quality, sizes, seeds. Pure; an explicit field wins."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from vidgen import presets
from vidgen.contracts import MAX_SIDE, MIN_SIDE, EditParams, EditWork, I2VParams, I2VWork, Quality, Work

MEGAPIXEL = 1024 * 1024
EDIT_MULTIPLE = 32  # QwenImageEditPlusPipeline's own rounding of a megapixel


@dataclass(frozen=True)
class Effort:
    """Denoising steps and classifier-free guidance (1 is off)."""

    steps: int
    guidance: float


# draft needs the step-distilled LoRAs for its quality; the model cards' own numbers for the others.
EDIT_EFFORT: dict[Quality, Effort] = {"draft": Effort(4, 1.0), "standard": Effort(8, 4.0), "high": Effort(40, 4.0)}
I2V_EFFORT: dict[Quality, Effort] = {"draft": Effort(4, 1.0), "standard": Effort(8, 3.5), "high": Effort(40, 3.5)}


def seed_of(job_id: str) -> int:
    """The seed of a job that asked for none: the same however often its request is read."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:4])


def size_for(aspect: float, area: int = MEGAPIXEL) -> tuple[int, int]:
    """Width and height of about `area` pixels at `aspect`, in steps that the edit model takes."""

    def rounded(side: float) -> int:
        return max(MIN_SIDE, min(MAX_SIDE, round(side / EDIT_MULTIPLE) * EDIT_MULTIPLE))

    return rounded(math.sqrt(area * aspect)), rounded(math.sqrt(area / aspect))


def plan_edit(edit: EditParams, i2v: I2VParams | None, job_id: str, reference: tuple[int, int]) -> EditWork:
    """The edit of a job whose first reference has the size `reference`."""
    effort = EDIT_EFFORT[edit.quality]
    cheap = i2v is not None and edit.quality == "draft"  # more than the video shows is not made
    if edit.width is not None and edit.height is not None:
        width, height = edit.width, edit.height
    elif i2v is not None and cheap:
        width, height = i2v.width, i2v.height
    else:
        shape = (i2v.width, i2v.height) if i2v is not None else reference
        width, height = size_for(shape[0] / shape[1])
    return EditWork(
        prompt=presets.compose(edit),
        user_prompt=edit.prompt,
        negative_prompt=edit.negative_prompt,
        steps=edit.steps or effort.steps,
        true_cfg_scale=edit.true_cfg_scale if edit.true_cfg_scale is not None else effort.guidance,
        guidance_scale=edit.guidance_scale,
        seed=edit.seed if edit.seed is not None else seed_of(job_id),
        width=width,
        height=height,
        reference_area=width * height if cheap else None,
        candidates=edit.candidates,
        background=edit.background,
        style=edit.style,
        viewpoint=edit.viewpoint,
    )


def plan_i2v(i2v: I2VParams, job_id: str) -> I2VWork:
    """The animation of a job."""
    effort = I2V_EFFORT[i2v.quality]
    return I2VWork(
        prompt=i2v.prompt,
        negative_prompt=i2v.negative_prompt,
        steps=i2v.steps or effort.steps,
        guidance_scale=i2v.guidance_scale if i2v.guidance_scale is not None else effort.guidance,
        guidance_scale_2=i2v.guidance_scale_2,
        seed=i2v.seed if i2v.seed is not None else seed_of(job_id),
        num_frames=i2v.num_frames,
        fps=i2v.fps,
        width=i2v.width,
        height=i2v.height,
    )


def plan(edit: EditParams | None, i2v: I2VParams | None, job_id: str, reference: tuple[int, int]) -> tuple[Work, ...]:
    """The work of each stage, in order."""
    work: list[Work] = []
    if edit is not None:
        work.append(plan_edit(edit, i2v, job_id, reference))
    if i2v is not None:
        work.append(plan_i2v(i2v, job_id))
    return tuple(work)
