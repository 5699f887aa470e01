"""Webhooks: which are demanded, in which order they are delivered, and what becomes of those that nobody takes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpcore
import httpx
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateways import BOUND, DECODERS, EDIT, KEY, Gateway, completed, failed, picture, put, started

from gateway import pipeline, plan
from gateway.intake import Intake
from gateway.receivers import Allowed
from gateway.webhooks import LONGEST_WAIT_S, SHARE, SHORTEST_WAIT_S, TENANTS_SHARE, Places, Webhooks, next_of
from vidgen import contracts, dead, errors, topology, webhooks
from vidgen.bus import Stored
from vidgen.contracts import DeadLetter, Job, JobStatus, Webhook
from vidgen.metrics import GatewayMetrics
from vidgen.testing import FakeClock, MemoryBus, MemoryStore

URL = "https://hooks.example.com/vidgen"
SECRET = webhooks.Secret.parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo=")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Posts:
    """Stands for `Receivers`: what was posted, and the answers that a test gives, by hand where it wants to."""

    allowed = Allowed()

    def __init__(self) -> None:
        self.tried: list[tuple[str, Webhook, dict[str, str]]] = []
        self.answers: dict[str, list[int | errors.VidgenError | asyncio.Future[int]]] = {}
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Posts:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def post(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        webhook = Webhook.model_validate_json(body)
        self.tried.append((url, webhook, headers))
        self._changed.set()
        answers = self.answers.get(webhook.id, [])
        answer = answers.pop(0) if answers else 200
        if isinstance(answer, errors.VidgenError):
            raise answer
        return await answer if isinstance(answer, asyncio.Future) else answer

    async def count(self, wanted: int) -> list[str]:
        """The ids of what was tried, once there are so many."""
        async with asyncio.timeout(BOUND):
            while len(self.tried) < wanted:
                self._changed.clear()
                await self._changed.wait()
        return [webhook.id for _, webhook, _ in self.tried]


class Delivering:
    """Replicas that deliver, on one bus whose time a test moves."""

    def __init__(self, replicas: int = 1, concurrency: int = 3, renew_every: float = 15) -> None:
        self.clock = FakeClock()
        self.bus = MemoryBus(clock=self.clock)
        self.posts = Posts()
        self.metrics = GatewayMetrics()
        self.stop = asyncio.Event()
        self._renew_every = renew_every
        self.running = [asyncio.create_task(self.replica(concurrency).run(self.stop)) for _ in range(replicas)]

    def replica(self, concurrency: int) -> Webhooks:
        return Webhooks(
            self.bus, self.posts, SECRET, self.metrics, give_up_after=86400, concurrency=concurrency,
            renew_every=self._renew_every, clock=self.clock.now,
        )  # fmt: skip

    async def queue(
        self, job_id: str, number: int = 1, url: str = URL, kind: str = "job.completed", tenant: str = "default"
    ) -> str:  # fmt: skip
        request = contracts.VideoRequest(references=("uploads/a.png",), edit=EDIT, webhook_url=url)
        job = Job(id=job_id, tenant=tenant, request=request, created_at=NOW, updated_at=NOW)
        webhook = Webhook(id=f"{job_id}:{number}", type=kind, timestamp=NOW, data=job)
        subject = topology.subject_of_webhook(job_id)
        await self.bus.publish(subject, webhook.to_bytes(), message_id=webhook.id)
        return webhook.id

    async def until(self, condition: Callable[[], bool], advance: float = 0.0) -> None:
        """Let the loops run, and time pass, until something is so."""
        async with asyncio.timeout(BOUND):
            while not condition():
                self.clock.advance(advance)
                await asyncio.sleep(0)

    def waiting(self) -> list[str]:
        return [Webhook.model_validate_json(one.body).id for one in self.bus.messages(topology.WEBHOOKS)]

    def letters(self) -> list[DeadLetter]:
        return [DeadLetter.model_validate_json(one.body) for one in self.bus.messages(topology.DEAD)]

    def counted(self, outcome: str) -> float | None:
        return self.metrics.registry.get_sample_value("vidgen_webhooks_total", {"outcome": outcome})

    async def close(self) -> None:
        self.stop.set()
        self.clock.advance(60)
        await asyncio.gather(*self.running)


@pytest.fixture
async def delivering() -> AsyncIterator[Delivering]:
    made = Delivering()
    yield made
    await made.close()


# ── which webhooks there are ─────────────────────────────────────────────────────────────────────────────────────


async def queued(gateway: Gateway) -> list[Webhook]:
    found = await gateway.parts.bus.tail(topology.WEBHOOKS, None, 100)
    return [Webhook.model_validate_json(one.body) for one in reversed(found)]


@pytest.fixture
async def gateway() -> Gateway:
    gateway = await Gateway.open()
    parts = gateway.parts
    intake = Intake(parts.bus, parts.store, parts.jobs, parts.quotas, 1 << 20, Allowed(), decoders=DECODERS)
    object.__setattr__(parts, "intake", intake)
    return gateway


async def test_each_change_that_matters_is_told_with_the_job_as_the_api_shows_it(gateway: Gateway) -> None:
    job = await gateway.submit(webhook_url=URL, i2v={"prompt": "zoom"}, review=True)
    await gateway.tell(started(job))
    assert await queued(gateway) == []

    await gateway.tell(completed(job))
    awaiting = await gateway.parts.jobs.get(job.id)
    await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 0})
    await gateway.tell(started(job, "i2v"))
    await gateway.tell(completed(job, "i2v", names=["video.mp4"], content_type="video/mp4"))
    done = await gateway.parts.jobs.get(job.id)

    told = await queued(gateway)
    assert [(one.id, one.type) for one in told] == [
        (f"{job.id}:stage_completed:edit", "job.stage_completed"),
        (f"{job.id}:1:awaiting_review", "job.awaiting_review"),
        (f"{job.id}:stage_completed:i2v", "job.stage_completed"),
        (f"{job.id}:1:completed", "job.completed"),
    ]
    assert [one.data for one in told] == [awaiting, awaiting, done, done]
    assert told[-1].timestamp == done.completed_at


async def test_a_failure_and_a_cancel_are_told_once_per_run(gateway: Gateway) -> None:
    job = await gateway.submit(webhook_url=URL)
    await gateway.tell(failed(job))
    again = Job.model_validate_json((await gateway.client.post(f"/v1/jobs/{job.id}/retry")).content)
    await gateway.client.post(f"/v1/jobs/{again.id}/cancel")

    told = [(one.id.removeprefix(job.id), one.data.status) for one in await queued(gateway)]
    assert told == [(":1:failed", JobStatus.FAILED), (":2:cancelled", JobStatus.CANCELLED)]


async def test_a_request_from_the_bus_that_is_turned_away_is_told(gateway: Gateway) -> None:
    body = {"job_id": "bad", "references": ["uploads/none.png"], "edit": EDIT, "webhook_url": URL}
    await gateway.parts.bus.publish(topology.SUBJECT_REQUESTS, json.dumps(body).encode(), message_id="m")
    delivery = await gateway.parts.bus.pull(topology.Consumer(topology.REQUESTS, topology.GATEWAY))
    await gateway.parts.intake.handle(delivery)

    [told] = await queued(gateway)
    assert (told.type, told.id, told.data.status) == ("job.rejected", "bad:1:rejected", JobStatus.REJECTED)
    assert told.data.error.fields[0].field == "references.0"


@pytest.mark.parametrize("receivers", [None, Allowed()])
async def test_a_receiver_that_may_not_be_is_not_told_that_it_was_turned_away(receivers: Allowed | None) -> None:
    gateway = await Gateway.open()
    bus, jobs = gateway.parts.bus, gateway.parts.jobs
    intake = Intake(bus, gateway.parts.store, jobs, gateway.parts.quotas, 1 << 20, receivers, decoders=DECODERS)
    body = {"job_id": "bad", "references": [KEY], "edit": EDIT, "webhook_url": "https://127.0.0.1/"}
    await bus.publish(topology.SUBJECT_REQUESTS, json.dumps(body).encode(), message_id="m")
    job = await intake.handle(await bus.pull(topology.Consumer(topology.REQUESTS, topology.GATEWAY)))

    assert [error.field for error in job.error.fields] == ["webhook_url"]
    assert await queued(gateway) == []


async def test_a_tenant_whose_receiver_is_away_leaves_room_for_the_webhooks_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1,236 jobs with the longest prompts, cancelled within two minutes, filled the stream for a day, for everybody."""
    monkeypatch.setattr("gateway.jobs.WEBHOOKS_ANYWAY", 2)
    small = tuple(
        replace(one, max_bytes=20_000) if one.name == topology.WEBHOOKS else one for one in topology.STREAMS
    )  # fmt: skip
    gateway = await Gateway.open(MemoryBus(topology.Topology(streams=small)))
    jobs = gateway.parts.jobs

    async def cancelled(tenant: str, number: int) -> None:
        request = contracts.VideoRequest(references=(KEY,), edit=EDIT, webhook_url=URL)
        work = plan.plan(request.edit, None, "j", (64, 48))
        job = pipeline.accept(request, f"{tenant}-{number}", [KEY], work, datetime.now(UTC), tenant)
        await jobs.create(job)
        await jobs.cancel(job.id)

    for number in range(20):
        await cancelled("acme", number)
    assert 2 < len(await queued(gateway)) < 20
    for number in range(3):
        await cancelled("default", number)
        await cancelled("umbrella", number)

    told = [one.data.id for one in await queued(gateway)]
    assert [one for one in told if not one.startswith("acme")] == [
        "default-0", "umbrella-0", "default-1", "umbrella-1", "default-2"
    ]  # fmt: skip
    assert (await gateway.parts.bus.held(topology.WEBHOOKS)).bytes < 20_000


async def test_a_job_without_a_receiver_tells_nobody(gateway: Gateway) -> None:
    job = await gateway.submit()
    await gateway.tell(completed(job))

    assert await queued(gateway) == []


async def test_events_that_come_again_are_told_once_and_after_the_bus_has_forgotten_not_again(
    gateway: Gateway,
) -> None:
    job = await gateway.submit(webhook_url=URL, i2v={"prompt": "zoom"})
    event = completed(job)
    for _ in range(3):
        await gateway.parts.jobs.apply(event)
    assert [one.type for one in await queued(gateway)] == ["job.stage_completed"]

    gateway.parts.bus.forget_ids(topology.WEBHOOKS)
    later = started(job, "i2v").model_copy(update={"at": event.at + timedelta(hours=1)})
    await gateway.parts.jobs.apply(later)
    assert len(await queued(gateway)) == 1


async def test_a_gateway_that_died_before_telling_is_made_good_by_the_next_event(gateway: Gateway) -> None:
    job = await gateway.submit(webhook_url=URL)
    bus = gateway.parts.bus
    bus.fail_next("publish")
    with pytest.raises(errors.BusError):
        await gateway.parts.jobs.apply(failed(job))
    assert (await gateway.parts.jobs.get(job.id)).status is JobStatus.FAILED
    assert await queued(gateway) == []

    await gateway.client.post(f"/v1/jobs/{job.id}/retry")

    assert [(one.type, one.data.status) for one in await queued(gateway)] == [("job.failed", JobStatus.FAILED)]


async def test_a_queue_that_is_full_stops_no_job(gateway: Gateway) -> None:
    job = await gateway.submit(webhook_url=URL, i2v={"prompt": "zoom"})
    gateway.parts.bus.limit(topology.WEBHOOKS, 0)
    await gateway.tell(completed(job))
    assert (await gateway.parts.jobs.get(job.id)).stage == "i2v"

    gateway.parts.bus.limit(topology.WEBHOOKS, None)
    await gateway.tell(started(job, "i2v"))

    assert [one.type for one in await queued(gateway)] == ["job.stage_completed"]


@given(st.lists(st.integers(0, 7), max_size=25), st.booleans())
def test_whatever_happens_in_whatever_order_one_end_of_a_run_is_told(order: list[int], review: bool) -> None:
    request = contracts.VideoRequest(
        references=(KEY,), edit=EDIT, i2v={"prompt": "zoom"}, webhook_url=URL, review=review
    )
    work = plan.plan(request.edit, request.i2v, "job", (512, 512))
    job = pipeline.accept(request, "job", [KEY], work, NOW)
    events = [
        started(job), completed(job), failed(job), started(job, "i2v"), completed(job, "i2v", names=["video.mp4"]),
        failed(job, "i2v"), contracts.CancelRequested(job_id="job", at=NOW), contracts.Approved(job_id="job", at=NOW),
    ]  # fmt: skip
    told: dict[str, Webhook] = {}
    for number in order:
        job, commands = pipeline.decide(job, events[number].model_copy(update={"at": NOW}))
        for command in commands:
            if isinstance(command, pipeline.PublishWebhook):
                told.setdefault(command.webhook.id, command.webhook)

    ends = [one for one in told.values() if one.data.status.final and "stage" not in one.type]
    assert [one.type for one in ends] == ([f"job.{job.status}"] if job.status.final else [])
    done = {f"job:stage_completed:{record.stage}" for record in job.stages if record.state == "completed"}
    assert {key for key in told if "stage_completed" in key} == done


# ── who may be told ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://hooks.example.com/", "https://"),
        ("ftp://hooks.example.com/", "https://"),
        ("https://user:pl4nted@hooks.example.com/", "user and password"),
        ("https://pl4nted@hooks.example.com/", "user and password"),
        ("https://hooks.example.com/?token=pl4nted", "behind ?"),
        ("https://hooks.example.com/#pl4nted", "behind ? or #"),
        ("https://hooks.example.com\\@127.0.0.1/", "user and password"),
        ("https://hooks.example.com\\.evil/", "plain URL"),
        ("https://hööks.example.com/", "plain URL"),
        ("https://hooks.example.com/a b", "plain URL"),
        ("https://hooks.example.com/\n", "plain URL"),
        ("https:///path", "plain URL"),
        ("https://hooks.example.com:0/", "plain URL"),
        ("https://hooks.example.com:99999/", "plain URL"),
        ("https://[:::1]/", "plain URL"),
        ("https://[::1/", "plain URL"),
        ("https://127.0.0.1/hook", "public internet"),
        ("https://[::1]:8443/hook", "public internet"),
        ("https://hooks.example.com/" + "a" * 1000, "at most 1000"),
    ],
)
async def test_a_url_that_may_not_be_is_refused_at_the_edge_and_not_repeated(
    gateway: Gateway, url: str, word: str
) -> None:
    answer = await gateway.client.post("/v1/jobs", json={"references": [KEY], "edit": EDIT, "webhook_url": url})

    assert answer.status_code == 422
    [wrong] = answer.json()["errors"]
    assert wrong["field"] == "webhook_url"
    assert word in wrong["message"]
    assert "pl4nted" not in answer.text


@given(st.from_regex(contracts.RECEIVER, fullmatch=True) | st.text().map("https://{}".format))
def test_a_url_that_is_taken_means_the_same_to_every_parser(url: str) -> None:
    try:
        contracts.VideoRequest(references=(KEY,), edit=EDIT, webhook_url=url)
    except pydantic.ValidationError:
        return
    split, read, connected = urlsplit(url), httpx.URL(url), httpcore.URL(url)

    assert split.hostname == read.host.lower() == connected.host.decode().strip("[]").lower()
    assert (split.port or 443) == (read.port or 443) == (connected.port or 443)
    assert (split.username, split.password, split.query, split.fragment) == (None, None, "", "")
    with contextlib.suppress(errors.RejectedError):
        Allowed().check_url(url)


async def test_a_gateway_without_a_secret_takes_no_receivers() -> None:
    gateway = await Gateway.open()

    answer = await gateway.client.post("/v1/jobs", json={"references": [KEY], "edit": EDIT, "webhook_url": URL})

    assert answer.status_code == 422
    assert "VIDGEN_WEBHOOK_SECRET" in answer.json()["errors"][0]["message"]


async def test_credentials_in_a_url_do_not_stay_in_the_dead_letter() -> None:
    bus, store = MemoryBus(), MemoryStore()
    await put(store, KEY, picture())
    gateway = await Gateway.open(bus, store)
    for number, url in enumerate(("https://u:pl4nted@h.example/", "https://h.example/x?a=pl4nted#pl4nted")):
        body = json.dumps({"references": [KEY], "edit": EDIT, "webhook_url": url, "job_id": f"j{number}"})
        escaped = body.replace("/", "\\/") if number else body
        await bus.publish(topology.SUBJECT_REQUESTS, escaped.encode(), message_id=f"m{number}")
        await gateway.parts.intake.handle(await bus.pull(topology.Consumer(topology.REQUESTS, topology.GATEWAY)))

    letters = [DeadLetter.model_validate_json(one.body) for one in bus.messages(topology.DEAD)]
    payloads = [base64.b64decode(letter.payload).decode() for letter in letters]
    assert [letter.error.fields[0].field for letter in letters] == ["webhook_url", "webhook_url"]
    assert all("***" in payload and "pl4nted" not in payload for payload in payloads)
    assert all(json.loads(payload)["edit"] == EDIT for payload in payloads)


# ── delivery ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_delivered_is_signed_for_its_tenant_and_gone(delivering: Delivering) -> None:
    key = await delivering.queue("j1")
    await delivering.posts.count(1)
    await delivering.until(lambda: not delivering.waiting())

    [(url, webhook, headers)] = delivering.posts.tried
    assert (url, webhook.id, headers["webhook-id"]) == (URL, key, key)
    expected = SECRET.of_tenant("default").sign(key, delivering.clock.now(), webhook.to_bytes())
    assert {name: headers[name] for name in expected} == expected
    assert delivering.counted("delivered") == 1
    assert delivering.metrics.registry.get_sample_value("vidgen_webhook_seconds_count") == 1


async def test_a_failure_is_tried_again_under_the_same_id_with_a_signature_of_its_own_time(
    delivering: Delivering,
) -> None:
    delivering.posts.answers["j1:1"] = [500, 302, errors.RetryableError("away", code="webhook_failed"), 204]
    await delivering.queue("j1")
    for tries, moment in enumerate((5, 300, 1800), start=1):
        await delivering.posts.count(tries)
        before = tries
        await delivering.until(lambda before=before: delivering.counted("retried") == before)
        assert len(delivering.posts.tried) == tries
        delivering.clock.advance(moment * 1.1)
    await delivering.until(lambda: not delivering.waiting())

    assert await delivering.posts.count(4) == ["j1:1"] * 4
    assert len({headers["webhook-signature"] for _, _, headers in delivering.posts.tried}) == 4
    assert (delivering.counted("retried"), delivering.counted("delivered")) == (3, 1)
    assert delivering.letters() == []


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_later_webhook_of_a_job_waits_for_the_earlier_one_and_other_jobs_do_not(replicas: int) -> None:
    delivering = Delivering(replicas)
    delivering.posts.answers["j1:1"] = [500, 200]
    for number in (1, 2, 3):
        await delivering.queue("j1", number)
    await delivering.queue("j2")
    await delivering.until(lambda: delivering.waiting() == ["j1:1", "j1:2", "j1:3"], advance=0.01)

    await delivering.until(lambda: not delivering.waiting(), advance=0.5)

    tried = [webhook.id for _, webhook, _ in delivering.posts.tried]
    assert [key for key in tried if key.startswith("j1")] == ["j1:1", "j1:1", "j1:2", "j1:3"]
    await delivering.close()


async def test_a_later_webhook_goes_on_when_the_earlier_one_was_given_up(delivering: Delivering) -> None:
    delivering.posts.answers["j1:1"] = [410]
    await delivering.queue("j1", 1)
    await delivering.queue("j1", 2)
    await delivering.until(lambda: not delivering.waiting(), advance=0.1)

    assert [webhook.id for _, webhook, _ in delivering.posts.tried] == ["j1:1", "j1:2"]
    assert [letter.error.code for letter in delivering.letters()] == ["webhook_gone"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [(410, "webhook_gone"), (errors.RejectedError("inside", code="webhook_refused"), "webhook_refused")],
)
async def test_what_is_of_no_use_to_try_again_becomes_a_dead_letter_at_once(
    delivering: Delivering, answer: Any, code: str
) -> None:
    delivering.posts.answers["j1:1"] = [answer]
    await delivering.queue("j1")
    await delivering.until(lambda: not delivering.waiting())

    [letter] = delivering.letters()
    assert (letter.error.code, letter.job_id, letter.subject) == (code, "j1", topology.subject_of_webhook("j1"))
    assert Webhook.model_validate_json(base64.b64decode(letter.payload)).id == "j1:1"
    assert delivering.counted("given_up") == 1
    lost = delivering.metrics.registry.get_sample_value("vidgen_dead_letters_total", {"stage": "webhook"})
    assert lost == 1


async def test_a_receiver_that_never_takes_it_is_given_up_after_a_day_with_a_dead_letter(
    delivering: Delivering,
) -> None:
    delivering.posts.answers["j1:1"] = [503] * 100
    await delivering.queue("j1")
    for tries in range(1, 10):
        await delivering.until(lambda tries=tries: delivering.counted("retried") == tries)
        delivering.clock.advance(1.1 * webhooks.next_try(delivering.clock.time(), 86400))
    await delivering.until(lambda: not delivering.waiting())

    [letter] = delivering.letters()
    assert letter.error == contracts.JobError(code="webhook_failed", message="the receiver answered 503")
    assert len(delivering.posts.tried) == 10
    assert delivering.counted("retried") == 9


async def test_a_slow_receiver_takes_a_few_places_and_no_more() -> None:
    delivering = Delivering(concurrency=2 * SHARE)
    slow = [asyncio.get_running_loop().create_future() for _ in range(5)]
    for number, answer in enumerate(slow):
        key = await delivering.queue(f"slow{number}", url="https://slow.example/")
        delivering.posts.answers[key] = [answer]
    await delivering.posts.count(2)
    await delivering.queue("quick", url="https://quick.example/")
    await delivering.until(lambda: "quick:1" not in delivering.waiting(), advance=0.05)

    assert len(delivering.posts.tried) == 3
    for answer in slow:
        answer.set_result(200)
    await delivering.until(lambda: not delivering.waiting(), advance=0.5)
    await delivering.close()


async def test_a_tenant_whose_receivers_are_slow_leaves_those_of_others_their_places() -> None:
    """By as many names, or ports, as there were posts at once, one tenant had all of them, and nobody else was told."""
    delivering = Delivering(concurrency=2 * SHARE)
    answers: list[asyncio.Future[int]] = []
    for number in range(3 * SHARE):
        answers.append(asyncio.get_running_loop().create_future())
        key = await delivering.queue(f"slow-{number}", url=f"https://hooks.example:{9000 + number}/", tenant="acme")
        delivering.posts.answers[key] = [answers[-1]]
    await delivering.posts.count(2 * SHARE // TENANTS_SHARE)
    other = await delivering.queue("other", url="https://other.example/", tenant="other")

    await delivering.until(lambda: other not in delivering.waiting(), advance=0.1)

    assert len(delivering.posts.tried) == 2 * SHARE // TENANTS_SHARE + 1
    for answer in answers:
        answer.set_result(200)
    await delivering.until(lambda: not delivering.waiting(), advance=1)
    await delivering.close()


def test_who_finds_no_place_is_strung_out_at_the_pace_of_the_receiver() -> None:
    clock = FakeClock()
    places = Places(2, clock.time)
    assert [places.take("a"), places.take("a"), places.take("b")] == [0, 0, 0]
    for _ in range(40):  # it takes 4 s
        places.leave("a", 4.0)
        assert places.take("a") == 0

    waits = [places.take("a") for _ in range(10)]
    assert waits[:3] == pytest.approx([2, 4, 6], abs=0.1)
    assert waits[-3:] == [LONGEST_WAIT_S] * 3

    for _ in range(2):
        places.leave("a", 0.0)
    clock.advance(LONGEST_WAIT_S)
    assert places.take("a") == 0


def test_who_was_told_to_wait_keeps_his_turn_while_nobody_is_with_the_receiver() -> None:
    places = Places(1, FakeClock().time)
    assert places.take("a") == 0
    last = [places.take("a") for _ in range(5)][-1]
    places.leave("a", 0.1)
    assert places.take("a") == 0
    assert places.take("a") > last


def test_receivers_for_which_others_were_told_to_wait_are_not_kept_in_mind_for_ever() -> None:
    clock = FakeClock()
    places = Places(1, clock.time)
    for number in range(100):
        host = f"{number}.example"
        assert places.take(host) == 0
        assert places.take(host) > 0  # when its turn comes another replica has it
        places.leave(host, 0.1)
        clock.advance(LONGEST_WAIT_S)
    assert len(places._queues) <= 1


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.floats(0, 20)), max_size=60))
def test_a_receiver_never_has_more_than_its_places_and_nobody_waits_for_ever(
    moves: list[tuple[str, bool, float]],
) -> None:
    clock = FakeClock()
    places, busy = Places(3, clock.time), {"a": 0, "b": 0}
    for host, comes, seconds in moves:
        clock.advance(seconds)
        if comes:
            wait = places.take(host)
            assert (wait == 0) == (busy[host] < 3)
            assert wait == 0 or SHORTEST_WAIT_S <= wait <= LONGEST_WAIT_S
            busy[host] += wait == 0
        elif busy[host]:
            places.leave(host, seconds)
            busy[host] -= 1


async def test_a_post_that_takes_long_stays_with_the_replica_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    delivering = Delivering(replicas=2, renew_every=0.01)
    answer = asyncio.get_running_loop().create_future()
    delivering.posts.answers["j1:1"] = [answer]
    renewed = asyncio.Event()
    monkeypatch.setattr("vidgen.testing.bus.MemoryDelivery.in_progress", _telling(renewed))
    await delivering.queue("j1")
    async with asyncio.timeout(BOUND):
        await renewed.wait()
    answer.set_result(200)
    await delivering.until(lambda: not delivering.waiting())

    assert len(delivering.posts.tried) == 1
    await delivering.close()


def _telling(event: asyncio.Event) -> Any:
    async def in_progress(delivery: Any) -> None:
        event.set()

    return in_progress


async def test_a_replica_that_dies_with_a_webhook_leaves_it_to_the_next() -> None:
    delivering = Delivering()
    never = asyncio.get_running_loop().create_future()
    delivering.posts.answers["j1:1"] = [never]
    await delivering.queue("j1")
    await delivering.posts.count(1)
    [dying] = delivering.running
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    await asyncio.sleep(0)
    assert never.cancelled()  # it posts no more

    delivering.running = [asyncio.create_task(delivering.replica(1).run(delivering.stop))]
    await delivering.until(lambda: not delivering.waiting(), advance=10)

    assert await delivering.posts.count(2) == ["j1:1", "j1:1"]
    await delivering.close()


async def test_what_was_taken_as_its_lease_ran_out_is_not_posted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    delivering = Delivering(replicas=0)
    await delivering.queue("j1", 1)
    held = await delivering.bus.pull(topology.GATEWAY_WEBHOOKS, 0)
    assert held is not None
    first = delivering.bus.first

    async def behind_its_ack(stream: str, subject: str) -> Stored | None:
        await held.ack()
        return await first(stream, subject)

    monkeypatch.setattr(delivering.bus, "first", behind_its_ack)
    delivering.clock.advance(600)
    await delivering.queue("j1", 2)
    delivering.running = [asyncio.create_task(delivering.replica(1).run(delivering.stop))]
    await delivering.until(lambda: not delivering.waiting())

    assert await delivering.posts.count(1) == ["j1:2"]
    await delivering.close()


@pytest.mark.parametrize("turns", range(12))
async def test_whoever_is_told_to_stop_as_something_comes_has_it_or_hands_it_back(turns: int) -> None:
    bus, stop = MemoryBus(), asyncio.Event()
    await bus.publish(topology.subject_of_webhook("j1"), b"{}", message_id="j1")
    taking = asyncio.create_task(next_of(bus, topology.GATEWAY_WEBHOOKS, stop))
    for _ in range(turns):
        await asyncio.sleep(0)
    stop.set()
    taken = await taking
    assert (await bus.depth(topology.GATEWAY_WEBHOOKS)).ack_pending == (taken is not None)


async def test_what_is_no_webhook_is_put_away_and_the_next_is_delivered(delivering: Delivering) -> None:
    await delivering.bus.publish(topology.subject_of_webhook("j1"), b"{}", message_id="odd")
    await delivering.queue("j2")
    await delivering.until(lambda: not delivering.bus.messages(topology.WEBHOOKS))

    assert [letter.error.code for letter in delivering.letters()] == ["webhook_unreadable"]
    assert await delivering.posts.count(1) == ["j2:1"]


async def bury(gateway: Gateway, job: Job, body: bytes) -> int:
    error = contracts.JobError(code="webhook_failed", message="x")
    letter = dead.letter(body, topology.subject_of_webhook(job.id), error, job_id=job.id)
    await dead.publish(gateway.parts.bus, letter, message_id="x", subject=topology.DEAD_WEBHOOKS)
    [stored] = await gateway.parts.bus.tail(topology.DEAD, None, 1)
    assert len(stored.body) < 262_144
    return stored.seq


async def test_a_dead_letter_of_a_webhook_is_replayed_as_it_was(gateway: Gateway) -> None:
    job = await gateway.submit(webhook_url=URL)
    await gateway.tell(failed(job))
    [webhook] = await queued(gateway)
    seq = await bury(gateway, job, webhook.to_bytes())

    answer = await gateway.client.post(f"/v1/dead/{seq}/replay")

    assert (answer.status_code, answer.json()["id"]) == (202, job.id)
    assert await queued(gateway) == [webhook, webhook]
    assert (await gateway.client.get("/v1/dead")).json()["dead"] == []


async def test_a_webhook_with_the_longest_prompts_is_replayed_as_it_was(gateway: Gateway) -> None:
    """Its letter was cut at 128 KiB; the replay answered 202, sent JSON without an end, and dropped the letter."""
    long = {"prompt": "\N{GRINNING FACE}" * 4000, "negative_prompt": "\N{GRINNING FACE}" * 4000}
    job = await gateway.submit(webhook_url=URL, edit=long, i2v=long)
    await gateway.tell(failed(job))
    [webhook] = await queued(gateway)
    assert len(webhook.to_bytes()) > 128 << 10
    seq = await bury(gateway, job, webhook.to_bytes())

    assert (await gateway.client.post(f"/v1/dead/{seq}/replay")).status_code == 202

    assert await queued(gateway) == [webhook, webhook]


async def test_a_webhook_of_which_the_beginning_was_kept_is_not_replayed_and_its_letter_stays(gateway: Gateway) -> None:
    job = await gateway.submit(webhook_url=URL)
    seq = await bury(gateway, job, b'{"id":"' + b"x" * (256 << 10) + b'"}')

    answer = await gateway.client.post(f"/v1/dead/{seq}/replay")

    assert (answer.status_code, answer.json()["code"]) == (409, "not_replayable")
    assert "its beginning alone" in answer.json()["detail"]
    assert await queued(gateway) == []
    assert (await gateway.client.get(f"/v1/dead/{seq}")).status_code == 200
