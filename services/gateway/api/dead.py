"""Dead letters: look at them, send them again, drop them."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated

import pydantic
import pydantic_core
import structlog
from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from gateway.api import problems
from gateway.api.jobs import answer
from gateway.api.parts import CallerHere, Parts, PartsHere
from gateway.api.problems import HttpError
from gateway.intake import NO_TENANT, TENANT, InvalidRequestError, id_from_key, parse
from vidgen import topology
from vidgen.bus import Stored
from vidgen.contracts import DeadLetter, FieldError, Job, JobError

log = structlog.get_logger(__name__)


def _operator(caller: CallerHere) -> None:
    if not caller.admin:
        raise HttpError(403, "not_the_operator", "only an operator's key opens the dead letters")


router = APIRouter(prefix="/v1/dead", tags=["dead letters"], dependencies=[Depends(_operator)])

SeqHere = Annotated[int, Path(ge=1, lt=2**63)]


class NumberedLetter(DeadLetter):
    """A dead letter and its place."""

    seq: int = Field(description="Names the letter here.")


class LetterList(BaseModel):
    """A page of dead letters, newest first; `next_cursor` is null on the last one."""

    dead: tuple[NumberedLetter, ...]
    next_cursor: str | None


@router.get("", response_model_exclude_none=False, responses=problems.responses(422, 503))
async def list_letters(
    parts: PartsHere,
    cursor: Annotated[int | None, Query(ge=1, lt=2**63, description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> LetterList:
    """What was given up, newest first: why, and the original payload."""
    found = await parts.bus.tail(topology.DEAD, cursor, limit + 1)
    following = str(found[limit - 1].seq) if len(found) > limit else None
    return LetterList(dead=tuple(map(_numbered, found[:limit])), next_cursor=following)


@router.get("/{seq}", responses=problems.responses(404, 422, 503))
async def show_letter(seq: SeqHere, parts: PartsHere) -> NumberedLetter:
    """One dead letter."""
    return await _find(parts, seq)


@router.post(
    "/{seq}/replay", status_code=202, response_model=Job, responses=problems.responses(404, 409, 422, 503)
)  # fmt: skip
async def replay(seq: SeqHere, parts: PartsHere) -> Response:
    """Try again: a task by a retry of its job, a request as a new job, a webhook as it is. What worked is dropped."""
    letter = await _find(parts, seq)
    if letter.stage is not None and letter.job_id is not None:
        job = await parts.jobs.retry(letter.job_id)
    elif letter.subject.split(".")[:2] == topology.SUBJECT_REQUESTS.split("."):
        job = await _submit_again(letter, parts)
    elif letter.job_id is not None and topology.is_of_webhook(letter.subject, letter.job_id):
        job = await _tell_again(letter, letter.job_id, parts)
    else:
        raise HttpError(
            409, "not_replayable", "only requests, tasks and webhooks can be replayed: look at it, then drop it"
        )
    await parts.bus.delete(topology.DEAD, seq)
    log.info("a dead letter was replayed", _event="dead_letter_replayed", seq=seq, job=job.id)
    return answer(job, 202)


@router.delete("/{seq}", status_code=204, response_class=Response, responses=problems.responses(404, 422, 503))
async def drop(seq: SeqHere, parts: PartsHere) -> Response:
    """Forget a dead letter."""
    if not await parts.bus.delete(topology.DEAD, seq):
        raise _missing(seq)
    log.info("a dead letter was dropped", _event="dead_letter_dropped", seq=seq)
    return Response(status_code=204)


async def _submit_again(letter: NumberedLetter, parts: Parts) -> Job:
    try:
        asked = json.loads(base64.b64decode(letter.payload, validate=True))
    except (ValueError, binascii.Error, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise InvalidRequestError(
            [FieldError(field="request", message="the payload is not a JSON object: drop the letter, send it anew")]
        )
    asked.pop("job_id", None)
    tenant = topology.tenant_of_requests(letter.subject)
    if not TENANT.fullmatch(tenant):
        raise InvalidRequestError([FieldError(field="subject", message=f"{NO_TENANT}: drop the letter")])
    # Made of the letter, so that a replay that is repeated half-way does not become two jobs.
    key = f"replay:{letter.seq}:{letter.at.isoformat()}"
    job, _ = await parts.intake.submit(
        parse(json.dumps(asked).encode(), tenant), id_from_key(key, tenant), tenant, key=key
    )
    return job


async def _tell_again(letter: NumberedLetter, job_id: str, parts: Parts) -> Job:
    job, payload = await parts.jobs.get(job_id), base64.b64decode(letter.payload)
    if not _is_whole(payload):
        raise HttpError(
            409, "not_replayable",
            "the webhook was too large for a letter, which has its beginning alone: ask for the job, drop the letter",
        )  # fmt: skip
    message_id = f"replay:{letter.seq}:{letter.at.isoformat()}"
    await parts.bus.publish(topology.subject_of_webhook(job_id, job.tenant), payload, message_id=message_id)
    return job


def _is_whole(payload: bytes) -> bool:
    """Whether this is a JSON object; one that was cut off is none."""
    try:
        return isinstance(pydantic_core.from_json(payload), dict)
    except ValueError:
        return False


async def _find(parts: Parts, seq: int) -> NumberedLetter:
    stored = await parts.bus.get(topology.DEAD, seq)
    if stored is None:
        raise _missing(seq)
    return _numbered(stored)


def _missing(seq: int) -> HttpError:
    return HttpError(404, "letter_not_found", f"there is no dead letter {seq}: it was replayed, dropped or has expired")


def _numbered(stored: Stored) -> NumberedLetter:
    try:
        letter = DeadLetter.model_validate_json(stored.body)
    except pydantic.ValidationError:  # of another version, or not ours: shown as it is
        error = JobError(code="unreadable", message="this letter has a form that this version does not know")
        payload = base64.b64encode(stored.body).decode()
        letter = DeadLetter(subject=stored.subject, error=error, payload=payload, at=stored.at)
    return NumberedLetter(seq=stored.seq, **dict(letter))
