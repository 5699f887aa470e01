"""`vidgen run`: one image to one video, through a gateway, or through an embedded stack for the one job."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vidgen.cli import options, output
from vidgen.cli.options import Wish, wrong
from vidgen.cli.output import Output

if TYPE_CHECKING:
    from vidgen.cli.progress import View
    from vidgen.client import AsyncClient
    from vidgen.contracts import Artifact, FieldError, Job, Stage, VideoRequest
    from vidgen.local import Stack

T = TypeVar("T")

FRAME, VIDEO = "edit-0.png", "video.mp4"
CANCEL_WITHIN_S = 5.0
PREVIEW_NOTE = """\
The CPU preview engines made this: they need no model and follow the prompt only roughly, to show the whole way.
For the real ones (Qwen-Image-Edit and Wan) on a machine with an NVIDIA GPU:
  {install}
and the weights; `vidgen doctor` says what is missing and how to get it."""


def run(
    images: options.Images,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="OUT", help="The video (.mp4), or the edited image (.png).")
    ],
    edit: options.Edit = None,
    motion: options.Motion = None,
    frame: Annotated[Path | None, typer.Option(metavar="OUT.png", help="Keep the edited frame, too.")] = None,
    seed: options.Seed = None,
    quality: options.Quality = None,
    size: options.Size = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    style: options.Style = None,
    background: options.Background = None,
    viewpoint: options.Viewpoint = None,
    gateway: options.Gateway = None,
    as_json: options.Json = False,
) -> None:
    """Turn an image into a video: edit it, then animate it; or only one of the two."""
    with output.speaking(as_json) as out_put:
        wish = Wish(images, edit, motion, seed, quality, size, frames, fps, style, background, viewpoint)
        request = _checked(wish, out, frame)
        wanted = {VIDEO: out} if motion is not None else {FRAME: out}
        if frame is not None:
            wanted[FRAME] = frame
        url = options.gateway_url(gateway) if gateway else None
        output.run_async(lambda: _run(out_put, request, images, wanted, url))


def _checked(wish: Wish, out: Path, frame: Path | None) -> VideoRequest:
    """The request, and places where the results can be written; raises WrongUsageError that names all that is wrong."""
    found = list(_wrong_places(wish, out, frame))
    return options.request_of(wish, found)


def _wrong_places(wish: Wish, out: Path, frame: Path | None) -> Any:
    if wish.edit is not None or wish.motion is not None:
        suffix, what = (".mp4", "a video") if wish.motion is not None else (".png", "an edited image")
        if out.suffix.lower() != suffix:
            yield wrong("-o", f"{what} is written as {suffix}, not {out.suffix or 'without a suffix'}")
    if frame is not None and (wish.edit is None or wish.motion is None):
        yield wrong("--frame", "it keeps the edited frame beside the video: it needs --edit and --motion")
    elif frame is not None and frame.suffix.lower() != ".png":
        yield wrong("--frame", f"the frame is written as .png, not {frame.suffix or 'without a suffix'}")
    for name, path in (("-o", out), ("--frame", frame)):
        if path is None:
            continue
        if path.is_dir():
            yield wrong(name, f"{path} is a folder: name a file")
            continue
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            yield wrong(name, f"{path} would lie in something that is no folder")
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield wrong(name, f"{folder} cannot be written to: choose another folder")


async def _run(
    out_put: Output, request: VideoRequest, images: list[Path], wanted: dict[str, Path], gateway: str | None
) -> None:
    from vidgen.cli.progress import stages_of, view_for
    from vidgen.client import AsyncClient

    key = options.api_key()
    with view_for(out_put) as view:
        async with (
            _gateway(gateway, view, stages_of(request)) as (url, stack),
            AsyncClient(url, api_key=key) as client,
        ):
            job = await client.submit(request, images=images)
            unwritten: dict[str, FieldError] = {}
            with _named(job.id, gateway):
                following = _followed(client, job.id, stages_of(request), view, out_put if gateway else None)
                job = await _unless_lost(stack, following)
                if job.status == "completed":
                    unwritten = await _fetched(client, job.id, wanted, gateway)
                elif stack is not None:
                    _show_log(out_put, stack, job)
    _report(out_put, job, {name: wanted[name] for name in wanted if name not in unwritten}, retryable=bool(gateway))
    if unwritten:
        told = "; ".join(f"{error.field}: {error.message}" for error in unwritten.values())
        out_put.fail("local_file", told, errors=tuple(unwritten.values()))


@contextlib.contextmanager
def _named(job_id: str, gateway: str | None) -> Iterator[None]:
    """Name the job where its gateway, or what comes of it, is out of reach: it is there still, and may go on."""
    from vidgen.client import GatewayError

    try:
        yield
    except GatewayError as exc:
        if gateway is None:
            raise
        detail = f"{exc.message} (job {job_id} is there still: `vidgen watch {job_id}` follows it)"
        raise GatewayError(exc.problem.model_copy(update={"detail": detail})) from exc


async def _fetched(
    client: AsyncClient, job_id: str, wanted: dict[str, Path], gateway: str | None
) -> dict[str, FieldError]:
    """Fetch what is wanted; of what could not be written: why, and where it is. An embedded stack keeps nothing."""
    unwritten = {}
    for name, path in wanted.items():
        try:
            await client.download(job_id, name, path)
        except OSError as exc:
            option = "--frame" if name == FRAME and VIDEO in wanted else "-o"
            where = _fetched_by(gateway, job_id, name) if gateway else await _kept(client, job_id, name)
            unwritten[name] = wrong(option, f"{path}: {exc.strerror or exc}; job {job_id} is done: {where}")
    return unwritten


def _fetched_by(gateway: str, job_id: str, name: str) -> str:
    key = '-H "Authorization: Bearer $VIDGEN_API_KEY" ' if options.API_KEY.get() else ""
    url = shlex.quote(f"{gateway.rstrip('/')}/v1/jobs/{job_id}/artifacts/{name}")
    return f"fetch its {name} with `curl -L {key}-o FILE {url}`"


async def _kept(client: AsyncClient, job_id: str, name: str) -> str:
    folder = tempfile.gettempdir()
    try:
        folder = tempfile.mkdtemp(prefix="vidgen-result-")
        return f"its {name} is kept in {await client.download(job_id, name, Path(folder, name))}"
    except OSError as exc:
        return f"its {name} is lost, for it cannot be kept in {folder} either ({exc.strerror or exc})"


def _show_log(out_put: Output, stack: Stack, job: Job) -> None:
    """The end of the failed service's log: it is gone with the embedded stack."""
    stage = job.error.stage if job.error is not None else None
    for service in stack.services:
        if stage is not None and service.name in (f"{stage}-service", "worker"):
            out_put.note(f"The end of the log of {service.name}:\n{service.process.tail()}\n")


@contextlib.asynccontextmanager
async def _gateway(url: str | None, view: View, stages: Sequence[Stage]) -> AsyncIterator[tuple[str, Stack | None]]:
    if url:
        yield url, None
        return
    from vidgen.local import Stack

    parts = ["nats-server", "the S3 server", "gateway", *(f"{stage}-service" for stage in stages)]
    view.status(f"Starting {', '.join(parts[:-1])} and {parts[-1]} …")
    with tempfile.TemporaryDirectory(prefix="vidgen-", ignore_cleanup_errors=True) as folder:
        stack = Stack(Path(folder), stages=stages, ephemeral=True)
        await stack.start(wait_for_workers=False)
        try:
            yield stack.gateway_url, stack
        finally:
            await stack.stop()


async def _followed(
    client: AsyncClient, job_id: str, stages: Sequence[Stage], view: View, out_put: Output | None = None
) -> Job:
    """Watch a job to its end; if that is interrupted, or nobody reads of it any more, cancel it.

    Where that cannot be, and the gateway stays, `out_put` says so.
    """
    from vidgen.client import GatewayError
    from vidgen.contracts import Job

    try:
        view.begin(stages)
        async with contextlib.aclosing(client.watch(job_id)) as updates:
            async for update in updates:
                view.show(update)
                if isinstance(update, Job):
                    return update
    except (asyncio.CancelledError, OSError):  # of what it says; what the gateway says is none
        try:
            async with asyncio.timeout(CANCEL_WITHIN_S):
                await client.cancel(job_id)
        except (GatewayError, TimeoutError):
            if out_put is not None:
                _say_uncancelled(out_put, job_id)
        raise
    raise AssertionError("watch ends with a job")


def _say_uncancelled(out_put: Output, job_id: str) -> None:
    message = f"job {job_id} could not be cancelled, and may go on: `vidgen cancel {job_id}` does it later"
    with contextlib.suppress(OSError):  # perhaps nobody listens any more
        out_put.note(f"vidgen: {message}")
        out_put.emit("note", {"job_id": job_id, "message": message})


async def _unless_lost(stack: Stack | None, action: Coroutine[Any, Any, T]) -> T:
    """The result of `action`; raises LocalError as soon as a process of the embedded stack is lost."""
    if stack is None:
        return await action
    doing, losing = asyncio.create_task(action), asyncio.create_task(stack.lost())
    try:
        await asyncio.wait((doing, losing), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise losing.result()
    finally:
        for task in (doing, losing):
            task.cancel()
        await asyncio.gather(doing, losing, return_exceptions=True)


def _report(out_put: Output, job: Job, wanted: dict[str, Path], *, retryable: bool) -> None:
    if job.status != "completed":
        report_failure(out_put, job, retryable=retryable)
    for name, path in wanted.items():
        artifact = next((one for one in job.artifacts if one.name == name), None)
        out_put.emit("file", {"name": name, "path": str(path)})
        out_put.say(f"{'video' if name == VIDEO else 'frame'}  {path}  {_measures(artifact)}".rstrip())
    seeds = sorted({record.seed for record in job.stages if record.seed is not None})
    if seeds:
        out_put.say(f"seed   {', '.join(map(str, seeds))}")
    if any(record.engine == "preview" for record in job.stages):
        from vidgen import extras

        note = PREVIEW_NOTE.format(install=extras.install("gpu"))
        out_put.emit("note", {"engine": "preview", "message": note})
        out_put.say(f"\n{note}")


def _measures(artifact: Artifact | None) -> str:
    if artifact is None:
        return ""
    found = [f"{artifact.width}x{artifact.height}"] if artifact.width else []
    if artifact.frames and artifact.fps:
        found.append(f"{artifact.frames} frames at {artifact.fps} fps, {artifact.frames / artifact.fps:.1f} s")
    return ", ".join([*found, f"{artifact.size / 1e6:.1f} MB"])


def report_failure(out_put: Output, job: Job, *, retryable: bool = True) -> None:
    """Say how a job ended that did not complete, and end with exit code 1; `retryable` where its gateway stays."""
    error = job.error
    if error is None:
        out_put.fail(str(job.status), f"job {job.id} is {job.status}")
    where = f" in {error.stage}" if error.stage else ""
    again = f"; try it again with: vidgen retry {job.id}" if error.retryable and retryable else ""
    out_put.fail(error.code, f"job {job.id} {job.status}{where}: {error.message}{again}", errors=error.fields)
