"""Who may do what on the bus: every identity tries everything, on nats-server with the very files under deploy/nats."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import nats.errors
import pytest
from tests import identities as installed
from tests.identities import DeployedNats

from gateway import plan
from gateway.fleet import Fleet
from gateway.orphans import Orphans
from vidgen import bootstrap, contracts, credentials, errors, eventlog, jetstream, permissions, topology
from vidgen.cli import doctor
from vidgen.identities import Identities
from vidgen.jetstream import JetStreamBus
from vidgen.metrics import GatewayMetrics
from vidgen.settings import WorkerSettings

DEPLOY = Path(__file__).parents[2] / "deploy"
EDIT, I2V = {"edit-service", "worker"}, {"i2v-service", "worker"}
WORKERS = EDIT | I2V
GATEWAY, OPERATOR = {"gateway"}, {"operator"}
ACME, DEFAULT = {"publisher.acme"}, {"publisher.default"}
ALL = tuple(sorted(WORKERS | GATEWAY | OPERATOR | ACME | DEFAULT))
NOBODY: set[str] = set()
JS = "$JS.API"
NO = "nobody.may"
BUS = {"nats_url", "nats_nkey_seed"}
VIOLATION = re.compile(r'(?i)permissions violation for (publish|subscription) to "([^"]+)"')

# What may be published, and by whom: also every request to JetStream is a publish.
PUBLISHED: dict[str, set[str]] = {
    # requests, tasks, what happened
    "vidgen.requests": GATEWAY | DEFAULT,
    "vidgen.requests.acme": GATEWAY | ACME,
    "vidgen.requests.another": GATEWAY,
    "vidgen.tasks.edit.interactive.a-job": GATEWAY,
    "vidgen.tasks.i2v.batch.a-job": GATEWAY,
    "vidgen.tasks.i2v.batch.acme.a-job": GATEWAY,
    "vidgen.held.i2v.batch.acme.a-job": GATEWAY,
    "vidgen.events.a-job": GATEWAY | WORKERS,
    "vidgen.progress.a-job": WORKERS,
    "vidgen.control.a-job": GATEWAY,
    "vidgen.usage": GATEWAY,
    "vidgen.workers.edit.w1": GATEWAY | EDIT,
    "vidgen.history.a-job": GATEWAY,
    "vidgen.webhooks.a-job": GATEWAY,
    "vidgen.webhooks.acme.a-job": GATEWAY,
    f"{JS}.DIRECT.GET.VIDGEN_WEBHOOKS": GATEWAY,
    f"{JS}.CONSUMER.MSG.NEXT.VIDGEN_WEBHOOKS.gateway-webhooks": GATEWAY,
    f"{JS}.STREAM.MSG.GET.VIDGEN_WEBHOOKS": GATEWAY,
    "vidgen.dead.requests": GATEWAY,
    "vidgen.dead.edit.a-job": GATEWAY | EDIT,
    "vidgen.dead.i2v.a-job": GATEWAY | I2V,
    # records
    "$KV.vidgen_jobs.a-job": GATEWAY,
    "$KV.vidgen_keys.0123456789ab": GATEWAY | OPERATOR,
    "$KV.vidgen_tenants.acme": GATEWAY | OPERATOR,
    f"{JS}.DIRECT.GET.KV_vidgen_keys.$KV.vidgen_keys.0123456789ab": GATEWAY | OPERATOR,
    f"{JS}.DIRECT.GET.KV_vidgen_tenants.$KV.vidgen_tenants.acme": GATEWAY | OPERATOR,
    "$KV.vidgen_workers.edit.w1": EDIT,
    "$KV.vidgen_workers.i2v.w1": I2V,
    f"{JS}.DIRECT.GET.KV_vidgen_jobs.$KV.vidgen_jobs.a-job": GATEWAY,
    f"{JS}.DIRECT.GET.KV_vidgen_workers.$KV.vidgen_workers.edit.w1": GATEWAY,
    f"{JS}.STREAM.MSG.GET.KV_vidgen_jobs": GATEWAY,
    f"{JS}.STREAM.MSG.GET.KV_vidgen_workers": GATEWAY,
    f"{JS}.STREAM.INFO.KV_vidgen_workers": GATEWAY,
    # tasks are taken and settled by their stage alone; what a dead worker held a gateway hands back
    **{
        f"$JS.ACK.VIDGEN_TASKS.{stage}-{lane}.1.1.1.1790000000000000000.0": GATEWAY | (EDIT if stage == "edit" else I2V)
        for stage in ("edit", "i2v")
        for lane in ("interactive", "batch")
    },
    **{
        subject: EDIT if stage == "edit" else I2V
        for stage in ("edit", "i2v")
        for lane in ("interactive", "batch")
        for subject in (
            f"{JS}.CONSUMER.MSG.NEXT.VIDGEN_TASKS.{stage}-{lane}",
            f"$JS.ACK._.HASH.VIDGEN_TASKS.{stage}-{lane}.1.1.1.1790000000000000000.0.token",
        )
    },
    f"{JS}.CONSUMER.INFO.VIDGEN_TASKS.edit-batch": GATEWAY | EDIT,
    f"{JS}.CONSUMER.INFO.VIDGEN_TASKS.i2v-batch": GATEWAY | I2V,
    # what is the gateways'
    f"{JS}.CONSUMER.MSG.NEXT.VIDGEN_REQUESTS.gateway": GATEWAY,
    f"{JS}.CONSUMER.MSG.NEXT.VIDGEN_EVENTS.gateway": GATEWAY,
    f"{JS}.CONSUMER.MSG.NEXT.VIDGEN_ADVISORIES.gateway": GATEWAY,
    "$JS.ACK.VIDGEN_REQUESTS.gateway.1.1.1.1790000000000000000.0": GATEWAY,
    "$JS.ACK.VIDGEN_EVENTS.gateway.1.1.1.1790000000000000000.0": GATEWAY,
    f"{JS}.CONSUMER.CREATE.VIDGEN_EVENTS": GATEWAY,
    f"{JS}.CONSUMER.DURABLE.CREATE.VIDGEN_EVENTS.gateway": GATEWAY,
    f"{JS}.STREAM.CREATE.VIDGEN_TASKS": GATEWAY,
    f"{JS}.STREAM.UPDATE.VIDGEN_TASKS": GATEWAY,
    f"{JS}.STREAM.INFO.VIDGEN_TASKS": GATEWAY,
    f"{JS}.STREAM.INFO.VIDGEN_REQUESTS": GATEWAY | OPERATOR,
    # messages read and deleted one at a time
    f"{JS}.STREAM.MSG.GET.VIDGEN_EVENTS": GATEWAY | WORKERS,
    f"{JS}.STREAM.MSG.GET.VIDGEN_TASKS": GATEWAY,
    f"{JS}.STREAM.MSG.GET.VIDGEN_REQUESTS": GATEWAY,
    f"{JS}.STREAM.MSG.GET.VIDGEN_DEAD": GATEWAY | OPERATOR,
    f"{JS}.STREAM.MSG.DELETE.VIDGEN_DEAD": GATEWAY | OPERATOR,
    f"{JS}.STREAM.MSG.DELETE.VIDGEN_TASKS": GATEWAY,
    # what a tenant has waiting is counted, held and moved up by gateways
    f"{JS}.DIRECT.GET.VIDGEN_TASKS": GATEWAY,
    f"{JS}.DIRECT.GET.VIDGEN_HELD": GATEWAY,
    f"{JS}.STREAM.MSG.GET.VIDGEN_HELD": GATEWAY,
    f"{JS}.STREAM.MSG.DELETE.VIDGEN_HELD": GATEWAY,
    f"{JS}.CONSUMER.MSG.NEXT.VIDGEN_HELD.edit-batch": NOBODY,
    # nobody's business
    f"{JS}.DIRECT.GET.VIDGEN_REQUESTS": NOBODY,
    f"{JS}.STREAM.MSG.DELETE.VIDGEN_EVENTS": NOBODY,
    f"{JS}.STREAM.MSG.DELETE.VIDGEN_REQUESTS": NOBODY,
    f"{JS}.STREAM.MSG.DELETE.KV_vidgen_jobs": NOBODY,
    **{f"{JS}.STREAM.PURGE.{stream.name}": NOBODY for stream in topology.STREAMS},
    **{f"{JS}.STREAM.DELETE.{stream.name}": NOBODY for stream in topology.STREAMS},
    f"{JS}.STREAM.PURGE.KV_vidgen_jobs": NOBODY,
    f"{JS}.STREAM.DELETE.KV_vidgen_jobs": NOBODY,
    f"{JS}.STREAM.CREATE.SPY": NOBODY,
    f"{JS}.STREAM.LIST": NOBODY,
    f"{JS}.STREAM.NAMES": NOBODY,
    f"{JS}.STREAM.SNAPSHOT.VIDGEN_EVENTS": NOBODY,
    f"{JS}.STREAM.RESTORE.VIDGEN_EVENTS": NOBODY,
    f"{JS}.STREAM.LEADER.STEPDOWN.VIDGEN_EVENTS": NOBODY,
    f"{JS}.CONSUMER.CREATE.VIDGEN_TASKS": NOBODY,
    f"{JS}.CONSUMER.CREATE.VIDGEN_TASKS.spy": NOBODY,
    f"{JS}.CONSUMER.DURABLE.CREATE.VIDGEN_TASKS.spy": NOBODY,
    f"{JS}.CONSUMER.CREATE.VIDGEN_REQUESTS.spy.vidgen.requests.acme": NOBODY,
    f"{JS}.CONSUMER.CREATE.KV_vidgen_jobs": NOBODY,
    f"{JS}.CONSUMER.DELETE.VIDGEN_TASKS.edit-interactive": NOBODY,
    f"{JS}.CONSUMER.DELETE.VIDGEN_EVENTS.gateway": NOBODY,
    f"{JS}.CONSUMER.DELETE.VIDGEN_REQUESTS.gateway": NOBODY,
    f"{JS}.CONSUMER.LIST.VIDGEN_TASKS": NOBODY,
    f"{JS}.CONSUMER.PAUSE.VIDGEN_TASKS.edit-interactive": NOBODY,
    f"{JS}.ACCOUNT.PURGE.VIDGEN": NOBODY,
    f"{JS}.SERVER.REMOVE": NOBODY,
    f"{JS}.INFO": NOBODY,
    "$SYS.REQ.SERVER.PING": NOBODY,
    "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.VIDGEN_TASKS.edit-batch": NOBODY,
    "anything.else": NOBODY,
}
HEARD: dict[str, set[str]] = {
    ">": NOBODY,
    "vidgen.>": NOBODY,
    "vidgen.requests": NOBODY,
    "vidgen.requests.*": NOBODY,
    "vidgen.tasks.>": NOBODY,
    "vidgen.events.*": NOBODY,
    "vidgen.dead.>": NOBODY,
    "vidgen.webhooks.>": NOBODY,
    "vidgen.progress.*": GATEWAY,
    "vidgen.control.*": WORKERS,
    "vidgen.usage": GATEWAY,
    "vidgen.workers.edit.*": EDIT,
    "vidgen.workers.i2v.*": I2V,
    "vidgen.workers.>": NOBODY,
    "$KV.>": NOBODY,
    "$JS.>": NOBODY,
    "$JS.API.>": NOBODY,
    "$JS.ACK.>": NOBODY,
    "$JS.EVENT.ADVISORY.>": NOBODY,
    "$SYS.>": NOBODY,
    "_INBOX.>": NOBODY,
    "*.>": NOBODY,
}


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    return installed.made(tmp_path_factory.mktemp("identities"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, identities: Identities) -> Iterator[DeployedNats]:
    """One for all: what is tried here changes nothing, or is refused."""
    folder = identities.env_file("gateway").parent
    with installed.deployed_nats(tmp_path_factory.mktemp("nats"), folder) as started:

        async def fill() -> None:
            async with installed.connected(started.url, identities, "gateway") as bus:
                await bootstrap.ensure(bus, topology.Topology())

        asyncio.run(fill())
        yield started


def inboxes(identities: Identities) -> dict[str, str]:
    return {one.name: f"{permissions.inbox_of(one.nkeys[0])}.>" for one in identities}


async def tried(
    server: DeployedNats, identities: Identities, name: str, *, publish: list[str], hear: list[str]
) -> set[str]:
    """What an identity was refused of this; the server says so in order, after the last it is asked for a known no."""
    refused: set[tuple[str, str]] = set()
    told = asyncio.Event()

    def heard(text: str) -> None:
        found = VIOLATION.search(text)
        assert found is not None, text
        refused.add((found[1].lower(), found[2].lower()))
        told.set()

    async def until(what: tuple[str, str]) -> None:
        async with asyncio.timeout(installed.BOUND):
            while what not in refused:
                told.clear()
                await told.wait()

    async with installed.connected(server.url, identities, name, on_denied=heard) as bus:
        for subject in [*publish, NO]:
            # Nothing that JetStream could do something with.
            await bus.client.publish(subject, b"?", reply=bus.client.new_inbox())
        await until(("publish", NO))
        for subject in [*hear, NO]:
            await bus.client.subscribe(subject)
        await until(("subscription", NO))
    return {subject for subject in publish if ("publish", subject.lower()) in refused} | {
        subject for subject in hear if ("subscription", subject.lower()) in refused
    }


# ── the files ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_files_say_what_the_topology_needs() -> None:
    found = {
        str(path.relative_to(DEPLOY)): path.read_text("utf-8")
        for folder in ("nats/roles", "s3/policies") for path in (DEPLOY / folder).iterdir()
    }  # fmt: skip
    assert found == permissions.files(), "run: python -m vidgen.permissions deploy"


def test_the_users_are_written_without_a_seed(identities: Identities) -> None:
    folder = identities.env_file("gateway").parent
    seeds = [identities.environment(one.name)["VIDGEN_NATS_NKEY_SEED"] for one in identities]
    text = (folder / "users.conf").read_text() + (folder / "identities.json").read_text()
    assert len(set(seeds)) == len(ALL)
    assert not [seed for seed in seeds if seed in text]
    assert folder.stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.env")} == {0o600}


# ── everybody tries everything ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ALL)
async def test_an_identity_may_do_what_it_must_and_nothing_else(
    server: DeployedNats, identities: Identities, name: str
) -> None:
    own = inboxes(identities)
    hear = {**HEARD, **{subject: {owner} for owner, subject in own.items()}}
    refused = await tried(server, identities, name, publish=list(PUBLISHED), hear=list(hear))
    may = {subject for subject, who in {**PUBLISHED, **hear}.items() if name in who}
    assert {*PUBLISHED, *hear} - refused == may


@pytest.mark.parametrize(
    "options",
    [{}, {"user": "vidgen", "password": "guessed"}, {"nkeys_seed_str": "made up"}],
    ids=["nobody", "a password", "a key that nobody knows"],
)
async def test_strangers_do_not_come_in(server: DeployedNats, options: dict[str, str]) -> None:
    given = {key: credentials.make_seed() if key == "nkeys_seed_str" else value for key, value in options.items()}
    with pytest.raises(errors.BusError, match=r"(?i)authorization"):
        async with jetstream.connect(server.url, "stranger", **given):
            pytest.fail("the bus let a stranger in")


# The server puts the answer to a publish where its sender says, without asking whether the sender may publish there.
SMUGGLED = (
    "vidgen.events.a-victim", "vidgen.tasks.edit.batch.a-victim", "$KV.vidgen_jobs.a-victim", "vidgen.dead.a-victim",
    f"{JS}.STREAM.PURGE.VIDGEN_DEAD", f"{JS}.STREAM.DELETE.VIDGEN_DEAD", f"{JS}.STREAM.MSG.DELETE.VIDGEN_DEAD",
)  # fmt: skip


@pytest.mark.parametrize("tenant", installed.TENANTS)
async def test_a_tenant_cannot_have_the_answer_to_a_request_published_for_it(
    server: DeployedNats, identities: Identities, tenant: str
) -> None:
    async with installed.connected(server.url, identities, "gateway") as gateway:
        await gateway.publish("vidgen.dead.requests", b"kept", message_id=f"kept for {tenant}")
        before = await _held(gateway)
        async with installed.connected(server.url, identities, f"publisher.{tenant}") as publisher:
            for number, reply in enumerate(SMUGGLED):
                body = json.dumps({"n": number}).encode()
                await publisher.client.publish(topology.subject_of_requests(tenant), body, reply=reply)
            # The last one is answered to itself: what was sent before it has been dealt with by then.
            seq = await publisher.publish(topology.subject_of_requests(tenant), b"{}", message_id=f"own {tenant}")
            again = await publisher.publish(topology.subject_of_requests(tenant), b"{}", message_id=f"own {tenant}")
        assert seq == again
        after = await _held(gateway)
    assert after.pop(topology.REQUESTS) == before.pop(topology.REQUESTS) + len(SMUGGLED) + 1
    assert after == before


@pytest.mark.parametrize("name", sorted(WORKERS | OPERATOR))
async def test_nor_can_a_service_have_jetstream_obey_the_answer(
    server: DeployedNats, identities: Identities, name: str
) -> None:
    async with installed.connected(server.url, identities, "gateway") as gateway:
        await gateway.publish("vidgen.dead.requests", b"kept", message_id=f"kept from {name}")
        before = (await gateway.held(topology.DEAD)).messages
        async with installed.connected(server.url, identities, name) as service:
            for number, reply in enumerate(SMUGGLED[-3:]):
                subject = "vidgen.events.a-job" if name in WORKERS else f"{JS}.STREAM.INFO.{topology.DEAD}"
                await service.client.publish(subject, json.dumps({"n": number}).encode(), reply=reply)
            await service.client.flush(timeout=30)
        await gateway.publish("vidgen.events.a-job", b"behind it", message_id=f"behind {name}")
        assert (await gateway.held(topology.DEAD)).messages == before > 0


async def _held(bus: JetStreamBus) -> dict[str, int]:
    names = [*(stream.name for stream in topology.STREAMS), *(f"KV_{one.name}" for one in topology.BUCKETS)]
    return {name: (await bus.held(name)).messages for name in names}


async def test_an_answer_reaches_its_own_inbox_and_nobody_hears_that_of_another(
    server: DeployedNats, identities: Identities
) -> None:
    async with (
        installed.connected(server.url, identities, "edit-service") as edit,
        installed.connected(server.url, identities, "i2v-service") as i2v,
    ):
        with pytest.raises(nats.errors.TimeoutError):
            await i2v.client.request(f"{JS}.CONSUMER.INFO.VIDGEN_TASKS.edit-batch", timeout=0.3)
        await edit.require(topology.consumer_of("edit", "batch"), topology.ACK_WAIT)
        await i2v.require(topology.consumer_of("i2v", "batch"), topology.ACK_WAIT)


@pytest.mark.parametrize("who", ["worker", "gateway"])
async def test_a_worker_answers_one_of_its_stage_or_a_gateway_and_only_in_an_inbox(
    server: DeployedNats, identities: Identities, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Who may answer may do so anywhere: a worker that asks could name a record that it may not write."""
    monkeypatch.setattr(jetstream, "ANSWER_TIMEOUT", installed.BOUND)
    subject = topology.subject_of_worker("edit", "w1")
    async with (
        installed.connected(server.url, identities, "edit-service") as asked,
        installed.connected(server.url, identities, who) as asking,
    ):
        feed = await asked.listen(subject)
        for reply in SMUGGLED:
            await asking.client.publish(subject, b"j1", reply=reply)
            heard = await feed.next(installed.BOUND)
            assert heard is not None
            assert (heard.body, heard.reply) == (b"j1", "")

        answer = asyncio.create_task(asking.ask(subject, b"j1"))
        heard = await feed.next(installed.BOUND)
        assert heard is not None
        await asked.signal(heard.reply, b"at it")
        assert await answer == b"at it"


@pytest.mark.parametrize("name", sorted(WORKERS))
async def test_a_worker_may_look_at_a_run_behind_which_the_end_of_the_one_before_is_told(
    server: DeployedNats, identities: Identities, name: str
) -> None:
    """By another question than it may ask it was denied, and left: one worker after the other, by one such task."""
    denied: list[str] = []
    job, at = f"late-{name}", datetime.now(UTC)
    told = [contracts.RetryRequested(job_id=job, run=2, at=at), contracts.JobCancelled(job_id=job, run=1, at=at)]
    async with installed.connected(server.url, identities, "gateway") as gateway:
        for number, event in enumerate(told):
            subject = topology.subject_of_events(job)
            await gateway.publish(subject, event.to_bytes(), message_id=f"{job}:{number}")
    async with installed.connected(server.url, identities, name, on_denied=denied.append) as worker:
        assert (await eventlog.newest(worker, job, 2)).event == told[0]
        assert await eventlog.current_run(worker, job) == 2
        assert denied == []


NOT_ONE_WORD = ("w.1", "*", ">", "a b", "w\r\nPING")


@pytest.mark.parametrize("name", ["gateway", "edit-service"])
@pytest.mark.parametrize("worker", NOT_ONE_WORD)
async def test_what_a_worker_calls_itself_has_nobody_ask_where_it_may_not(
    server: DeployedNats, identities: Identities, name: str, worker: str
) -> None:
    """One event, or entry, with such a name ended each gateway, and each worker, that wanted to know who is at it."""
    denied: list[str] = []
    job, at = f"called-{NOT_ONE_WORD.index(worker)}-{name}", datetime.now(UTC)
    work = plan.plan_edit(contracts.EditParams(prompt="x"), None, job, (64, 64))
    task = contracts.Task(job_id=job, stage="edit", lane="batch", inputs=("uploads/a.png",), work=work, queued_at=at)
    told = contracts.StageStarted(
        job_id=job, at=at, stage="edit", attempt=1, tries=1, worker="w1", engine="preview", model="none"
    )
    there = contracts.WorkerInfo(
        id="w1",
        stage="edit",
        state="ready",
        engine="preview",
        model="none",
        device="cpu",
        version="1",
        host="rented",
        started_at=at,
        at=at,
    )
    async with installed.connected(server.url, identities, "edit-service") as rented:
        subject = topology.subject_of_events(job)
        await rented.publish(subject, _called(told, "worker", worker), message_id=job)
        await rented.records(topology.WORKERS_BUCKET).put(f"edit.{job}", _called(there, "id", worker))
    async with installed.connected(server.url, identities, name, on_denied=denied.append) as bus:
        with contextlib.suppress(errors.RetryableError):
            await eventlog.claim(bus, task, "w2", 3, engine="preview", model="none", deliveries=2)
        if name == "gateway":
            await Orphans(bus, Fleet(bus), GatewayMetrics(), silence_s=0, lease_s=60).look()
        await bus.listened(topology.subject_of_worker("edit", "w1"))  # the server says no in order
    assert denied == []


def _called(message: contracts.Message, field: str, worker: str) -> bytes:
    return json.dumps(json.loads(message.to_bytes()) | {field: worker}).encode()


async def test_an_answer_that_comes_too_late_is_refused_and_ends_no_worker(
    server: DeployedNats, identities: Identities
) -> None:
    """A worker that stood still for longer than an answer may take woke, answered, and left for want of a right."""
    denied: list[str] = []
    told = asyncio.Event()

    def heard_no(text: str) -> None:
        denied.append(text)
        told.set()

    subject = topology.subject_of_worker("edit", "w2")
    async with (
        installed.connected(server.url, identities, "edit-service", on_denied=heard_no) as asked,
        installed.connected(server.url, identities, "worker") as asking,
    ):
        feed = await asked.listen(subject)
        answer = asyncio.create_task(asking.ask(subject, b"j1"))
        heard = await feed.next(installed.BOUND)
        assert heard is not None
        await asked.signal(heard.reply, b"at it")
        assert await answer == b"at it"
        await asked.signal(heard.reply, b"at it")  # the right to answer is used up, as when its time is over
        await asked.signal(NO, b"?")  # the server says no in order
        async with asyncio.timeout(installed.BOUND):
            await told.wait()
    assert len(denied) == 1
    assert NO in denied[0]


@pytest.mark.parametrize("name", ["edit-service", "operator"])
async def test_the_doctor_says_of_an_identity_that_it_was_let_in(
    server: DeployedNats, identities: Identities, name: str
) -> None:
    own = WorkerSettings.model_validate(installed.settings(server.url, identities, name).model_dump(include=BUS))
    await doctor._ask_bus(own)


# ── keys change ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def own_server(tmp_path: Path) -> AsyncIterator[tuple[DeployedNats, Identities]]:
    identities = installed.made(tmp_path / "identities")
    server = DeployedNats(tmp_path / "nats", tmp_path / "identities" / "users.conf")
    try:
        await server.start()
        yield server, identities
    finally:
        server.process.kill()


async def test_a_key_is_rotated_without_a_moment_in_which_nobody_may_come_in(
    own_server: tuple[DeployedNats, Identities],
) -> None:
    server, identities = own_server
    old = installed.settings(server.url, identities, "worker").nats_options()

    async def lets_in(options: dict[str, object]) -> bool:
        try:
            async with jetstream.connect(server.url, "worker", **options):
                return True
        except errors.BusError:
            return False

    # Given a new key beside the old one, both come in
    identities.rotate("worker")
    new = installed.settings(server.url, identities, "worker").nats_options()
    assert new["nkeys_seed_str"] != old["nkeys_seed_str"]
    await server.reload()
    assert await lets_in(new)
    assert await lets_in(old)

    # When the old one is retired, it does not any more, and the new one still does
    assert identities.retire("worker") == 1
    await server.reload()
    assert not await lets_in(old)
    assert await lets_in(new)

    # And one that is removed comes in no longer, whoever else does
    identities.remove("worker")
    assert not identities.env_file("worker").exists()
    await server.reload()
    assert not await lets_in(new)
    assert await lets_in(installed.settings(server.url, identities, "gateway").nats_options())
