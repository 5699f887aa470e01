"""A job's log and progress as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.gateways import EDIT, Call, Gateway, completed, failed, now, parse_frames, progress, started

from gateway.api import feed as feed_module
from vidgen import contracts, topology
from vidgen.bus import Feed
from vidgen.contracts import Job
from vidgen.testing import MemoryBus

FINISHED = ["accepted", "stage_started", "stage_completed", "completed", "job"]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    opened = await Gateway.open()
    async with opened.client:
        yield opened


async def finished(gateway: Gateway) -> Job:
    job = await gateway.submit()
    await gateway.tell(started(job))
    await gateway.tell(completed(job))
    return await gateway.parts.jobs.get(job.id)


def watch(gateway: Gateway, job: Job, after: int | str | None = None) -> Call:
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    return Call(gateway.app, "GET", f"/v1/jobs/{job.id}/events", headers)


async def test_a_finished_job_is_told_from_the_start_and_ends_with_the_record(gateway: Gateway) -> None:
    job = await finished(gateway)

    answer = await gateway.client.get(f"/v1/jobs/{job.id}/events")

    frames = parse_frames(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [kind for kind, _, _ in frames] == FINISHED
    assert [int(place or 0) for _, place, _ in frames[:-1]] == sorted({int(place or 0) for _, place, _ in frames[:-1]})
    assert frames[-1][1] is None
    assert Job.model_validate(frames[-1][2]) == job


async def test_a_client_goes_on_behind_the_last_event_it_saw(gateway: Gateway) -> None:
    job = await finished(gateway)
    frames = parse_frames((await gateway.client.get(f"/v1/jobs/{job.id}/events")).text)

    for seen in range(len(frames) - 1):
        place = frames[seen][1] or ""
        rest = await gateway.client.get(f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": place})
        assert parse_frames(rest.text) == frames[seen + 1 :]


@pytest.mark.parametrize("place", ["", "abc", "-1", "9" * 30])
async def test_a_place_that_is_none_means_the_start(gateway: Gateway, place: str) -> None:
    job = await finished(gateway)
    answer = await gateway.client.get(f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": place})
    assert [kind for kind, _, _ in parse_frames(answer.text)] == FINISHED


async def test_a_place_beyond_the_log_brings_the_record_alone(gateway: Gateway) -> None:
    job = await finished(gateway)
    answer = await gateway.client.get(f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": "99999"})
    assert [kind for kind, _, _ in parse_frames(answer.text)] == ["job"]


async def test_events_and_progress_come_live_until_the_job_ends(gateway: Gateway) -> None:
    job = await gateway.submit()
    call = watch(gateway, job)
    assert [kind for kind, _, _ in await call.frames(1)] == ["accepted"]

    await gateway.tell(started(job))
    assert [kind for kind, _, _ in await call.frames(1)] == ["stage_started"]
    await gateway.parts.bus.signal(topology.subject_of_progress(job.id), progress(job, 5).to_bytes())
    [(kind, place, data)] = await call.frames(1)
    assert (kind, place, data["step"]) == ("progress", None, 5)

    await gateway.tell(completed(job))
    assert [kind for kind, _, _ in await call.frames(3)] == ["stage_completed", "completed", "job"]
    await call.ended()


async def test_what_a_worker_says_becomes_no_event_of_its_own_making(gateway: Gateway) -> None:
    """Of another version, or with an end of line in it: a feed is lines, and whoever reads it takes each as told."""
    job = await gateway.submit()
    await gateway.tell(started(job))
    forged = b'{}\n\nevent: completed\ndata: {"type": "completed"}'
    bus, subject = gateway.parts.bus, topology.subject_of_progress(job.id)
    await bus.signal(subject, forged)
    call = watch(gateway, job)
    assert [kind for kind, _, _ in await call.frames(2)] == ["accepted", "stage_started"]
    assert (await gateway.client.get(f"/v1/jobs/{job.id}")).json()["status"] == "in_progress"

    await bus.signal(subject, forged)
    await bus.signal(subject, progress(job, 5).to_bytes())
    assert [(kind, data["step"]) for kind, _, data in await call.frames(1)] == [("progress", 5)]

    event = completed(job)
    spread = json.dumps(json.loads(event.to_bytes()), indent=1).encode()
    await bus.publish(topology.subject_of_events(job.id), spread, message_id="spread")
    await gateway.parts.jobs.apply(event)
    [(kind, _, data), *_] = await call.frames(3)
    assert (kind, data["artifacts"][0]["name"]) == ("stage_completed", "edit-0.png")
    await call.ended()


async def test_the_newest_progress_comes_at_once_behind_what_is_replayed(gateway: Gateway) -> None:
    job = await gateway.submit()
    await gateway.tell(started(job))
    for step in (1, 2):
        await gateway.parts.bus.signal(topology.subject_of_progress(job.id), progress(job, step).to_bytes())

    call = watch(gateway, job)
    frames = await call.frames(3)
    assert [kind for kind, _, _ in frames] == ["accepted", "stage_started", "progress"]
    assert frames[-1][2]["step"] == 2
    await call.leave()


async def test_a_retried_job_is_told_past_the_end_of_its_first_run(gateway: Gateway) -> None:
    job = await gateway.submit()
    await gateway.tell(failed(job))
    await gateway.client.post(f"/v1/jobs/{job.id}/retry")
    second = await gateway.parts.jobs.get(job.id)

    call = watch(gateway, job)
    told = [kind for kind, _, _ in await call.frames(4)]
    assert told == ["accepted", "stage_failed", "failed", "retry_requested"]

    await gateway.tell(completed(second, attempt=2))
    frames = await call.frames(3)
    assert [kind for kind, _, _ in frames] == ["stage_completed", "completed", "job"]
    assert frames[-1][2]["run"] == 2
    await call.ended()


async def test_what_a_worker_says_after_the_end_is_told_too(gateway: Gateway) -> None:
    job = await gateway.submit()
    await gateway.tell(started(job))
    await gateway.client.post(f"/v1/jobs/{job.id}/cancel")
    last = contracts.StageCancelled(
        job_id=job.id, at=now(), stage="edit", attempt=1, tries=1, worker="w1", gpu_seconds=2.5
    )
    await gateway.tell(last)

    frames = parse_frames((await gateway.client.get(f"/v1/jobs/{job.id}/events")).text)
    assert [kind for kind, _, _ in frames] == [
        "accepted", "stage_started", "cancel_requested", "cancelled", "stage_cancelled", "job"
    ]  # fmt: skip
    assert frames[-1][2]["gpu_seconds"] == 2.5


@pytest.mark.parametrize("comes", [False, True])
async def test_a_job_whose_last_event_is_owed_ends_with_it_or_in_a_quiet_moment_without(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """A gateway that dies between the record and the event leaves a final record whose event comes later, or never."""
    monkeypatch.setattr(feed_module, "KEEP_ALIVE_S", 5.0 if comes else 0.05)
    job = await finished(gateway)
    bus = gateway.parts.bus
    newest = await bus.last(topology.EVENTS, topology.subject_of_events(job.id))
    assert newest is not None
    await bus.delete(topology.EVENTS, newest.seq)

    call = watch(gateway, job)
    assert [kind for kind, _, _ in await call.frames(3)] == ["accepted", "stage_started", "stage_completed"]
    if comes:
        await bus.publish(newest.subject, newest.body, message_id="owed")
        assert [kind for kind, _, _ in await call.frames(1)] == ["completed"]
    assert [kind for kind, _, _ in await call.frames(1)] == ["job"]


async def test_a_quiet_stream_is_kept_alive(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "KEEP_ALIVE_S", 0.01)
    job = await gateway.submit()
    call = watch(gateway, job)
    await call.frames(1)
    assert (await call.next())["body"] == b": keep-alive\n\n"
    await call.leave()


async def test_streams_end_when_the_process_is_about_to_leave(gateway: Gateway) -> None:
    job = await gateway.submit()
    call = watch(gateway, job)
    await call.frames(1)

    gateway.parts.stopping.set()

    assert (await call.next())["more_body"] is False
    await call.ended()


class CountingBus(MemoryBus):
    """Knows how many feeds are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open_feeds = 0

    async def listen(self, subject: str) -> Feed:
        return self._counted(await super().listen(subject))

    async def follow(self, stream: str, subject: str, after: int = 0) -> Feed:
        return self._counted(await super().follow(stream, subject, after))

    def _counted(self, feed: Feed) -> Feed:
        self.open_feeds += 1
        close = feed.close

        async def closed() -> None:
            self.open_feeds -= 1
            await close()

        feed.close = closed
        return feed


@pytest.mark.parametrize("how", ["the client leaves", "the job ends", "the process leaves"])
async def test_the_feeds_are_closed_when(how: str) -> None:
    bus = CountingBus()
    gateway = await Gateway.open(bus=bus)
    job = await gateway.submit()
    call = watch(gateway, job)
    await call.frames(1)
    assert bus.open_feeds == 2

    if how == "the job ends":
        await gateway.tell(completed(job))
        await call.ended()
    elif how == "the client leaves":
        await call.leave()
    else:
        gateway.parts.stopping.set()
        await call.ended()
    assert bus.open_feeds == 0


async def test_a_video_is_told_through_both_stages(gateway: Gateway) -> None:
    job = await gateway.submit(edit=EDIT, i2v={"prompt": "zoom"})
    call = watch(gateway, job)
    for event in (started(job), completed(job), started(job, "i2v"), completed(job, "i2v", names=("video.mp4",))):
        await gateway.tell(event)

    frames: list[tuple[str, str | None, Any]] = await call.frames(7)
    assert [(kind, data.get("stage")) for kind, _, data in frames[:-1]] == [
        ("accepted", None), ("stage_started", "edit"), ("stage_completed", "edit"), ("stage_started", "i2v"),
        ("stage_completed", "i2v"), ("completed", None),
    ]  # fmt: skip
    assert [one["name"] for one in frames[-1][2]["artifacts"]] == ["edit-0.png", "video.mp4"]


async def test_whoever_asks_for_the_place_hears_of_it_until_the_stage_begins(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "PLACE_S", 0.05)
    first, job = await gateway.submit(), await gateway.submit()
    call = Call(gateway.app, "GET", f"/v1/jobs/{job.id}/events", query="place=true")
    accepted, queued = await call.frames(2)
    assert (accepted[0], queued[0], queued[1]) == ("accepted", "queue", None)
    assert contracts.QueuePlace.model_validate(queued[2]).ahead == 1
    bus = gateway.parts.bus
    assert isinstance(bus, MemoryBus)
    looked = bus.calls["records.latest"]

    await bus.purge(topology.TASKS, topology.subject_of_task("edit", "interactive", first.id))
    await bus.pull(topology.consumer_of("edit", "interactive"), 0)
    ((kind, _, place),) = await call.frames(1)
    assert (kind, place["ahead"]) == ("queue", 0)
    assert bus.calls["records.latest"] == looked  # the job that was found in its queue is known

    await gateway.tell(started(job))
    assert [kind for kind, _, _ in await call.frames(1)] == ["stage_started"]
    await gateway.tell(completed(job))
    assert [kind for kind, _, _ in await call.frames(3)] == ["stage_completed", "completed", "job"]
