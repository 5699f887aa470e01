from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.fleet import ALL_STREAMS, Fleet
from vidgen import errors, topology
from vidgen.bus import Bus, Depth, Held, Records
from vidgen.contracts import GpuFigures, WorkerInfo
from vidgen.metrics import GatewayMetrics

NOW = datetime(2026, 1, 2, tzinfo=UTC)
GPU = GpuFigures(index=0, uuid="GPU-a", name="H200", utilization=0.5)


def worker(name: str, **given: Any) -> WorkerInfo:
    fields = {
        "id": name, "stage": "edit", "state": "ready", "engine": "qwen", "model": "m", "device": "cuda", "gpus": (GPU,),
        "version": "1", "host": "h", "started_at": NOW, "at": NOW,
    }  # fmt: skip
    return WorkerInfo(**{**fields, **given})


class Answers:
    """A bus that answers what it is told, breaks, or is silent; it counts how often it was asked."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.waiting = Depth(2, 1, 0, NOW)
        self.error: Exception | None = None
        self.silent = False
        self.asked = 0
        self.consumers: list[str] = []

    async def _answer(self) -> None:
        self.asked += 1
        if self.silent:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error

    def records(self, bucket: str) -> Records:
        assert bucket == topology.WORKERS_BUCKET
        return cast(Records, self)

    async def all(self) -> dict[str, bytes]:
        await self._answer()
        return dict(self.entries)

    async def depth(self, consumer: topology.Consumer) -> Depth:
        await self._answer()
        self.consumers.append(consumer.name)
        return self.waiting

    async def held(self, stream: str) -> Held:
        await self._answer()
        return Held(3, 300, 1000 if stream == topology.TASKS else None)

    def put(self, *workers: WorkerInfo) -> None:
        self.entries |= {f"{info.stage}.{info.id}": info.to_bytes() for info in workers}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def bus() -> Answers:
    return Answers()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(bus: Answers, clock: Clock) -> Fleet:
    return Fleet(cast(Bus, bus), time_limit=60, clock=clock)


def samples(metrics: GatewayMetrics, name: str) -> list[tuple[dict[str, str], float]]:
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return [(s.labels, s.value) for family in families for s in family.samples if s.name == name]


def alive(metrics: GatewayMetrics) -> list[str]:
    return [labels["worker"] for labels, _ in samples(metrics, "vidgen_fleet_gpu_utilization_ratio")]


def up(metrics: GatewayMetrics) -> float:
    return samples(metrics, "vidgen_gateway_bus_up")[0][1]


async def test_workers_are_listed_by_stage_and_id(bus: Answers, fleet: Fleet) -> None:
    bus.put(worker("b"), worker("z", stage="i2v"), worker("a"))

    assert [info.id for info in await fleet.workers()] == ["a", "b", "z"]


@pytest.mark.parametrize(
    "entry", [b"", b"not json", b"\xff", b'{"id": "x"}', worker("x").to_bytes()[:-1] + b',"new":1}']
)
async def test_an_entry_that_cannot_be_read_hides_no_other(entry: bytes, bus: Answers, fleet: Fleet) -> None:
    bus.put(worker("a"), worker("b"))
    bus.entries["edit.aa"] = entry

    assert [info.id for info in await fleet.workers()] == ["a", "b"]


async def test_every_lane_of_every_stage_is_measured(bus: Answers, fleet: Fleet) -> None:
    depths = await fleet.depths()

    assert sorted(set(bus.consumers)) == ["edit-batch", "edit-interactive", "i2v-batch", "i2v-interactive"]
    assert depths["i2v", "batch"] == replace(bus.waiting, pending=2 * bus.waiting.pending)  # what is held, too
    assert len(depths) == 4


async def test_a_scrape_shows_every_consumer_and_every_stream_with_its_limit(bus: Answers, fleet: Fleet) -> None:
    metrics = GatewayMetrics()

    await fleet.refresh(metrics)

    waiting = samples(metrics, "vidgen_consumer_pending_messages")
    assert {(labels["stream"], labels["consumer"]) for labels, _ in waiting} == {
        (consumer.stream, consumer.name) for consumer in topology.CONSUMERS
    }
    held = {labels["stream"]: value for labels, value in samples(metrics, "vidgen_stream_bytes")}
    assert held == dict.fromkeys(ALL_STREAMS, 300)
    assert samples(metrics, "vidgen_stream_limit_bytes") == [({"stream": topology.TASKS}, 1000)]


async def test_reading_the_fleet_says_when_the_bus_is_gone(bus: Answers, fleet: Fleet) -> None:
    bus.error = errors.BusError()

    with pytest.raises(errors.BusError):
        await fleet.workers()
    with pytest.raises(errors.BusError):
        await fleet.depths()


async def test_a_scrape_shows_queues_and_fleet_and_the_dead_vanish(bus: Answers, fleet: Fleet, clock: Clock) -> None:
    metrics = GatewayMetrics()
    bus.put(worker("a"), worker("b"))
    await fleet.refresh(metrics)
    assert alive(metrics) == ["a", "b"]
    assert [value for _, value in samples(metrics, "vidgen_queue_depth")] == [4, 4, 4, 4]  # in the queue and held

    del bus.entries["edit.a"]
    clock.now += 1
    await fleet.refresh(metrics)

    assert alive(metrics) == ["b"]
    assert up(metrics) == 1


async def test_many_scrapers_ask_the_bus_once_a_second(bus: Answers, fleet: Fleet, clock: Clock) -> None:
    metrics = GatewayMetrics()
    await asyncio.gather(*(fleet.refresh(metrics) for _ in range(50)))
    once = bus.asked
    assert once == 1 + len(topology.CONSUMERS) + len(topology.STREAMS) + len(topology.BUCKETS)

    clock.now += 0.9
    await fleet.refresh(metrics)
    assert bus.asked == once

    clock.now += 0.2
    await fleet.refresh(metrics)
    assert bus.asked == 2 * once


@pytest.mark.parametrize("fault", ["broken", "silent"])
async def test_a_bus_that_does_not_answer_leaves_the_last_figures(
    fault: str, bus: Answers, fleet: Fleet, clock: Clock
) -> None:
    metrics = GatewayMetrics()
    bus.put(worker("a"))
    await fleet.refresh(metrics)
    bus.error, bus.silent = errors.BusError(), fault == "silent"

    async with asyncio.timeout(60):
        await Fleet(cast(Bus, bus), time_limit=0.2, clock=clock).refresh(metrics)

    assert up(metrics) == 0
    assert alive(metrics) == ["a"]
    assert samples(metrics, "vidgen_queue_depth")[0][1] == 4


async def test_figures_come_back_with_the_bus(bus: Answers, fleet: Fleet, clock: Clock) -> None:
    metrics = GatewayMetrics()
    bus.error = errors.BusError()
    await fleet.refresh(metrics)
    assert up(metrics) == 0

    bus.error = None
    bus.put(worker("a"))
    clock.now += 1
    await fleet.refresh(metrics)

    assert up(metrics) == 1
    assert alive(metrics) == ["a"]
