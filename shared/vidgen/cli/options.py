"""The options that several commands share, and the request that they make."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli.output import WrongUsageError

if TYPE_CHECKING:
    from vidgen.contracts import FieldError, VideoRequest

Images = Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="The reference image; up to 3 for an edit.")]
Edit = Annotated[str | None, typer.Option("--edit", metavar="PROMPT", help="What to change in the image.")]
Motion = Annotated[str | None, typer.Option("--motion", metavar="PROMPT", help="How the frame is to move.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same result; chosen from the job id without.")]
Quality = Annotated[str | None, typer.Option(metavar="draft|standard|high", help="4, 8 or 40 steps. [standard]")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="The size of the video, or of an edit alone. [832x480]")]
Frames = Annotated[int | None, typer.Option(metavar="N", help="Frames of the video, 4k+1. [81]")]
Fps = Annotated[int | None, typer.Option(metavar="N", help="Frames a second. [16]")]
Style = Annotated[str | None, typer.Option(metavar="NAME", help="A preset style: cinematic, film-noir, sepia, …")]
Background = Annotated[str | None, typer.Option(metavar="NAME", help="A preset background: studio, beach, city, …")]
Viewpoint = Annotated[str | None, typer.Option(metavar="NAME", help="A preset viewpoint: front, left, above, …")]
Gateway = Annotated[
    str | None, typer.Option(envvar="VIDGEN_GATEWAY_URL", metavar="URL", help="The gateway to talk to.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]

API_KEY: ContextVar[str | None] = ContextVar("api_key", default=None)  # given before the command, for all of them

OPTION_OF = {
    "references": "IMAGE", "edit.prompt": "--edit", "i2v.prompt": "--motion",
    "edit.seed": "--seed", "i2v.seed": "--seed",
    "edit.quality": "--quality", "i2v.quality": "--quality", "edit.width": "--size", "edit.height": "--size",
    "i2v.width": "--size", "i2v.height": "--size", "edit": "--size", "i2v": "--size", "i2v.num_frames": "--frames",
    "i2v.fps": "--fps", "edit.style": "--style", "edit.background": "--background", "edit.viewpoint": "--viewpoint",
    "edit.candidates": "--candidates", "job_id": "--job-id", "lane": "--lane", "deadline_s": "--deadline",
    "labels": "--label", "webhook_url": "--webhook", "image": "IMAGE", "candidate": "CANDIDATE", "seq": "NUMBER",
    "review": "--review", "cursor": "--cursor", "limit": "--limit", "status": "--status", "tenant": "--tenant",
}  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """What the command line asks for, as it was typed."""

    images: Sequence[Path]
    edit: str | None = None
    motion: str | None = None
    seed: int | None = None
    quality: str | None = None
    size: str | None = None
    frames: int | None = None
    fps: int | None = None
    style: str | None = None
    background: str | None = None
    viewpoint: str | None = None
    candidates: int | None = None
    rest: dict[str, Any] | None = None


def wrong(field: str, message: str) -> FieldError:
    from vidgen.contracts import FieldError

    return FieldError(field=field, message=message)


def gateway_url(given: str) -> str:
    """The gateway's address; raises WrongUsageError where it is none."""
    from vidgen.client import NO_ADDRESS, is_address

    if not is_address(given):
        raise WrongUsageError([wrong("--gateway", NO_ADDRESS)])
    return given


def api_key() -> str | None:
    """The key that was given; raises WrongUsageError where it can be none."""
    from vidgen.client import NOT_A_KEY, is_key

    given = API_KEY.get()
    if given is not None and not is_key(given.strip()):  # a shell may have left a line end on it
        raise WrongUsageError([wrong("--api-key", NOT_A_KEY)])
    return given


def request_of(wish: Wish, also: Sequence[FieldError] = ()) -> VideoRequest:
    """The request, with placeholders for the images' keys; raises WrongUsageError that names every wrong field.

    `also` is what was found wrong beside it.

    The contracts themselves decide what is right, so the gateway will say the same.
    """
    from pydantic import ValidationError

    from vidgen.contracts import VideoRequest, field_errors

    found = [*_misplaced(wish), *_wrong_images(wish.images)]
    common = _given(seed=wish.seed, quality=wish.quality)
    size = _size_of(wish.size, found)
    sent: dict[str, Any] = {"references": [f"uploads/image-{n}" for n in range(len(wish.images))], **(wish.rest or {})}
    if wish.edit is not None:
        presets = _given(style=wish.style, background=wish.background, viewpoint=wish.viewpoint)
        own_size = size if wish.motion is None else {}  # beside a motion, the edit follows the video's shape
        sent["edit"] = {"prompt": wish.edit, **common, **presets, **own_size, **_given(candidates=wish.candidates)}
    if wish.motion is not None:
        sent["i2v"] = {"prompt": wish.motion, **common, **size, **_given(num_frames=wish.frames, fps=wish.fps)}
    try:
        request = VideoRequest.model_validate_json(_to_json(sent))
    except ValidationError as exc:
        found += (_named(error) for error in field_errors(exc))
    if found or also:
        raise WrongUsageError([*_once(found), *also])
    return request


def _misplaced(wish: Wish) -> list[FieldError]:
    """Options that belong to a part that was not asked for."""
    found: list[FieldError] = []
    if (wish.rest or {}).get("review") and (wish.edit is None) != (wish.motion is None):
        found.append(wrong("--review", "it stands between an edit and its video: add --edit and --motion"))
    if wish.motion is None:
        given = _given(frames=wish.frames, fps=wish.fps)
        found += (wrong(f"--{name}", "it is about a video: add --motion") for name in given)
    if wish.edit is None:
        given = _given(
            style=wish.style, background=wish.background, viewpoint=wish.viewpoint, candidates=wish.candidates
        )
        found += (wrong(f"--{name}", "it is about an edit: add --edit") for name in given)
    return found


def _wrong_images(images: Sequence[Path]) -> list[FieldError]:
    from vidgen import errors
    from vidgen.images import inspect

    found = []
    for path in images:
        if not path.is_file():
            kind = "it is a folder: name a file" if path.is_dir() else "it is no file, but a pipe or a device"
            found.append(wrong(f"IMAGE {path}", kind if path.exists() else "there is no such file"))
            continue
        try:
            inspect(path)
        except errors.RejectedError as exc:
            found.append(wrong(f"IMAGE {path}", exc.message))
        except OSError as exc:
            found.append(wrong(f"IMAGE {path}", f"it cannot be read: {exc.strerror}"))
    return found


def _size_of(size: str | None, found: list[FieldError]) -> dict[str, int]:
    if size is None:
        return {}
    match = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", size)
    if match is None:
        found.append(wrong("--size", f"{size!r} is no size: write width x height in pixels, such as 832x480"))
        return {}
    return {"width": int(match[1]), "height": int(match[2])}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _to_json(sent: dict[str, Any]) -> bytes:
    import json

    return json.dumps(sent, ensure_ascii=False).encode()


def by_option(error: FieldError) -> FieldError:
    """The same error under the name of the option, with the field's own name behind it."""
    option = OPTION_OF.get(error.field) or OPTION_OF.get(error.field.split(".")[0])
    return wrong(f"{option} ({error.field})" if option else error.field, error.message)


def _named(error: FieldError) -> FieldError:
    """The same of what the contracts say of a request, in words for who types."""
    if error.field == "request":
        if "exactly one image" in error.message:
            return wrong("IMAGE (request)", "a video without an edit starts from exactly one image")
        return wrong("--edit or --motion (request)", "say what to do: --edit PROMPT, --motion PROMPT, or both")
    at_most = error.field == "references" and "at most" in error.message
    return by_option(wrong(error.field, "at most 3 images") if at_most else error)


def _once(found: Sequence[FieldError]) -> list[FieldError]:
    """Seed, quality and size go to both parts: what is wrong with them is said once."""
    seen: dict[tuple[str, str], FieldError] = {}
    for error in found:
        seen.setdefault((error.field.split(" (")[0], error.message), error)
    return list(seen.values())
