"""Jobs: submit, look, list, cancel, retry, approve."""

from __future__ import annotations

import tempfile
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import pydantic_core
import uuid_utils
from fastapi import APIRouter, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from gateway import pipeline
from gateway.api import bodies, limits, problems
from gateway.api.forms import REQUEST_FIELD, read_form
from gateway.api.parts import CallerHere, JobHere, Parts, PartsHere
from gateway.api.references import References
from gateway.intake import TENANT, InvalidRequestError, id_from_key, parse
from vidgen import artifacts, contracts, errors
from vidgen.artifacts import uploads_prefix
from vidgen.contracts import FieldError, Job, JobStatus, VideoRequest

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

LOOKS = 25  # jobs that a page may have looked at for each request that it counts as
KNOWN: dict[int | str, dict[str, Any]] = {200: {"model": Job, "description": "The job was known already."}}
FORM_SCHEMA = {
    "type": "object",
    "required": ["image", "request"],
    "properties": {
        "image": {
            "type": "array", "minItems": 1, "maxItems": contracts.MAX_REFERENCES,
            "items": {"type": "string", "format": "binary"}, "description": "The reference images, in order.",
        },
        "request": {"type": "string", "description": "A VideoRequest as JSON, without `references`."},
    },
}  # fmt: skip
SUBMIT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            bodies.JSON: {"schema": {"$ref": "#/components/schemas/VideoRequest"}},
            bodies.FORM: {"schema": FORM_SCHEMA},
        },
    }
}


class JobList(BaseModel):
    """A page of jobs, newest first; `next_cursor` is null on the last one."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


class Approval(BaseModel):
    """Which candidate of the edit the video starts from."""

    model_config = ConfigDict(extra="forbid")

    candidate: int = Field(0, ge=0)


def answer(job: Job, status: int = 200) -> Response:
    """A job as a response."""
    return Response(job.to_bytes(), status, {"Location": f"/v1/jobs/{job.id}"}, bodies.JSON)


@router.post(
    "", status_code=202, response_model=Job, openapi_extra=SUBMIT_BODY,
    responses=KNOWN | problems.responses(400, 409, 413, 415, 422, 503),
)  # fmt: skip
async def submit(
    request: Request,
    parts: PartsHere,
    caller: CallerHere,
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key", min_length=1, max_length=255, description="The same key twice is the same job."
        ),
    ] = None,
) -> Response:
    """Submit a request: JSON with object keys, or a form with the images. The same id or key twice is one job."""
    try:
        wanted = await _read_request(request, parts, caller.tenant)
        key = idempotency_key or ""
        given = wanted.job_id or (id_from_key(key, caller.tenant) if key else None)
        job_id = given or str(uuid_utils.uuid7())
        job, new = await parts.intake.submit(wanted, job_id, caller.tenant, key=key, fresh=given is None)
    except (errors.RejectedError, problems.HttpError):
        parts.metrics.request_rejected()
        raise
    if not new:
        parts.metrics.request_duplicate()
    return answer(job, 202 if new else 200)


@router.get("", response_model=JobList, responses=problems.responses(422, 503))
async def list_jobs(
    parts: PartsHere,
    caller: CallerHere,
    status: JobStatus | None = None,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    tenant: Annotated[
        str | None, Query(pattern=TENANT.pattern, description="The operator sees all tenants' without.")
    ] = None,
) -> Response:
    """The caller's jobs, newest first; pages stay the same while new jobs come."""
    whose = tenant if caller.admin else caller.tenant
    if tenant is not None and not caller.sees(tenant):
        raise problems.HttpError(403, "not_the_operator", "only an operator's key shows the jobs of other tenants")
    async with parts.quotas.pages.room(caller.tenant):
        page = await parts.jobs.list(status, cursor, limit, whose)
    await parts.quotas.charge(caller.tenant, page.looked_at // LOOKS)
    jobs = b",".join(job.to_bytes() for job in page.jobs)
    following = pydantic_core.to_json(page.next_cursor)
    return Response(b'{"jobs":[%b],"next_cursor":%b}' % (jobs, following), media_type=bodies.JSON)


@router.get("/{job_id}", response_model=Job, responses=problems.responses(404, 503))
async def show(job: JobHere) -> Response:
    """A job, with the newest progress of what runs."""
    return answer(job)


@router.post("/{job_id}/cancel", response_model=Job, responses=problems.responses(404, 503))
async def cancel(job: JobHere, parts: PartsHere) -> Response:
    """Stop a job, queued or running; one that has ended stays as it is."""
    return answer(await parts.jobs.cancel(job.id))


@router.post("/{job_id}/retry", response_model=Job, responses=problems.responses(404, 409, 503))
async def retry(job: JobHere, parts: PartsHere) -> Response:
    """Run a failed or cancelled job again from the stage where it stopped; what succeeded is not done again."""
    job = await parts.jobs.caught_up(job, pipeline.may_retry)  # before it takes room
    async with _room(parts, job, pipeline.may_retry(job)):
        return answer(await parts.jobs.retry(job.id))


@router.post(
    "/{job_id}/approve", response_model=Job, openapi_extra=bodies.documented(Approval, required=False),
    responses=problems.responses(400, 404, 409, 413, 415, 422, 503),
)  # fmt: skip
async def approve(job: JobHere, request: Request, parts: PartsHere) -> Response:
    """Let a job that waits for a review go on with one of its candidates; without a body with the first one."""
    wanted = await bodies.read_model(request, Approval, Approval())
    job = await parts.jobs.caught_up(job, pipeline.may_approve)  # before it takes room
    async with _room(parts, job, pipeline.may_approve(job)):
        return answer(await parts.jobs.approve(job.id, wanted.candidate))


def _room(parts: Parts, job: Job, begins: bool) -> AbstractAsyncContextManager[None]:
    """Room for a task of the job, where it begins one; who asks for what is done already takes none."""
    return parts.quotas.room(job.tenant) if begins else nullcontext()


async def _read_request(request: Request, parts: Parts, tenant: str) -> VideoRequest:
    if bodies.media_type(request, bodies.JSON, bodies.FORM) == bodies.JSON:
        return parse(await bodies.read_json(request), tenant)
    try:
        return await _read_form_request(request, parts, tenant)
    except OSError as exc:  # the disk; a client that leaves is told otherwise
        raise artifacts.local_file(exc) from exc


async def _read_form_request(request: Request, parts: Parts, tenant: str) -> VideoRequest:
    references: References = request.app.state.references
    limit = parts.settings.max_upload_bytes
    largest = limits.form_bytes(limit)
    size = min(limits.declared(request.headers) or largest, largest)
    with (
        parts.quotas.form(tenant, size, largest),
        tempfile.TemporaryDirectory(prefix="form-", dir=parts.intake.scratch.folder()) as folder,
    ):
        form = await read_form(request.headers["content-type"], request.stream(), Path(folder), limit)
        asked = _without_references(bodies.check_json(form.request, f"the form field {REQUEST_FIELD}"))
        usable, wrong = await references.check(form.images, tenant)
        try:
            # Keys that stand for the images, so that everything else that is wrong is named in the same answer.
            _parse_with(asked, [f"{uploads_prefix(tenant)}{index}" for index in range(len(form.images))], tenant)
        except InvalidRequestError as exc:
            wrong += exc.errors
        if wrong:
            raise InvalidRequestError(wrong)
        return _parse_with(asked, await references.store(usable, tenant), tenant)


def _parse_with(asked: dict[str, Any], references: list[str], tenant: str) -> VideoRequest:
    return parse(pydantic_core.to_json(asked | {"references": references}), tenant)


def _without_references(asked: Any) -> dict[str, Any]:
    if not isinstance(asked, dict):
        raise InvalidRequestError([FieldError(field=REQUEST_FIELD, message="send one JSON object")])
    if "references" in asked:
        message = "leave it out: the images of the form are the references"
        raise InvalidRequestError([FieldError(field="references", message=message)])
    return asked
