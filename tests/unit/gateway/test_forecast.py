"""What a request would take, and where a task is in its queue."""

from __future__ import annotations

from typing import Any

import pytest
from tests.gateways import Gateway, completed, now, started

from gateway import forecast, plan
from gateway.forecast import Known
from vidgen import contracts, topology
from vidgen.bus import Depth
from vidgen.contracts import EditParams, I2VParams, I2VWork, Lane, Stage, StageRecord, Timings, Work
from vidgen.testing import MemoryBus

CLIP = I2VParams(quality="draft", num_frames=81, width=832, height=480)
EMPTY = {(stage, lane): Depth(0, 0, 0, None) for stage in contracts.STAGES for lane in contracts.LANES}


def clip(**given: Any) -> I2VWork:
    return plan.plan_i2v(CLIP.model_copy(update=given), "job")


def edit() -> Work:
    return plan.plan_edit(EditParams(prompt="a hat", quality="draft"), CLIP, "job", (640, 480))


def done(
    work: Work, denoise: float = 4.0, *, engine: str = "wan", dollars: float = 0.0, **phases: float
) -> StageRecord:
    timings = Timings(denoise=denoise, **phases)
    return StageRecord(
        stage=work.kind, state=contracts.StageState.COMPLETED, work=work, engine=engine, timings=timings,
        gpu_seconds=denoise, cost_usd=dollars,
    )  # fmt: skip


def known(*records: StageRecord, workers: int = 1, **queues: tuple[int, int]) -> Known:
    """What is known with `queues` such as `edit_batch=(pending, held)`."""
    depths = dict(EMPTY)
    for name, (pending, held) in queues.items():
        stage, lane = name.split("_")
        depths[stage, lane] = Depth(pending, held, 0, None)  # type: ignore[index]
    engines = frozenset({"wan", "qwen"})
    return Known(records, depths, dict.fromkeys(contracts.STAGES, workers), dict.fromkeys(contracts.STAGES, engines))


def test_work_of_the_same_size_is_expected_to_take_as_long_as_it_did() -> None:
    told = forecast.estimate(
        [clip()], "interactive", known(done(clip(), 8.0, prepare=1, decode=2, encode=0.5, store=0.5))
    )
    (stage,) = told.stages
    assert (stage.basis, stage.steps, stage.seconds_per_step) == ("measured", 4, 2.0)
    assert (stage.seconds, stage.gpu_seconds, stage.wait_s) == (12.0, 10.0, 0.0)
    assert (told.seconds, told.gpu_seconds, told.wait_s) == (12.0, 10.0, 0.0)


@pytest.mark.parametrize(
    ("given", "times"), [({"num_frames": 41}, 41 / 81), ({"width": 1664}, 2.0), ({"guidance_scale": 3.5}, 2.0)]
)
def test_work_of_another_size_is_scaled_and_says_so(given: dict[str, Any], times: float) -> None:
    told = forecast.estimate([clip(**given)], "interactive", known(done(clip(), 8.0)))
    assert told.stages[0].basis == "scaled"
    assert told.seconds == pytest.approx(8.0 * times)


def test_more_steps_take_longer_at_the_same_pace() -> None:
    told = forecast.estimate([clip(steps=40)], "interactive", known(done(clip(), 8.0)))
    assert (told.stages[0].basis, told.seconds) == ("measured", 80.0)


def test_the_nearest_size_counts_and_one_slow_task_does_not() -> None:
    small = [done(clip(num_frames=5), 1000.0) for _ in range(9)]
    same = [done(clip(), seconds) for seconds in (4.0, 4.0, 400.0, 4.0, 4.0)]
    assert forecast.estimate([clip()], "interactive", known(*small, *same)).seconds == 4.0


def test_where_too_few_were_of_the_same_size_it_is_scaled() -> None:
    told = forecast.estimate([clip()], "interactive", known(done(clip(), 8.0), done(clip(width=1664), 16.0)))
    assert (told.stages[0].basis, told.seconds) == ("scaled", 8.0)


def test_candidates_and_guidance_count_for_an_edit() -> None:
    one, four = edit(), edit().model_copy(update={"candidates": 4, "true_cfg_scale": 4.0})
    assert forecast.load_of(four) == 8 * forecast.load_of(one)


def test_what_nothing_is_known_of_is_not_guessed() -> None:
    told = forecast.estimate([edit(), clip()], "interactive", known(done(clip())))
    assert [stage.basis for stage in told.stages] == ["unknown", "measured"]
    assert (told.seconds, told.gpu_seconds, told.cost_usd) == (None, None, None)


def test_what_other_engines_took_does_not_count() -> None:
    told = forecast.estimate([clip()], "interactive", known(done(clip(), engine="preview")))
    assert told.stages[0].basis == "unknown"


def test_the_cost_is_that_of_the_gpu_seconds_and_unknown_without_a_price() -> None:
    free = forecast.estimate([clip()], "interactive", known(done(clip(), 8.0)))
    paid = forecast.estimate([clip(steps=8)], "interactive", known(done(clip(), 8.0, dollars=0.004)))
    assert (free.gpu_seconds, free.cost_usd) == (8.0, None)
    assert paid.cost_usd == pytest.approx(0.008)


def test_without_a_worker_nobody_can_say_when() -> None:
    told = forecast.estimate([clip()], "interactive", known(done(clip()), workers=0))
    assert (told.wait_s, told.seconds) == (None, None)
    assert told.gpu_seconds == 4.0


@pytest.mark.parametrize(
    ("workers", "queues", "wait"),
    [
        (1, {}, 0.0),
        (2, {"i2v_interactive": (0, 1)}, 0.0),  # one is free
        (1, {"i2v_interactive": (0, 1)}, 5.0),  # half of what runs
        (1, {"i2v_interactive": (3, 1)}, 35.0),
        (2, {"i2v_interactive": (4, 2)}, 25.0),
        (1, {"i2v_batch": (9, 0)}, 0.0),  # they give way
    ],
)
def test_the_wait_is_what_comes_first_over_the_workers(workers: int, queues: Any, wait: float) -> None:
    told = forecast.estimate([clip()], "interactive", known(done(clip(), 10.0), workers=workers, **queues))
    assert told.wait_s == wait
    assert told.seconds == wait + 10.0


def test_a_batch_job_waits_for_both_lanes() -> None:
    queues = {"i2v_interactive": (2, 0), "i2v_batch": (3, 0)}
    assert forecast.estimate([clip()], "batch", known(done(clip(), 10.0), **queues)).wait_s == 50.0


def test_the_video_waits_for_those_whose_edit_comes_first() -> None:
    """One is being edited, two wait; each makes a video of 10 s, while an edit takes 2 s."""
    have = known(done(edit(), 2.0, engine="qwen"), done(clip(), 10.0), edit_interactive=(2, 1))
    told = forecast.estimate([edit(), clip()], "interactive", have)
    first, second = told.stages
    assert first.wait_s == 5.0
    assert second.wait_s == 30.0 - 7.0
    assert told.seconds == 40.0


# ── read from the bus ────────────────────────────────────────────────────────────────────────────────────────────


async def hire(gateway: Gateway, stage: Stage = "edit", **given: Any) -> None:
    fields: dict[str, Any] = {
        "id": "w1", "stage": stage, "state": "ready", "engine": "preview", "model": "none", "device": "cpu",
        "version": "1", "host": "h", "started_at": now(), "at": now(),
    }  # fmt: skip
    worker = contracts.WorkerInfo(**fields | given)
    await gateway.parts.bus.records(topology.WORKERS_BUCKET).put(f"{stage}.w1", worker.to_bytes())


async def test_a_stage_that_went_on_elsewhere_does_not_tell_how_long_its_like_takes() -> None:
    # Its timings are those of its last attempt, which may have done two steps of forty.
    gateway = await Gateway.open()
    await hire(gateway)
    timings = Timings(denoise=8.0)
    whole, resumed = await gateway.submit(), await gateway.submit()
    await gateway.tell(completed(whole).model_copy(update={"engine": "preview", "timings": timings}))
    begun = started(resumed)
    given = begun.model_dump(include=set(contracts.StageReleased.model_fields) - {"type"})
    await gateway.tell(contracts.StageReleased.model_validate(given | {"gpu_seconds": 7.0}))
    short = {"engine": "preview", "timings": Timings(denoise=1.0), "attempt": 2}
    await gateway.tell(completed(resumed).model_copy(update=short))
    stages = (await gateway.parts.jobs.get(resumed.id)).stages
    assert not stages[0].in_one_go

    told = await gateway.parts.forecast.estimate([stages[0].work], "interactive")
    assert told.stages[0].seconds_per_step == 8.0 / stages[0].work.steps


async def place(gateway: Gateway, job: contracts.Job) -> contracts.QueuePlace | None:
    return await gateway.parts.forecast.place(await gateway.parts.jobs.get(job.id))


async def work_off(gateway: Gateway, lane: Lane = "interactive") -> None:
    delivery = await gateway.parts.bus.pull(topology.consumer_of("edit", lane), 0)
    assert delivery is not None
    await delivery.ack()


async def test_a_place_counts_down_and_ends_when_the_task_begins() -> None:
    gateway = await Gateway.open()
    await hire(gateway)
    jobs = [await gateway.submit() for _ in range(3)]
    gateway.parts.forecast._known_until = float("inf")  # kept: a place is right although the queue was read before
    assert [(await place(gateway, job)).ahead for job in jobs] == [0, 1, 2]  # type: ignore[union-attr]
    gateway.parts.forecast._known_until = 0
    await work_off(gateway)
    assert (await place(gateway, jobs[2])).ahead == 1  # type: ignore[union-attr]
    await gateway.tell(started(jobs[2]))
    assert await place(gateway, jobs[2]) is None


async def test_who_watches_a_long_queue_asks_where_a_task_lies_once() -> None:
    gateway = await Gateway.open()
    jobs = [await gateway.submit() for _ in range(3)]
    bus, forecast = gateway.parts.bus, gateway.parts.forecast
    assert isinstance(bus, MemoryBus)
    assert (await forecast.place(jobs[2])).ahead == 2  # type: ignore[union-attr]
    before = dict(bus.calls)
    assert (await forecast.place(jobs[2])).ahead == 2  # type: ignore[union-attr]
    assert bus.calls == before
    await work_off(gateway)
    forecast._known_until = 0
    assert (await forecast.place(jobs[2])).ahead == 1  # type: ignore[union-attr]


async def test_who_comes_last_to_a_queue_that_is_longer_than_what_is_kept_in_mind_asks_once_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.forecast.PLACES_KEPT", 2)
    gateway = await Gateway.open()
    jobs = [await gateway.submit() for _ in range(3)]
    bus, forecast = gateway.parts.bus, gateway.parts.forecast
    assert isinstance(bus, MemoryBus)
    for job in jobs:
        await forecast.place(job)
    before = dict(bus.calls)
    assert (await forecast.place(jobs[2])).ahead == 2  # type: ignore[union-attr]
    assert bus.calls == before


async def test_what_lies_between_and_waits_in_other_lanes_is_not_ahead() -> None:
    gateway = await Gateway.open()
    await gateway.submit()
    for _ in range(5):
        await gateway.submit(lane="batch")
    job = await gateway.submit()
    assert (await gateway.parts.forecast.place(job)).ahead == 1  # type: ignore[union-attr]


async def test_a_task_that_was_queued_anew_is_found_where_it_is_now() -> None:
    gateway = await Gateway.open()
    jobs = [await gateway.submit() for _ in range(2)]
    bus, forecast = gateway.parts.bus, gateway.parts.forecast
    assert (await forecast.place(jobs[0])).ahead == 0  # type: ignore[union-attr]
    subject = topology.subject_of_task("edit", "interactive", jobs[0].id)
    task = await bus.last(topology.TASKS, subject)
    assert task is not None
    await work_off(gateway)
    await bus.publish(subject, task.body, message_id="again")
    forecast._known_until = 0
    assert (await forecast.place(jobs[0])).ahead == 1  # type: ignore[union-attr]


async def test_a_batch_job_has_the_interactive_ones_before_it() -> None:
    gateway = await Gateway.open()
    late = await gateway.submit(lane="batch")
    for _ in range(2):
        await gateway.submit()
    found = await place(gateway, late)
    assert found is not None
    assert (found.ahead, found.workers, found.wait_s) == (2, 0, None)


async def test_a_job_that_has_ended_has_no_place() -> None:
    gateway = await Gateway.open()
    job = await gateway.submit()
    await gateway.parts.jobs.cancel(job.id)
    assert await place(gateway, job) is None


async def test_an_estimate_comes_from_the_jobs_that_were_done() -> None:
    gateway = await Gateway.open()
    await hire(gateway)
    asked = {"edit": {"prompt": "a hat"}, "reference_width": 64, "reference_height": 48}
    before = (await gateway.client.post("/v1/estimate", json=asked)).json()
    assert (before["seconds"], before["cost_usd"], before["stages"][0]["basis"]) == (None, None, "unknown")

    job = await gateway.submit()
    await work_off(gateway)
    await gateway.tell(started(job))
    event = completed(job).model_copy(
        update={"timings": Timings(denoise=8.0, decode=1.0), "gpu_seconds": 9.0, "cost_usd": 0.018}
    )
    await gateway.tell(event)
    gateway.parts.forecast._known_until = gateway.parts.forecast._records_until = 0

    after = contracts.Estimate.model_validate((await gateway.client.post("/v1/estimate", json=asked)).json())
    assert after.stages[0].basis == "measured"
    assert (after.seconds, after.gpu_seconds, after.cost_usd) == (9.0, 9.0, pytest.approx(0.018))

    for _ in range(forecast.LOOK_BACK):  # none of the newest is done
        await gateway.submit()
    gateway.parts.forecast._known_until = gateway.parts.forecast._records_until = 0
    rush = contracts.Estimate.model_validate((await gateway.client.post("/v1/estimate", json=asked)).json())
    assert rush.stages[0].seconds == 9.0


@pytest.mark.parametrize(
    ("body", "field"),
    [({}, "request"), ({"i2v": {"num_frames": 6}}, "i2v.num_frames"), ({"i2v": {}, "more": 1}, "more")],
)
async def test_an_estimate_of_what_cannot_be_asked_names_the_field(body: Any, field: str) -> None:
    gateway = await Gateway.open()
    answer = await gateway.client.post("/v1/estimate", json=body)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]


async def test_the_options_are_those_that_a_request_takes() -> None:
    gateway = await Gateway.open(max_upload_bytes=1234)
    found = (await gateway.client.get("/v1/options")).json()
    assert found["limits"]["max_image_bytes"] == 1234
    assert found["qualities"]["draft"]["edit"] == {"steps": 4, "guidance": 1.0}
    for field, presets in (("background", "backgrounds"), ("style", "styles"), ("viewpoint", "viewpoints")):
        for name in found[presets]:
            EditParams.model_validate({"prompt": "a hat", field: name})
