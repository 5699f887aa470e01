"""Requests come in: validate, check the references, record, and let the pipeline go. Nothing bad gets past here.

Both doors lead through `Intake`: the HTTP edge (`submit`) and the public subject `vidgen.requests` (`handle`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydantic
import pydantic_core
import structlog

from gateway import pipeline, plan
from gateway.decoder import Decoder
from gateway.decoding import Decoders, Decoding
from gateway.jobs import JobIdTakenError, Jobs, now
from gateway.line import Line
from gateway.quotas import LimitError, Quotas
from gateway.receivers import Allowed
from vidgen import artifacts, contracts, dead, errors, images, topology, tracing
from vidgen.bus import Bus, Delivery
from vidgen.contracts import DEFAULT_TENANT, FieldError, Job, JobStatus, VideoRequest
from vidgen.scratch import Scratch

log = structlog.get_logger(__name__)

MAX_REQUEST_BYTES = 128 << 10
MAX_NAMED, MAX_FIELD_NAME = 50, 200
FILES = 16  # references that are fetched, and decoded, at once
REMEMBERED = 1000  # requests let in by HTTP whose message another replica may have taken
JUST_NOW_S = 1.0  # a plain reference that was looked at since then is not looked at again
# That long a request waits for room before it is turned away because its tenant has too many jobs; and that long one
# that had found room when it came by HTTP. No longer: what waits is under way, and others have to have room for theirs.
ROOM_S, LET_IN_S = 6.0, 60.0
TENANT = re.compile(r"^[a-z0-9][a-z0-9-]{0,31}$")
NO_TENANT = "vidgen.requests.<tenant> wants a tenant's id: lower case letters, digits and -, at most 32"
MADE_OF_A_KEY = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")  # by `id_from_key`
JOB_NAMESPACE = uuid.UUID("5f0c7f2e-64b5-5f0e-9a55-6b1f1f0a7c11")


# Not in the contract: records of before are read by that, too.
NO_REVIEW = FieldError(
    field="review", message="it stands between an edit and its video: give edit and i2v, or leave it out"
)


class InvalidRequestError(errors.RejectedError):
    """The request does not validate."""

    code = "invalid_request"

    def __init__(self, found: Sequence[FieldError]) -> None:
        # Bounded: what is said of a request must fit into a message, however long and wrong the request is.
        named = [error.model_copy(update={"field": error.field[:MAX_FIELD_NAME]}) for error in found[:MAX_NAMED]]
        if len(found) > MAX_NAMED:
            named.append(FieldError(field="request", message=f"{len(found) - MAX_NAMED} more fields are wrong"))
        super().__init__("; ".join(f"{error.field}: {error.message}" for error in named))
        self.errors = tuple(named)


def parse(body: bytes, tenant: str = DEFAULT_TENANT) -> VideoRequest:
    """A tenant's request from its JSON bytes; raises InvalidRequestError naming every wrong field."""
    if len(body) > MAX_REQUEST_BYTES:
        raise InvalidRequestError([FieldError(field="request", message=f"larger than {MAX_REQUEST_BYTES:,} bytes")])
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(
            [FieldError(field="request", message="not UTF-8: encode the JSON as UTF-8")]
        ) from None
    try:
        request = VideoRequest.model_validate_json(text)
    except pydantic.ValidationError as exc:
        if exc.errors()[0]["type"] == "json_invalid":
            raise InvalidRequestError(
                [FieldError(field="request", message="not JSON: send one JSON object, see docs/schemas")]
            ) from None
        found = contracts.field_errors(exc)
        also = _also_wrong(text, {error.field for error in found}, tenant)
        raise InvalidRequestError([*found, *also]) from None
    if request.review and (request.edit is None or request.i2v is None):
        raise InvalidRequestError([NO_REVIEW])
    return request


def _also_wrong(text: str, named: set[str], tenant: str) -> list[FieldError]:
    """What the contract leaves open, of a request that is wrong anyway: one answer names all of it."""
    try:
        asked: Any = pydantic_core.from_json(text)
    except ValueError:  # a number too long for Python
        return []
    if not isinstance(asked, dict):
        return []
    wrong = _misplaced_keys(asked, named, tenant)
    one_alone = (asked.get("edit") is None) != (asked.get("i2v") is None)
    return [*wrong, NO_REVIEW] if asked.get("review") is True and one_alone else wrong


def _misplaced_keys(asked: dict[str, Any], named: set[str], tenant: str) -> list[FieldError]:
    """The keys outside the places they may be in."""
    given, job_id = asked.get("references"), asked.get("job_id")
    wrong = []
    for index, key in enumerate(given if isinstance(given, list) else ()):
        field = f"references.{index}"
        if isinstance(key, str) and field not in named:
            try:
                check_reference(key, job_id if isinstance(job_id, str) else None, tenant)
            except errors.RejectedError as exc:
                wrong.append(FieldError(field=field, message=exc.message))
    return wrong


def check_reference(key: str, job_id: str | None, tenant: str) -> None:
    """RejectedError unless the request of a tenant may start from this object."""
    # A job's prefix outlives its record, and its id may be another's next: to start from there is the operator's alone.
    artifacts.check_key(key, job_id if tenant == DEFAULT_TENANT else None, tenant)


def id_from_key(key: str, tenant: str = DEFAULT_TENANT) -> str:
    """The job id that an idempotency key, or a `Nats-Msg-Id`, of a tenant stands for."""
    own = JOB_NAMESPACE if tenant == DEFAULT_TENANT else uuid.uuid5(JOB_NAMESPACE, f"tenant {tenant}")
    return str(uuid.uuid5(own, key))


def check_id(job_id: str, key: str, tenant: str) -> None:
    """JobIdTakenError for an id that stands for a key, if not for this one: who guesses it could come first."""
    if MADE_OF_A_KEY.fullmatch(job_id) and job_id != id_from_key(key, tenant):
        raise JobIdTakenError(job_id, "stands for somebody's key, as each UUID of version 5 does")


def id_from_position(at: datetime, stream: str, seq: int) -> str:
    """A UUIDv7 (RFC 9562) made of a message's own time and place: the same however often it is delivered."""
    chance = hashlib.sha256(f"{stream}:{seq}:{at.timestamp()}".encode()).digest()
    value = int(at.timestamp() * 1000) << 80 | int.from_bytes(chance[:10])
    value = value & ~(0xF000 << 64) | 0x7000 << 64
    value = value & ~(0xC000 << 48) | 0x8000 << 48
    return str(uuid.UUID(int=value))


class Intake:
    """Lets requests in. Several may run at once; each is idempotent by job id."""

    def __init__(
        self, bus: Bus, store: artifacts.ArtifactStore, jobs: Jobs, quotas: Quotas, max_upload_bytes: int,
        receivers: Allowed | None = None, *, decoders: Decoders | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`receivers` are those that webhooks may go to; None: this server sends none."""
        self._bus, self._store, self._jobs, self._quotas = bus, store, jobs, quotas
        self._max_bytes, self._receivers, self._clock = max_upload_bytes, receivers, clock
        # What this replica lets in by HTTP comes back to it from the bus, byte for byte: nothing is left to do then.
        self._submitted: OrderedDict[tuple[str, bytes], asyncio.Future[Job | None]] = OrderedDict()
        # Plain references that were looked at: who makes ten videos of one photograph has it looked at twice, not ten
        # times. The first time nothing is asked of the store that would be in vain for a photograph that comes once.
        # With the object's tag, and when it was looked at.
        self._plain: OrderedDict[str, tuple[str, float, images.ImageFacts]] = OrderedDict()
        # Requests for which there was no room, since when. Not by their deliveries or their age: they may have come
        # again, or late, for the bus or the store. Another replica may have settled one: as many as can be under way.
        self._waiting: OrderedDict[tuple[int, datetime], float] = OrderedDict()
        self.scratch, self.decoding = Scratch(), Decoding(decoders=decoders)
        self._files = Line(FILES)

    async def submit(
        self, request: VideoRequest, job_id: str, tenant: str, *, key: str = "", fresh: bool = False
    ) -> tuple[Job, bool]:
        """Let a tenant's request in by HTTP: checked first, durable once this returns; True where the job is new.

        `key` is what the id stands for. `fresh`: it was made for this request, so no job can have it. Raises
        InvalidRequestError, JobIdTakenError, LimitError, and BusError or StoreError with nothing half accepted.
        """
        tracing.about(job_id=job_id)
        existing = None if fresh else await self._jobs.find(job_id)
        if existing is not None:
            await self._jobs.enter(existing, tenant)
            return existing, False
        check_id(job_id, key, tenant)
        request = request.model_copy(update={"job_id": job_id})
        async with self._quotas.room(tenant):
            job = await self._prepare(request, job_id, now(), tenant)
            # The stream compares ids whatever the subject, if only for a moment: those of two tenants must not be the
            # same.
            message_id = job_id if tenant == DEFAULT_TENANT else f"{tenant}:{job_id}"
            subject, body = topology.subject_of_requests(tenant), request.to_bytes()
            with self._submitting(subject, body) as submitted:
                headers = {topology.HEADER_LET_IN: "1"} | ({topology.HEADER_KEY: key.encode().hex()} if key else {})
                await self._bus.publish(subject, body, message_id=message_id, headers=headers)
                try:
                    job, new = await self._jobs.create(job)
                except errors.BusError as exc:
                    # It is let in: whoever takes the message will enter it. Told otherwise, the client would ask again,
                    # and without an id of its own that would be a second job.
                    log.warning(exc.message, _event="entered_later", job=job_id)
                    return job, True
                submitted.set_result(job)
            return job, new

    @contextlib.contextmanager
    def _submitting(self, subject: str, body: bytes) -> Iterator[asyncio.Future[Job | None]]:
        """What `handle` waits for, should it see the request before it is let in; None where it was not."""
        submitted = self._submitted[subject, body] = asyncio.get_running_loop().create_future()
        if len(self._submitted) > REMEMBERED:
            self._submitted.popitem(last=False)
        try:
            yield submitted
        finally:
            if not submitted.done():
                submitted.set_result(None)

    async def handle(self, delivery: Delivery) -> Job:
        """Let a message on `vidgen.requests` in, or turn it away; either way it is recorded when this returns."""
        submitted = self._submitted.pop((delivery.subject, delivery.body), None)
        if submitted is not None and (let_in := await submitted) is not None:
            tracing.about(job_id=let_in.id)
            return let_in
        at = delivery.at.astimezone(UTC)
        tenant, request = topology.tenant_of_requests(delivery.subject), None
        try:
            if not TENANT.fullmatch(tenant):
                tenant = DEFAULT_TENANT
                raise InvalidRequestError([FieldError(field="subject", message=NO_TENANT)])
            request = parse(delivery.body, tenant)
            job_id = request.job_id or self._identify(delivery, tenant)
            tracing.about(job_id=job_id)
            # Before its references are looked at: a normalised one is stored under the job's own key.
            existing = await self._jobs.find(job_id)
            if existing is not None:
                await self._jobs.enter(existing, tenant)
                if existing.status is JobStatus.REJECTED and existing.error is not None and delivery.num_delivered > 1:
                    # Whoever turned it away may have died before there was a letter of it.
                    await self._keep(delivery, job_id, InvalidRequestError(existing.error.fields), at)
                return existing
            if request.job_id:
                check_id(job_id, _key(delivery), tenant)
            async with self._quotas.room(tenant):
                job, _ = await self._jobs.create(await self._prepare(request, job_id, at, tenant))
        except InvalidRequestError as exc:
            return await self._turn_away(delivery, request, exc, at, tenant)
        except LimitError as exc:
            if self._may_wait(delivery):
                raise errors.RetryableError(exc.message, code=exc.code) from exc
            return await self._turn_away(delivery, request, _as_invalid("tenant", exc), at, tenant)
        except JobIdTakenError as exc:
            # Recorded under another id: what is said under this one is said to somebody else.
            wrong = _as_invalid("job_id", exc)
            return await self._record_rejected(delivery, request, _position(delivery), wrong, at, tenant)
        return job

    def _may_wait(self, delivery: Delivery) -> bool:
        """Whether a request for which there is no room may wait on."""
        # What was answered by HTTP: its job is about to be there, or another took the room while the bus was away.
        # Whoever writes this header himself gains no room by it.
        bears_s = LET_IN_S if topology.HEADER_LET_IN in delivery.headers else ROOM_S
        place, now = (delivery.seq, delivery.at), self._clock()
        since = self._waiting.setdefault(place, now)
        if len(self._waiting) > topology.REQUESTS_UNDER_WAY:
            self._waiting.popitem(last=False)
        if now - since < bears_s:
            return True
        del self._waiting[place]
        return False

    async def give_up(self, delivery: Delivery) -> Job:
        """Turn a request away that no gateway could handle, so that whoever waits for it hears of its end."""
        tenant = topology.tenant_of_requests(delivery.subject)
        wrong = FieldError(field="request", message="the gateway could not process it: its log says what happened")
        exc = InvalidRequestError([wrong])
        exc.code = "undigested"
        known = tenant if TENANT.fullmatch(tenant) else DEFAULT_TENANT
        return await self._turn_away(delivery, None, exc, delivery.at.astimezone(UTC), known)

    async def _turn_away(
        self, delivery: Delivery, request: VideoRequest | None, exc: InvalidRequestError, at: datetime, tenant: str
    ) -> Job:
        claimed = _claimed_id(delivery.body)
        job_id = claimed or self._identify(delivery, tenant)
        try:
            if claimed:
                check_id(claimed, _key(delivery), tenant)
            return await self._record_rejected(delivery, request, job_id, exc, at, tenant)
        except JobIdTakenError:
            return await self._record_rejected(delivery, request, _position(delivery), exc, at, tenant)

    def _identify(self, delivery: Delivery, tenant: str) -> str:
        message_id = delivery.headers.get("Nats-Msg-Id")
        return id_from_key(message_id, tenant) if message_id else _position(delivery)

    async def _prepare(self, request: VideoRequest, job_id: str, at: datetime, tenant: str) -> Job:
        with tracing.span("intake"):
            self._check_receiver(request)
            usable = await self._check_all(request.references, job_id, tenant)
            first = usable[0][1]
            work = plan.plan(request.edit, request.i2v, job_id, (first.width, first.height))
            return pipeline.accept(request, job_id, [key for key, _ in usable], work, at, tenant)

    def _check_receiver(self, request: VideoRequest) -> None:
        if request.webhook_url is None:
            return
        if self._receivers is None:
            message = "this server sends no webhooks: leave it out, or have VIDGEN_WEBHOOK_SECRET set there"
            raise InvalidRequestError([FieldError(field="webhook_url", message=message)])
        try:
            self._receivers.check_url(request.webhook_url)
        except errors.RejectedError as exc:
            raise InvalidRequestError([FieldError(field="webhook_url", message=exc.message)]) from None

    async def _check_all(
        self, references: Sequence[str], job_id: str, tenant: str
    ) -> list[tuple[str, images.ImageFacts]]:
        checked = await asyncio.gather(
            *(self._check(key, index, job_id, tenant) for index, key in enumerate(references)), return_exceptions=True
        )
        wrong: list[FieldError] = []
        usable: list[tuple[str, images.ImageFacts]] = []
        for index, result in enumerate(checked):
            if isinstance(result, errors.RejectedError):
                wrong.append(FieldError(field=f"references.{index}", message=result.message))
            elif isinstance(result, BaseException):
                raise result
            else:
                usable.append(result)
        if wrong:
            raise InvalidRequestError(wrong)
        return usable

    async def _check(self, key: str, index: int, job_id: str, tenant: str) -> tuple[str, images.ImageFacts]:
        """A reference that every engine can read: itself where it is plain, else a normalised copy of the job's own."""
        check_reference(key, job_id, tenant)
        tag, at = "", self._clock()
        if (known := self._plain.get(key)) is not None:
            before, looked_at, facts = known
            if at - looked_at < JUST_NOW_S:  # whoever removes it in this moment might do so a moment after a look, too
                return key, facts
            stat = await self._store.stat(key)
            tag = stat.tag if stat is not None else ""
            if tag and tag == before:
                self._plain[key] = tag, at, facts
                return key, facts
        async with self._files.room(tenant), self._file() as source:
            await self._store.fetch(key, source, limit=self._max_bytes)
            facts = await self.decoding.over(source, _looked_at, tenant)
            if facts.normal:
                # The tag is that of before, so if the object was replaced meanwhile no other tag stands for its facts.
                self._plain[key] = tag, at, facts
                if len(self._plain) > REMEMBERED:
                    self._plain.popitem(last=False)
                return key, facts
            async with self._file(".png") as target:
                facts = await self.decoding.over(
                    source, lambda decoder, path: decoder.normalise(path, target), tenant
                )  # fmt: skip
                own = artifacts.artifact_key(job_id, f"reference-{index}.png")
                await self._store.put(own, target, "image/png")
                return own, facts

    @contextlib.asynccontextmanager
    async def _file(self, suffix: str = "") -> AsyncIterator[Path]:
        """Room for a file, for the block. Removed in a thread: a disk that is busy syncing would hold up everything."""
        path = self.scratch.path(suffix)
        try:
            yield path
        finally:
            # Shielded: a cancel that comes before the thread has begun must not leave it behind.
            if path.exists():
                await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, _remove, path))

    async def _record_rejected(
        self, delivery: Delivery, request: VideoRequest | None, job_id: str, exc: InvalidRequestError, at: datetime,
        tenant: str,
    ) -> Job:  # fmt: skip
        if request is not None:
            try:
                self._check_receiver(request)
            except InvalidRequestError:  # a receiver that may not be is not told either
                request = request.model_copy(update={"webhook_url": None})
        tracing.about(job_id=job_id)
        tracing.failed(exc.code)
        job, new = await self._jobs.create(pipeline.reject(request, job_id, exc.errors, at, tenant))
        await self._keep(delivery, job_id, exc, at)
        log.info("a request was turned away", _event="request_rejected", job=job_id, new=new, errors=len(exc.errors))
        return job

    async def _keep(self, delivery: Delivery, job_id: str, exc: InvalidRequestError, at: datetime) -> None:
        """Keep a request that was turned away as a dead letter, one for all copies of it."""
        error = contracts.JobError(code=exc.code, message=exc.message, fields=exc.errors)
        letter = dead.letter(delivery.body, delivery.subject, error, job_id=job_id, at=at)
        message_id = f"request:{job_id}:{hashlib.sha256(delivery.body).hexdigest()[:16]}"
        await dead.publish(self._bus, letter, message_id=message_id)


def _looked_at(decoder: Decoder, path: Path) -> images.ImageFacts:
    """What an image is. A plain one is used where it lies in the store, so this copy has done its service."""
    facts = decoder.inspect(path)
    if facts.normal:
        _remove(path)
    return facts


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _position(delivery: Delivery) -> str:
    return id_from_position(delivery.at, topology.REQUESTS, delivery.seq)


def _key(delivery: Delivery) -> str:
    """The key that a request's id stands for, as the gateway that let it in said; empty where it did not."""
    try:
        return bytes.fromhex(delivery.headers.get(topology.HEADER_KEY, "")).decode()
    except ValueError:
        return ""


def _as_invalid(field: str, exc: errors.VidgenError) -> InvalidRequestError:
    return InvalidRequestError([FieldError(field=field, message=exc.message)])


def _claimed_id(body: bytes) -> str | None:
    """The job id that an invalid request claims, if that at least is valid."""

    class Claim(pydantic.BaseModel):
        job_id: contracts.JobId

    try:
        return Claim.model_validate_json(body).job_id
    except (pydantic.ValidationError, UnicodeDecodeError):
        return None
