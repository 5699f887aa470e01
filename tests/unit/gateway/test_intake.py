"""The door on the bus: what comes on `vidgen.requests` becomes a job, or a rejection that says why."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from tests.gateways import DECODERS, EDIT, KEY, picture, put

from gateway import intake
from gateway.decoding import Decoders
from gateway.intake import LET_IN_S, ROOM_S, Intake, InvalidRequestError, id_from_key, parse
from gateway.jobs import Jobs, parse_event
from gateway.quotas import Quotas
from vidgen import contracts, errors, topology
from vidgen.bus import Delivery
from vidgen.contracts import DeadLetter, Job, JobStatus, VideoRequest
from vidgen.settings import GatewaySettings
from vidgen.tenants import Tenants
from vidgen.testing import MemoryBus, MemoryStore

GATEWAY = topology.Consumer(topology.REQUESTS, topology.GATEWAY)
GOOD: dict[str, Any] = {"references": [KEY], "edit": EDIT}


class Door:
    """The intake on doubles."""

    def __init__(
        self, store: MemoryStore | None = None, decoders: Decoders | None = None, **settings: Any
    ) -> None:  # fmt: skip
        self.bus, self.store = MemoryBus(topology.Topology(ack_wait=0.05)), store or MemoryStore()
        self.jobs = Jobs(self.bus)
        quotas = Quotas(self.bus, Tenants(self.bus), GatewaySettings(**settings))
        self.now = 0.0
        self.intake = Intake(
            self.bus, self.store, self.jobs, quotas, max_upload_bytes=1 << 20, decoders=decoders or DECODERS,
            clock=lambda: self.now,
        )  # fmt: skip
        self._count = 0

    async def publish(
        self, body: object, message_id: str | None = None, subject: str = topology.SUBJECT_REQUESTS
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._count += 1
        await self.bus.publish(subject, raw, message_id=message_id or f"m{self._count}")

    async def take(self) -> Delivery:
        delivery = await self.bus.pull(GATEWAY, 10)
        assert delivery is not None
        return delivery

    async def handle_one(self) -> Job:
        delivery = await self.take()
        job = await self.intake.handle(delivery)
        await delivery.ack()
        return job

    async def finds_no_room(self) -> None:
        delivery = await self.take()
        with pytest.raises(errors.RetryableError, match="1 jobs are not done"):
            await self.intake.handle(delivery)
        await delivery.nak()

    async def events(self, job_id: str) -> list[contracts.AnyEvent]:
        found = await self.bus.tail(topology.EVENTS, None, 100)
        return [parse_event(one.body) for one in reversed(found) if one.subject.endswith(f".{job_id}")]

    async def letters(self) -> list[DeadLetter]:
        return [DeadLetter.model_validate_json(one.body) for one in await self.bus.tail(topology.DEAD, None, 100)]


@pytest.fixture
async def door() -> Door:
    door = Door()
    await put(door.store, KEY, picture())
    await put(door.store, "uploads/text.png", b"no image")
    await put(door.store, "uploads/large.png", picture() + b"\0" * (1 << 20))
    return door


async def test_a_reference_that_comes_again_and_again_is_not_fetched_each_time(door: Door) -> None:
    for number in range(5):
        door.now += intake.JUST_NOW_S
        await door.publish(GOOD | {"job_id": f"j{number}"})
        assert (await door.handle_one()).status is JobStatus.QUEUED

    assert door.store.calls["fetch"] == 2  # the first time nobody knows that it will come again
    assert door.store.calls["stat"] == 4


async def test_a_reference_that_comes_many_times_within_a_second_is_looked_at_once(door: Door) -> None:
    looks = []
    for number in range(12):
        await door.publish(GOOD | {"job_id": f"j{number}"})
        assert (await door.handle_one()).inputs == (KEY,)
        looks.append((door.store.calls["fetch"], door.store.calls["stat"]))
        door.now += intake.JUST_NOW_S / 4

    assert looks == [*[(1, 0)] * 4, *[(2, 1)] * 4, *[(2, 2)] * 4]


async def test_no_more_references_are_on_the_gateways_disk_at_once_than_it_has_room_for() -> None:
    """They wait there for their turn to be decoded: what one tenant sends within a second may be gigabytes."""
    store = MemoryStore()
    keys = [f"uploads/photo-{number}.png" for number in range(3 * intake.FILES)]
    for key in keys:
        await put(store, key, picture())
    door = Door(store)
    most, fetch = 0, store.fetch

    async def watched(key: str, path: Path, limit: int | None = None) -> int:
        nonlocal most
        size = await fetch(key, path, limit)
        most = max(most, len(list(path.parent.iterdir())))
        return size

    store.fetch = watched  # type: ignore[method-assign]
    requests = [contracts.VideoRequest.model_validate({**GOOD, "references": [key]}) for key in keys]
    jobs = await asyncio.gather(
        *(door.intake.submit(request, f"j{number}", "default") for number, request in enumerate(requests))
    )
    assert len(jobs) == len(keys)
    assert 1 < most <= intake.FILES


async def test_a_reference_that_was_replaced_is_looked_at_again(door: Door) -> None:
    for number in range(3):
        door.now += intake.JUST_NOW_S
        await door.publish(GOOD | {"job_id": f"j{number}"})
        await door.handle_one()
    door.now += intake.JUST_NOW_S
    await put(door.store, KEY, b"no image")
    await door.publish(GOOD | {"job_id": "j3"})

    assert (await door.handle_one()).status is JobStatus.REJECTED


@pytest.mark.parametrize("looks", [1, 3])
async def test_a_reference_that_is_gone_is_refused_though_it_was_looked_at(door: Door, looks: int) -> None:
    for number in range(looks):
        door.now += intake.JUST_NOW_S
        await door.publish(GOOD | {"job_id": f"j{number}"})
        await door.handle_one()
    door.now += intake.JUST_NOW_S
    await door.store.remove([KEY])
    await door.publish(GOOD | {"job_id": "j3"})

    assert (await door.handle_one()).status is JobStatus.REJECTED


async def test_a_request_becomes_a_job_with_its_first_task_queued(door: Door) -> None:
    await door.publish(GOOD | {"i2v": {"prompt": "zoom"}})
    job = await door.handle_one()

    assert job.status is JobStatus.QUEUED
    assert [record.stage for record in job.stages] == ["edit", "i2v"]
    assert [event.type for event in await door.events(job.id)] == ["accepted"]
    [task] = await door.bus.tail(topology.TASKS, None, 10)
    assert contracts.Task.model_validate_json(task.body).inputs == (KEY,)


async def test_a_job_and_its_deadline_begin_when_its_request_came_however_late_it_is_let_in(door: Door) -> None:
    await door.publish(GOOD | {"deadline_s": 60})
    delivery = await door.take()
    job = await door.intake.handle(delivery)
    assert (job.created_at, job.deadline_at) == (delivery.at, delivery.at + timedelta(seconds=60))


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"{", ["request"]),
        (b"\xff\xfe", ["request"]),
        (b"", ["request"]),
        (b"[" * 5000, ["request"]),
        (b"null", ["request"]),
        (b'"' + b"x" * (200 << 10) + b'"', ["request"]),
        (GOOD | {"colour": "red"}, ["colour"]),
        (GOOD | {"schema_version": 9}, ["schema_version"]),
        (GOOD | {"references": [KEY] * 4}, ["references"]),
        (GOOD | {"references": ["uploads/missing.png"]}, ["references.0"]),
        (GOOD | {"references": ["elsewhere/a.png"]}, ["references.0"]),
        (GOOD | {"references": ["jobs/another/edit-0.png"]}, ["references.0"]),
        (GOOD | {"references": ["/etc/a.png"]}, ["references.0"]),
        (GOOD | {"references": [KEY, "uploads/text.png", "uploads/large.png"]}, ["references.1", "references.2"]),
        (GOOD | {"edit": {"prompt": ""}}, ["edit.prompt"]),
        (GOOD | {"edit": {"prompt": "x" * 4001}}, ["edit.prompt"]),
        (GOOD | {"edit": EDIT | {"seed": -1}}, ["edit.seed"]),
        (GOOD | {"i2v": {"num_frames": 82}}, ["i2v.num_frames"]),
        (
            {"references": ["elsewhere/a.png"], "edit": {"prompt": ""}, "i2v": {"fps": 0}, "x": 1},
            ["edit.prompt", "i2v.fps", "x", "references.0"],
        ),
    ],
)
async def test_what_is_wrong_is_recorded_told_and_kept_and_the_next_request_is_handled(
    door: Door, body: object, fields: list[str]
) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    await door.publish(raw)
    await door.publish(GOOD)

    job = await door.handle_one()
    following = await door.handle_one()

    record = await door.jobs.get(job.id)
    assert record.status is JobStatus.REJECTED
    assert record.error is not None
    assert [error.field for error in record.error.fields] == fields
    [event] = await door.events(job.id)
    assert isinstance(event, contracts.Rejected)
    assert event.errors == record.error.fields
    [letter] = await door.letters()
    assert (letter.job_id, letter.stage, letter.subject) == (job.id, None, topology.SUBJECT_REQUESTS)
    kept = base64.b64decode(letter.payload)
    assert kept == raw or (raw.startswith(kept) and len(kept) > 180_000)
    assert following.status is JobStatus.QUEUED
    assert len(await door.bus.tail(topology.TASKS, None, 10)) == 1


async def test_a_rejection_keeps_the_id_that_the_request_asked_for(door: Door) -> None:
    await door.publish({"job_id": "mine", "references": []})
    assert (await door.handle_one()).id == "mine"


async def test_a_request_with_thousands_of_wrong_fields_still_fits_into_a_message(door: Door) -> None:
    """Once its record and its letter were larger than the bus takes, and it was handed back for ever."""
    await door.publish({f"k{n}": 1 for n in range(9000)})
    job = await door.handle_one()
    [letter] = await door.letters()
    assert len(job.to_bytes()) < 64 << 10
    assert len(letter.to_bytes()) < 262_144


async def test_the_same_job_id_twice_is_one_job(door: Door) -> None:
    await door.publish(GOOD | {"job_id": "mine"})
    await door.publish(GOOD | {"job_id": "mine", "edit": {"prompt": "another"}})
    first, second = await door.handle_one(), await door.handle_one()
    assert first == second
    assert len(await door.bus.tail(topology.TASKS, None, 10)) == 1
    assert [event.type for event in await door.events("mine")] == ["accepted"]


async def test_the_message_id_of_a_client_names_the_job(door: Door) -> None:
    await door.publish(GOOD, message_id="order-7")
    assert (await door.handle_one()).id == id_from_key("order-7")


async def test_a_request_with_no_id_at_all_gets_one_that_tells_when_it_came(door: Door) -> None:
    await door.bus.signal(topology.SUBJECT_REQUESTS, json.dumps(GOOD).encode())
    delivery = await door.take()
    made = uuid.UUID((await door.intake.handle(delivery)).id)
    assert (made.version, made.int >> 80) == (7, int(delivery.at.timestamp() * 1000))


async def test_copies_of_a_request_by_its_message_id_are_one_job_or_one_refusal(door: Door) -> None:
    """The bus keeps them all but for a moment: it would compare the ids of one tenant with those of another."""
    for body, message_id in ((GOOD, "order-7"), (b"{", "order-8")):
        copies = []
        for _ in range(3):
            await door.publish(body, message_id=message_id)
            door.bus.forget_ids(topology.REQUESTS)
            copies.append(await door.handle_one())
        assert copies[0] == copies[1] == copies[2]
        assert len(await door.events(copies[0].id)) == 1
    assert len(await door.bus.tail(topology.TASKS, None, 10)) == 1
    assert len(await door.letters()) == 1


async def test_a_request_that_is_delivered_again_is_the_same_job(door: Door) -> None:
    await door.publish(GOOD)
    delivery = await door.take()
    first = await door.intake.handle(delivery)
    await delivery.nak()  # the gateway died before it could ack
    again = await door.take()
    second = await door.intake.handle(again)
    assert again.num_delivered == 2
    assert first == second
    assert len(await door.bus.tail(topology.HISTORY, None, 10)) == 1


async def test_a_rejected_request_that_is_delivered_again_is_told_once(door: Door) -> None:
    await door.publish(b"{")
    delivery = await door.take()
    first = await door.intake.handle(delivery)
    await delivery.nak()
    second = await door.intake.handle(await door.take())
    assert first == second
    assert len(await door.letters()) == 1
    assert len(await door.events(first.id)) == 1


async def test_a_request_that_was_turned_away_is_kept_though_the_gateway_died_before_the_letter(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    await door.publish(GOOD | {"references": ["uploads/nobody-put-it.png"]})
    with monkeypatch.context() as dying:
        dying.setattr(intake.dead, "publish", AsyncMock(side_effect=errors.BusError))
        delivery = await door.take()
        with pytest.raises(errors.BusError):
            await door.intake.handle(delivery)
        await delivery.nak()
    assert await door.letters() == []

    rejected = await door.handle_one()

    [letter] = await door.letters()
    assert (rejected.status, letter.job_id) == (JobStatus.REJECTED, rejected.id)
    assert [error.field for error in letter.error.fields] == ["references.0"]
    assert len(await door.events(rejected.id)) == 1


async def test_an_odd_picture_is_replaced_by_a_plain_copy_of_the_jobs_own(door: Door) -> None:
    await put(door.store, "uploads/cmyk.jpg", picture("JPEG", mode="CMYK"), "image/jpeg")
    await door.publish(GOOD | {"job_id": "mine", "references": [KEY, "uploads/cmyk.jpg"]})
    job = await door.handle_one()
    assert job.inputs == (KEY, "jobs/mine/reference-1.png")
    stat = await door.store.stat("jobs/mine/reference-1.png")
    assert stat is not None
    assert stat.content_type == "image/png"


async def test_no_reference_stays_on_the_gateways_disk_whatever_becomes_of_its_request(door: Door) -> None:
    await put(door.store, "uploads/cmyk.jpg", picture("JPEG", mode="CMYK"), "image/jpeg")
    for key in (KEY, "uploads/cmyk.jpg", "uploads/text.png", "uploads/missing.png"):
        await door.publish(GOOD | {"references": [key]})
        await door.handle_one()

    assert not list(door.intake.scratch.folder().iterdir())


class LostStore(MemoryStore):
    async def fetch(self, *_: Any, **__: Any) -> None:
        raise errors.StoreError


async def test_a_store_out_of_reach_hands_the_request_back_and_rejects_nothing() -> None:
    door = Door(LostStore())
    await door.publish(GOOD)
    delivery = await door.take()
    with pytest.raises(errors.StoreError):
        await door.intake.handle(delivery)
    assert await door.letters() == []
    assert await door.bus.tail(topology.HISTORY, None, 10) == []


def test_a_request_may_have_as_many_bytes_as_are_allowed_and_not_one_more() -> None:
    body = json.dumps(GOOD).encode().ljust(intake.MAX_REQUEST_BYTES)
    assert parse(body).references == (KEY,)
    with pytest.raises(InvalidRequestError, match="larger than"):
        parse(body + b" ")


def test_a_number_too_long_for_python_is_refused_like_any_other_body() -> None:
    with pytest.raises(InvalidRequestError):
        parse(b'{"references":["x"],"edit":{"prompt":"a","seed":' + b"9" * 6000 + b"}}")


async def test_a_second_request_with_a_known_id_leaves_the_references_of_the_first_alone(door: Door) -> None:
    await put(door.store, "uploads/first.png", picture(mode="L"))
    await put(door.store, "uploads/second.png", picture(mode="L", size=(96, 96)))
    await door.publish(GOOD | {"references": ["uploads/first.png"], "job_id": "j1"})
    job = await door.handle_one()
    before = b"".join([chunk async for chunk in door.store.read(job.inputs[0])])
    await door.publish(GOOD | {"references": ["uploads/second.png"], "job_id": "j1"})
    again = await door.handle_one()
    assert again.inputs == job.inputs == ("jobs/j1/reference-0.png",)
    assert b"".join([chunk async for chunk in door.store.read(job.inputs[0])]) == before


async def test_what_a_replica_let_in_by_http_is_not_done_again_when_it_comes_from_the_bus(door: Door) -> None:
    submitted, new = await door.intake.submit(VideoRequest.model_validate(GOOD), "web", "default")
    before = dict(door.bus.calls)

    job = await door.handle_one()

    assert (job, new) == (submitted, True)
    assert {name for name, count in door.bus.calls.items() if count != before.get(name, 0)} == {"pull", "ack"}


async def test_nor_where_other_replicas_take_what_this_one_let_in(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "REMEMBERED", 3)
    for number in range(3):
        await door.intake.submit(VideoRequest.model_validate(GOOD), f"theirs{number}", "default")
        await (await door.take()).ack()
    await door.intake.submit(VideoRequest.model_validate(GOOD), "own", "default")
    before = dict(door.bus.calls)

    await door.handle_one()

    assert {name for name, count in door.bus.calls.items() if count != before.get(name, 0)} == {"pull", "ack"}


async def test_a_request_that_comes_from_the_bus_while_it_is_being_let_in_waits_for_that(door: Door) -> None:
    held = asyncio.Event()
    create = door.jobs.create

    async def slowly(job: Job) -> tuple[Job, bool]:
        await held.wait()
        return await create(job)

    door.jobs.create = slowly  # type: ignore[method-assign]
    submitting = asyncio.create_task(door.intake.submit(VideoRequest.model_validate(GOOD), "web", "default"))
    handling = asyncio.create_task(door.handle_one())
    while not await door.bus.tail(topology.REQUESTS, None, 1):
        await asyncio.sleep(0)
    held.set()

    assert (await handling).id == (await submitting)[0].id == "web"
    assert len(await door.events("web")) == 1


async def test_what_was_let_in_for_one_tenant_is_no_answer_to_another_with_the_same_id() -> None:
    door = await tenants_door()
    await door.intake.submit(VideoRequest.model_validate(OWN), "web", "acme")
    await (await door.take()).ack()
    body = {"references": ["uploads/umbrella/photo.png"], "edit": EDIT, "job_id": "web"}
    await door.publish(body, subject="vidgen.requests.umbrella")
    job = await door.handle_one()
    assert (job.tenant, job.status, job.id == "web") == ("umbrella", JobStatus.REJECTED, False)


async def test_a_request_that_was_published_and_not_let_in_is_let_in_from_the_bus(door: Door) -> None:
    door.bus.fail_next("records.put")  # the record, behind the request
    told, new = await door.intake.submit(VideoRequest.model_validate(GOOD), "web", "default")
    assert (told.id, new) == ("web", True)  # a refusal would have the client ask for a second job

    job = await door.handle_one()

    assert job.id == "web"
    assert [event.type for event in await door.events("web")] == ["accepted"]
    assert await door.bus.tail(topology.TASKS, None, 2) != []


# ── tenants ──────────────────────────────────────────────────────────────────────────────────────────────────────

OWN: dict[str, Any] = {"references": ["uploads/acme/photo.png"], "edit": EDIT}


async def tenants_door(**settings: Any) -> Door:
    door = Door(**settings)
    for key in (KEY, "uploads/acme/photo.png", "uploads/umbrella/photo.png", "jobs/j1/edit-0.png"):
        await put(door.store, key, picture())
    return door


async def test_two_tenants_requests_with_one_message_id_are_two_jobs() -> None:
    door = await tenants_door()
    jobs = []
    for tenant in ("acme", "umbrella"):
        body = GOOD | {"references": [f"uploads/{tenant}/photo.png"]}
        await door.publish(body, message_id="order-7", subject=topology.subject_of_requests(tenant))
        door.bus.forget_ids(topology.REQUESTS)
        jobs.append(await door.handle_one())
    assert [job.tenant for job in jobs] == ["acme", "umbrella"]
    assert jobs[0].id != jobs[1].id


async def test_of_two_tenants_who_were_let_in_with_one_id_neither_waits_for_ever() -> None:
    """While no record could be written neither knew of the other, and both were answered with 202."""
    door = await tenants_door()
    wanted = {
        tenant: VideoRequest.model_validate(GOOD | {"references": [f"uploads/{tenant}/photo.png"]})
        for tenant in ("acme", "umbrella")
    }
    for tenant, request in wanted.items():
        await door.intake.submit(request, f"first-{tenant}", tenant)  # the tenant is known
        await door.handle_one()
    for tenant, request in wanted.items():
        door.bus.fail_next("records.put")
        await door.intake.submit(request, "same", tenant)

    jobs = [await door.handle_one() for _ in range(2)]

    assert [(job.tenant, job.status) for job in jobs] == [
        ("acme", JobStatus.QUEUED), ("umbrella", JobStatus.REJECTED),
    ]  # fmt: skip


async def test_a_request_belongs_to_the_tenant_on_whose_subject_it_came() -> None:
    door = await tenants_door()
    await door.publish(OWN, subject="vidgen.requests.acme")
    job = await door.handle_one()
    assert (job.tenant, job.status) == ("acme", JobStatus.QUEUED)
    [task] = await door.bus.tail(topology.TASKS, None, 10)
    assert task.subject == topology.subject_of_task("edit", "interactive", job.id, "acme")
    assert contracts.Task.model_validate_json(task.body).tenant == "acme"
    assert [one.id for one in (await door.jobs.list(None, None, 10, "acme")).jobs] == [job.id]
    assert (await door.jobs.list(None, None, 10, "umbrella")).jobs == ()
    assert "acme" in await Tenants(door.bus).all()


@pytest.mark.parametrize("reference", [KEY, "uploads/umbrella/photo.png", "jobs/j1/edit-0.png"])
async def test_a_tenants_request_starts_from_its_own_uploads_alone(reference: str) -> None:
    door = await tenants_door()
    await door.publish({**OWN, "references": [reference], "job_id": "j1"}, subject="vidgen.requests.acme")
    job = await door.handle_one()
    assert job.status is JobStatus.REJECTED
    assert job.error is not None
    assert [error.field for error in job.error.fields] == ["references.0"]
    assert "only keys under uploads/acme/" in job.error.fields[0].message  # it is there: that it is not is no reason


async def test_the_operators_requests_may_start_from_all_uploads() -> None:
    door = await tenants_door()
    await door.publish({**OWN, "references": ["uploads/umbrella/photo.png"]})
    assert (await door.handle_one()).status is JobStatus.QUEUED


async def test_the_id_of_another_tenants_job_is_turned_away_under_an_id_of_its_own() -> None:
    door = await tenants_door()
    await door.publish({**OWN, "job_id": "j1"}, subject="vidgen.requests.acme")
    first = await door.handle_one()
    body = {"references": ["uploads/umbrella/photo.png"], "edit": EDIT, "job_id": "j1"}
    await door.publish(body, subject="vidgen.requests.umbrella")

    job = await door.handle_one()

    assert (job.tenant, job.status) == ("umbrella", JobStatus.REJECTED)
    assert job.id != "j1"
    assert job.error is not None
    assert [(error.field, "j1 is taken" in error.message) for error in job.error.fields] == [("job_id", True)]
    assert [event.type for event in await door.events(job.id)] == ["rejected"]
    assert [event.type for event in await door.events("j1")] == ["accepted"]
    assert await door.jobs.find("j1") == first
    [letter] = await door.letters()
    assert (letter.job_id, letter.subject) == (job.id, "vidgen.requests.umbrella")


async def test_what_does_not_validate_says_nothing_in_the_log_of_another_tenants_job() -> None:
    door = await tenants_door()
    await door.publish({**OWN, "job_id": "j1"}, subject="vidgen.requests.acme")
    await door.handle_one()
    await door.publish({"job_id": "j1"}, subject="vidgen.requests.umbrella")
    job = await door.handle_one()
    assert (job.tenant, job.status, job.id == "j1") == ("umbrella", JobStatus.REJECTED, False)
    assert [event.type for event in await door.events("j1")] == ["accepted"]


async def test_the_same_message_id_of_two_tenants_stands_for_two_jobs() -> None:
    assert id_from_key("order-1", "acme") != id_from_key("order-1", "umbrella") != id_from_key("order-1")
    door = await tenants_door()
    jobs = []
    for tenant in ("acme", "umbrella"):
        body = {**OWN, "references": [f"uploads/{tenant}/photo.png"]}
        await door.publish(body, "order-1", f"vidgen.requests.{tenant}")
        jobs.append(await door.handle_one())
        door.bus.forget_ids(topology.REQUESTS)
    assert [(job.id, job.status) for job in jobs] == [
        (id_from_key("order-1", job.tenant), JobStatus.QUEUED) for job in jobs
    ]  # fmt: skip


async def test_a_subject_that_names_no_tenant_is_turned_away() -> None:
    door = await tenants_door()
    await door.publish(OWN, subject="vidgen.requests.ACME")
    job = await door.handle_one()
    assert (job.tenant, job.status) == ("default", JobStatus.REJECTED)
    assert job.error is not None
    assert job.error.fields[0].field == "subject"


async def test_more_jobs_than_a_tenant_may_have_wait_a_moment_and_are_then_turned_away() -> None:
    door = await tenants_door(tenant_jobs=1)
    for job_id in ("j1", "j2"):
        await door.publish({**OWN, "job_id": job_id}, subject="vidgen.requests.acme")
    assert (await door.handle_one()).status is JobStatus.QUEUED
    for _ in range(3):
        await door.finds_no_room()
        door.now += ROOM_S / 3

    job = await door.handle_one()

    assert (job.id, job.status) == ("j2", JobStatus.REJECTED)
    assert [event.type for event in await door.events("j2")] == ["rejected"]
    assert job.error is not None
    assert job.error.fields[0].field == "tenant"


async def test_a_request_that_waited_for_room_is_let_in_once_there_is_some() -> None:
    door = await tenants_door(tenant_jobs=1)
    for job_id in ("j1", "j2"):
        await door.publish({**OWN, "job_id": job_id}, subject="vidgen.requests.acme")
    await door.handle_one()
    await door.finds_no_room()
    await door.jobs.cancel("j1")
    assert (await door.handle_one()).status is JobStatus.QUEUED


async def test_a_request_that_waits_is_not_forgotten_for_those_that_were_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topology, "REQUESTS_UNDER_WAY", 2)
    door = await tenants_door(tenant_jobs=1)
    await door.intake.submit(VideoRequest.model_validate(OWN), "j0", "acme")
    await (await door.take()).ack()
    subject, let_in = "vidgen.requests.acme", {topology.HEADER_LET_IN: "1"}
    await door.bus.publish(subject, json.dumps(OWN).encode(), message_id="waits", headers=let_in)
    for number in range(2):
        await door.publish({**OWN, "job_id": f"j{number + 1}"}, subject=subject)
    taken: dict[int, Delivery] = {}
    while len(taken) < 3:
        delivery = await door.take()
        taken[delivery.seq] = delivery
    waits, *others = (taken[seq] for seq in sorted(taken))

    with pytest.raises(errors.RetryableError):
        await door.intake.handle(waits)
    for other in others:
        with pytest.raises(errors.RetryableError):
            await door.intake.handle(other)
        door.now += ROOM_S
        assert (await door.intake.handle(other)).status is JobStatus.REJECTED
    door.now = LET_IN_S

    assert (await door.intake.handle(waits)).status is JobStatus.REJECTED


async def test_what_a_request_waited_for_the_store_is_no_wait_for_room() -> None:
    """An outage used up its deliveries, and the first meeting with the limit turned it away."""
    door = await tenants_door(tenant_jobs=1)
    await door.publish({**OWN, "job_id": "j2"}, subject="vidgen.requests.acme")
    door.store.down = True
    for _ in range(5):
        delivery = await door.take()
        with pytest.raises(errors.StoreError):
            await door.intake.handle(delivery)
        await delivery.nak()
        door.now += ROOM_S
    door.store.down = False
    delivery = await door.take()
    await door.intake.submit(contracts.VideoRequest.model_validate(OWN), "j1", "acme")
    await door.handle_one()  # what is let in by HTTP comes by here
    await delivery.nak()

    await door.finds_no_room()

    await door.jobs.cancel("j1")
    assert (await door.handle_one()).status is JobStatus.QUEUED


@pytest.mark.parametrize("in_time", [True, False])
async def test_what_was_let_in_while_no_record_could_be_written_is_entered_when_there_is_room(in_time: bool) -> None:
    """It was answered with 202; the tenant's next request took the room, and it was turned away."""
    door = await tenants_door(tenant_jobs=1)
    await door.intake.submit(contracts.VideoRequest.model_validate(OWN), "j0", "acme")  # the tenant is known
    await door.jobs.cancel("j0")
    assert (await door.handle_one()).id == "j0"
    door.bus.fail_next("records.put")
    _, new = await door.intake.submit(contracts.VideoRequest.model_validate(OWN), "j1", "acme")
    assert new
    assert await door.jobs.find("j1") is None
    delivery = await door.take()
    await door.intake.submit(contracts.VideoRequest.model_validate(OWN), "j2", "acme")
    assert (await door.handle_one()).id == "j2"
    await delivery.nak()

    for _ in range(6):
        await door.finds_no_room()
        door.now += ROOM_S

    if in_time:
        await door.jobs.cancel("j2")
    else:
        door.now += LET_IN_S
    job = await door.handle_one()
    assert (job.id, job.status) == ("j1", JobStatus.QUEUED if in_time else JobStatus.REJECTED)
    assert len(await door.letters()) == (not in_time)


async def test_records_and_tasks_of_the_version_before_belong_to_the_operator_and_new_ones_look_the_same() -> None:
    door = await tenants_door()
    await door.publish({**GOOD, "job_id": "j1"})
    job = await door.handle_one()
    [task] = await door.bus.tail(topology.TASKS, None, 10)
    assert b"tenant" not in job.to_bytes()
    assert b"tenant" not in task.body
    assert Job.model_validate_json(job.to_bytes()).tenant == "default"
