"""The commands about jobs and workers, against a gateway."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli import options, output
from vidgen.cli.options import Wish, wrong
from vidgen.cli.output import Output, WrongUsageError

if TYPE_CHECKING:
    from vidgen.client import AsyncClient
    from vidgen.contracts import FieldError, Job

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


@contextlib.asynccontextmanager
async def client_of(gateway: str | None) -> AsyncIterator[AsyncClient]:
    """A client of the gateway that was named; WrongUsageError if none was."""
    from vidgen.client import AsyncClient

    if not gateway:
        remedy = (
            "none is configured: give --gateway URL or set VIDGEN_GATEWAY_URL (`vidgen up` starts one and prints it)"
        )
        raise WrongUsageError([wrong("--gateway", remedy)])
    async with AsyncClient(options.gateway_url(gateway), api_key=options.api_key()) as client:
        yield client


def ask(gateway: str | None, as_json: bool, act: Callable[[Output, AsyncClient], Awaitable[None]]) -> None:
    """Run one command against the gateway."""

    async def acting(out_put: Output) -> None:
        async with client_of(gateway) as client:
            await act(out_put, client)

    with output.speaking(as_json) as out_put:
        output.run_async(lambda: acting(out_put))


def submit(
    images: options.Images,
    edit: options.Edit = None,
    motion: options.Motion = None,
    seed: options.Seed = None,
    quality: options.Quality = None,
    size: options.Size = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    style: options.Style = None,
    background: options.Background = None,
    viewpoint: options.Viewpoint = None,
    candidates: Annotated[int | None, typer.Option(metavar="1..4", help="Variants of the edit. [1]")] = None,
    review: Annotated[
        bool, typer.Option("--review", help="Wait for `vidgen approve` before the video is made.")
    ] = False,
    lane: Annotated[str, typer.Option(metavar="interactive|batch", help="The queue to wait in.")] = "interactive",
    deadline: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up what is not done by then.")] = None,
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="Where changes are told, over https.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label; may be repeated.")] = None,
    job_id: Annotated[str | None, typer.Option(metavar="ID", help="The same id twice is one job.")] = None,
    gateway: options.Gateway = None,
    as_json: options.Json = False,
) -> None:
    """Send a request and print its job id."""
    with output.speaking(as_json) as out_put:
        labels, wrong_labels = _labels(label or [])
        rest: dict[str, Any] = {"review": review, "lane": lane, "labels": labels}
        rest |= {"job_id": job_id} if job_id is not None else {}
        rest |= {"deadline_s": deadline} if deadline is not None else {}
        rest |= {"webhook_url": webhook} if webhook is not None else {}
        request = options.request_of(
            Wish(
                images, edit, motion, seed, quality, size, frames, fps, style, background, viewpoint, candidates, rest
            ),
            wrong_labels,
        )  # fmt: skip

        async def act() -> Job:
            async with client_of(gateway) as client:
                return await client.submit(request, images=images)

        job = output.run_async(act)
        out_put.emit_model("job", job)
        out_put.say(job.id)


def _labels(given: list[str]) -> tuple[dict[str, str], list[FieldError]]:
    """The labels, and what is none."""
    found, none = {}, []
    for label in given:
        key, equals, value = label.partition("=")
        if equals and key:
            found[key] = value
        else:
            none.append(wrong("--label", f"{label!r} is no label: write KEY=VALUE"))
    return found, none


def status(job_id: JobId, gateway: options.Gateway = None, as_json: options.Json = False) -> None:
    """Show a job as it is now."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        _show(out_put, await client.get(job_id))

    ask(gateway, as_json, act)


def watch(job_id: JobId, gateway: options.Gateway = None, as_json: options.Json = False) -> None:
    """Follow a job to its end; the exit code says how it ended."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        from vidgen.cli.progress import reviewed, stages_of, view_for
        from vidgen.cli.run import report_failure
        from vidgen.contracts import Job

        known = await client.get(job_id)
        with view_for(out_put) as view:
            view.begin(stages_of(known.request), review=reviewed(known.request))
            async with contextlib.aclosing(client.watch(job_id)) as updates:
                async for update in updates:
                    view.show(update)
                    if isinstance(update, Job):
                        known = update
        if known.status != "completed":
            report_failure(out_put, known)
        out_put.say(f"{known.id} completed: {', '.join(one.name for one in known.artifacts)}")

    ask(gateway, as_json, act)


def cancel(job_id: JobId, gateway: options.Gateway = None, as_json: options.Json = False) -> None:
    """Stop a job, queued or running."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        _show(out_put, await client.cancel(job_id))

    ask(gateway, as_json, act)


def retry(job_id: JobId, gateway: options.Gateway = None, as_json: options.Json = False) -> None:
    """Run a failed or cancelled job again from where it stopped."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        _show(out_put, await client.retry(job_id))

    ask(gateway, as_json, act)


def approve(
    job_id: JobId,
    candidate: Annotated[int, typer.Argument(min=0, metavar="[CANDIDATE]", help="Which candidate of the edit.")] = 0,
    gateway: options.Gateway = None,
    as_json: options.Json = False,
) -> None:
    """Let a job that waits for review go on with one of its candidates."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        _show(out_put, await client.approve(job_id, candidate))

    ask(gateway, as_json, act)


def list_jobs(
    status: Annotated[str | None, typer.Option(metavar="STATUS", help="Only jobs of this status.")] = None,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Jobs on the page.")] = 20,
    tenant: Annotated[str | None, typer.Option(help="Only jobs of this tenant; an operator's key sees all.")] = None,
    gateway: options.Gateway = None,
    as_json: options.Json = False,
) -> None:
    """List jobs, newest first."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        from vidgen.contracts import JobStatus

        if status is not None and status not in list(JobStatus):
            raise WrongUsageError([wrong("--status", f"{status!r} is none: use {', '.join(JobStatus)}")])
        page = await client.list(status=status, cursor=cursor, limit=limit, tenant=tenant)
        for job in page.jobs:
            out_put.emit_model("job", job)
        rows = [(job.id, str(job.status), job.stage or "", _age(job.created_at), _what(job)) for job in page.jobs]
        out_put.table(("job", "status", "stage", "age", "what"), rows)
        say_more(out_put, page.next_cursor)

    ask(gateway, as_json, act)


def say_more(out_put: Output, next_cursor: str | None) -> None:
    """Tell how to get the next page, where there is one."""
    if next_cursor is not None:
        out_put.emit("page", {"next_cursor": next_cursor})
        out_put.note(f"more: --cursor {next_cursor}")


def workers(gateway: options.Gateway = None, as_json: options.Json = False) -> None:
    """List the workers that are alive."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        found = await client.workers()
        for worker in found:
            out_put.emit_model("worker", worker)
        if not found:
            out_put.note("no worker is alive: start edit-service and i2v-service, or `vidgen up`")
            return
        rows = [
            (one.id, one.stage, one.state, one.engine, one.device, str(one.tasks_done), " ".join(one.running))
            for one in found
        ]
        out_put.table(("worker", "stage", "state", "engine", "device", "done", "runs"), rows)

    ask(gateway, as_json, act)


def _show(out_put: Output, job: Job) -> None:
    out_put.emit_model("job", job)
    out_put.say(f"{job.id}  {job.status}" + (f" ({job.stage})" if job.stage and not job.status.final else ""))
    for record in job.stages:
        made = f"  {record.engine}" if record.engine else ""
        # A cancel leaves the record of a stage as it found it.
        state = job.status if job.status.final and record.state in ("queued", "running") else record.state
        out_put.say(f"  {record.stage}: {state}{made}")
    if job.progress is not None and not job.status.final:
        from vidgen.cli.progress import pace

        steps = f"step {job.progress.step}/{job.progress.steps}" if job.progress.steps else job.progress.phase
        out_put.say("  " + ", ".join(filter(None, (f"{job.progress.stage}: {steps}", pace(job.progress)))))
    if job.artifacts:
        out_put.say(f"  artifacts: {', '.join(one.name for one in job.artifacts)}")
    if job.error is not None:
        out_put.say(f"  {job.error.code}: {job.error.message}")
    if str(job.status) == "awaiting_review":
        out_put.say(f"  waits for: vidgen approve {job.id} [CANDIDATE]")


def _age(since: datetime) -> str:
    seconds = (datetime.now(UTC) - since).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def _what(job: Job) -> str:
    wanted = job.request
    if wanted is None:
        return ""
    prompts = [part.prompt for part in (wanted.edit, wanted.i2v) if part is not None]
    text = " ".join(" → ".join(prompts).split())
    return text if len(text) <= 60 else f"{text[:59]}…"
