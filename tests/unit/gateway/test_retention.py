"""What is kept in the bucket and how long: by age, and never what somebody still waits for."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import timedelta

import pytest
from tests.gateways import KEY, Gateway, failed, picture

from gateway.retention import Keep, Sweeper
from vidgen import artifacts, errors, topology
from vidgen.artifacts import Stat
from vidgen.contracts import Job, VideoRequest
from vidgen.settings import GatewaySettings, read
from vidgen.testing import FakeClock, MemoryStore

DAY = timedelta(days=1)
KEEP = Keep(uploads=30 * DAY, checkpoints=DAY, artifacts=30 * DAY)
BOUND = 60.0


class Bucket:
    """A gateway whose store says that everything was put at the clock's time, and a sweeper of it."""

    def __init__(self, gateway: Gateway, store: MemoryStore, clock: FakeClock, keep: Keep = KEEP) -> None:
        self.gateway, self.store, self.clock = gateway, store, clock
        parts = gateway.parts
        self.sweeper = Sweeper(parts.bus, store, parts.jobs, keep, parts.metrics, clock.now)

    def put(self, *keys: str) -> None:
        for key in keys:
            self.store.add(key, b"x" * 10)

    def pass_days(self, days: float) -> None:
        self.clock.advance(days * 86400)

    def swept(self, kind: str) -> tuple[float, float]:
        lines = dict(line.rsplit(" ", 1) for line in self.gateway.parts.metrics.render()[0].decode().splitlines())
        name = 'vidgen_swept_{}_total{{kind="' + kind + '"}}'
        return float(lines[name.format("objects")]), float(lines[name.format("bytes")])

    async def ended(self, job: Job) -> None:
        """A job whose edit has failed for good, now by this bucket's clock."""
        await self.gateway.tell(failed(job).model_copy(update={"at": self.clock.now()}))


@pytest.fixture
async def bucket() -> Bucket:
    from tests.gateways import now

    clock = FakeClock(now())
    store = MemoryStore(clock=clock)
    store.add(KEY, picture(), "image/png")
    return Bucket(await Gateway.open(store=store), store, clock)


async def test_what_is_older_than_it_is_kept_goes_and_what_is_younger_stays(bucket: Bucket) -> None:
    bucket.put("uploads/old.png", "checkpoints/gone/edit-1-1.safetensors", "jobs/gone/video.mp4")
    bucket.pass_days(30.5)
    bucket.put("uploads/new.png", "checkpoints/gone/edit-1-2.safetensors", "jobs/other/video.mp4", "elsewhere/old")

    await bucket.sweeper.sweep()

    assert sorted(bucket.store.objects) == [
        "checkpoints/gone/edit-1-2.safetensors", "elsewhere/old", "jobs/other/video.mp4", "uploads/new.png"
    ]  # fmt: skip
    assert bucket.swept("uploads") == (2, 10 + len(picture()))
    assert bucket.swept("checkpoints") == bucket.swept("artifacts") == (1, 10)


async def test_what_the_store_knows_no_time_of_is_kept(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    page = bucket.store.page

    async def timeless(prefix: str, after: str = "", limit: int = 1000) -> list[Stat]:
        return [dataclasses.replace(found, modified=None) for found in await page(prefix, after, limit)]

    monkeypatch.setattr(bucket.store, "page", timeless)
    bucket.put("uploads/old.png", "jobs/gone/video.mp4")
    bucket.pass_days(400)

    await bucket.sweeper.sweep()

    assert set(bucket.store.objects) == {KEY, "uploads/old.png", "jobs/gone/video.mp4"}


async def test_nothing_of_a_job_that_has_not_ended_is_deleted_however_old_it_is(bucket: Bucket) -> None:
    job = await bucket.gateway.submit()
    of_job = [artifacts.artifact_key(job.id, "reference-0.png"), f"checkpoints/{job.id}/edit-1-1.safetensors"]
    bucket.put(*of_job)
    bucket.pass_days(400)

    await bucket.sweeper.sweep()

    assert set(bucket.store.objects) == {KEY, *of_job}


async def test_what_a_job_made_is_kept_from_its_end_on(bucket: Bucket) -> None:
    job = await bucket.gateway.submit()
    made = artifacts.artifact_key(job.id, "edit-0.png")
    bucket.put(made)
    bucket.pass_days(29)
    await bucket.ended(job)
    bucket.pass_days(29)

    await bucket.sweeper.sweep()
    assert made in bucket.store.objects
    bucket.pass_days(2)
    await bucket.sweeper.sweep()

    assert made not in bucket.store.objects


async def test_an_upload_is_kept_while_a_request_or_a_task_names_it(bucket: Bucket) -> None:
    await bucket.gateway.submit()  # its task is queued, and names KEY
    bucket.put("uploads/asked.png", "uploads/free.png")
    asked = VideoRequest.model_validate({"references": ["uploads/asked.png"], "edit": {"prompt": "p"}})
    bus = bucket.gateway.parts.bus
    await bus.publish("vidgen.requests.acme", asked.to_bytes(), message_id="asked")
    await bus.publish(topology.SUBJECT_REQUESTS, b"no request at all", message_id="nothing")
    bucket.pass_days(31)

    await bucket.sweeper.sweep()
    assert set(bucket.store.objects) == {KEY, "uploads/asked.png"}
    assert bucket.swept("uploads") == (1, 10)  # what is kept is not counted
    await bus.purge(topology.TASKS, "vidgen.tasks.>")
    await bus.purge(topology.REQUESTS, "vidgen.requests.>")
    await bus.purge(topology.REQUESTS, topology.SUBJECT_REQUESTS)
    await bucket.sweeper.sweep()

    assert bucket.store.objects == {}


async def test_an_upload_is_kept_while_a_task_that_is_held_back_names_it(bucket: Bucket) -> None:
    bus = bucket.gateway.parts.bus
    await bucket.gateway.submit()
    [task] = await bus.tail(topology.TASKS, None, 9)
    await bus.publish(topology.subject_of_held("edit", "interactive", "held"), task.body, message_id="held")
    await bus.purge(topology.TASKS, "vidgen.tasks.>")
    await bus.purge(topology.REQUESTS, topology.SUBJECT_REQUESTS)
    bucket.pass_days(31)

    await bucket.sweeper.sweep()
    assert set(bucket.store.objects) == {KEY}
    await bus.purge(topology.HELD, "vidgen.held.>")
    await bucket.sweeper.sweep()

    assert bucket.store.objects == {}


async def test_an_image_that_is_sent_again_is_kept_anew(bucket: Bucket) -> None:
    first = await bucket.gateway.post_form([picture("JPEG")], {"edit": {"prompt": "p"}})
    (key,) = first.json()["inputs"]
    stored = bucket.store._stats[key].modified
    assert stored is not None
    bucket.store._stats[key] = bucket.store._stats[key].__class__(key, 1, "image/jpeg", stored - 31 * DAY)

    await bucket.gateway.post_form([picture("JPEG")], {"edit": {"prompt": "p"}})

    again = bucket.store._stats[key].modified
    assert again is not None
    assert again >= stored


async def test_what_is_to_be_kept_for_ever_is_not_looked_at(bucket: Bucket) -> None:
    bucket.put("uploads/old.png", "jobs/gone/video.mp4", "checkpoints/gone/edit-1-1.safetensors")
    bucket.pass_days(4000)
    keeping = Bucket(bucket.gateway, bucket.store, bucket.clock, Keep(checkpoints=DAY))

    await keeping.sweeper.sweep()

    assert set(bucket.store.objects) == {KEY, "uploads/old.png", "jobs/gone/video.mp4"}


async def test_a_bucket_of_many_pages_is_swept_to_its_end(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.retention.PAGE", 3)
    bucket.put(*(f"uploads/{n}.png" for n in range(10)))
    bucket.pass_days(31)
    bucket.put("uploads/0-young.png")

    await bucket.sweeper.sweep()

    assert set(bucket.store.objects) == {"uploads/0-young.png"}


async def test_a_sweep_that_fails_is_made_good_by_the_next_one(bucket: Bucket) -> None:
    bucket.put("uploads/old.png")
    bucket.pass_days(31)
    stop = asyncio.Event()
    bucket.store.fail_next("remove")

    running = asyncio.create_task(bucket.sweeper.run(stop, every_s=0.01))
    async with asyncio.timeout(BOUND):
        while bucket.store.objects:
            await asyncio.sleep(0.01)
    stop.set()
    await running

    assert bucket.swept("uploads")[0] == 2


async def test_a_record_that_cannot_be_read_keeps_what_is_its_own_and_nothing_else(bucket: Bucket) -> None:
    bucket.put("jobs/a-odd/video.mp4", "jobs/b-gone/video.mp4")
    await bucket.gateway.parts.bus.records(topology.JOBS_BUCKET).put("a-odd", b'{"of": "another version"}')
    bucket.pass_days(31)

    await bucket.sweeper.sweep()

    assert set(bucket.store.objects) == {"jobs/a-odd/video.mp4"}


def test_the_ages_come_from_the_settings_and_off_is_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDGEN_KEEP_UPLOADS", "2.5")
    monkeypatch.setenv("VIDGEN_KEEP_ARTIFACTS", "off")

    assert Keep.from_settings(read(GatewaySettings)) == Keep(uploads=2.5 * DAY, checkpoints=DAY, artifacts=None)


@pytest.mark.parametrize("value", ["0", "0.5", "-1", "never"])
def test_an_age_below_a_day_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VIDGEN_KEEP_UPLOADS", value)

    with pytest.raises(errors.FatalError, match="VIDGEN_KEEP_UPLOADS"):
        read(GatewaySettings)
