"""The servers' wall clocks step while jobs run: the bus's by an hour, the store's by less and by more than S3 bears."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.fault import stepped, test_bus_full
from tests.fault.ledger import Ledger
from tests.fault.system import Lab, System

from vidgen import contracts
from vidgen.local import NatsServer, S3Server

HOUR, MINUTE = 3600.0, 60.0
# Renewed each second, by workers who are at their tasks for longer: a step forwards ends it under one who is well.
LEASE = {"VIDGEN_ACK_WAIT": "4"}


@contextlib.asynccontextmanager
async def on_a_clock(server: NatsServer | S3Server, clock: Path) -> AsyncIterator[None]:
    """The server, running by a clock that is ahead by what the file says."""
    if why := stepped.refusal(clock.parent):
        pytest.skip(f"no clock of a server can be stepped here: {why}")
    server.process = stepped.SteppedProcess(server.process, clock)
    await server.start()
    try:
        yield
    finally:
        await server.kill()


async def campaign_of_the_bus(lab: Lab, *, steps: int, jobs: int, kills: int) -> str:
    clock, bus = lab.folder / "clock", NatsServer(lab.folder / "nats", sync_always=False)
    async with on_a_clock(bus, clock), lab.system(workers=4, nats=bus, env=LEASE, pace_s=0.1) as system:
        for step in range(steps):
            await system.submit(jobs * (step + 1) // steps - len(system.asked), steps=30)
            clock.write_text(str(lab.chance.choice((-HOUR, 0.0, HOUR))))
            await asyncio.sleep(lab.chance.uniform(0.1, 0.5))
            if (step + 1) * kills // steps > step * kills // steps:
                await system.kill(lab.chance.choice(system.of("worker")))
        ends = await Ledger(system).audit()
        assert ends == {"completed": jobs}, _ends(system)
        assert not _overtaken(system), _overtaken(system)
        left = sum(
            record.get("event") in ("held_already", "held_elsewhere")
            for child in system.alive + system.dead
            for record in child.records()
        )  # fmt: skip
        told = f"{steps} steps, {kills} workers killed, {left} tasks whose lease ended early left alone"
        return f"{told}, {jobs} jobs: {dict(ends)}"


async def campaign_of_the_store(lab: Lab, *, steps: int, jobs: int, away_s: float) -> str:
    folder, clock = lab.folder / "s3", lab.folder / "clock"
    folder.mkdir()
    store = S3Server(folder)
    async with on_a_clock(store, clock), lab.system(workers=2, s3=store) as system:
        share = max(1, jobs // steps // 2)
        for _ in range(steps):
            clock.write_text(str(lab.chance.choice((-10, 10)) * MINUTE))
            await system.until_ended(await system.submit(share))
            beginning = asyncio.create_task(system.at_work())
            await system.submit(share)
            await beginning
            clock.write_text(str(lab.chance.choice((-20, 20)) * MINUTE))
            # Not the one that was looked at a moment ago: of that nothing is asked of the store.
            told = await test_bus_full.ask(system, 0, "uploads/another.jpg")
            assert (told.status_code, told.json()["code"]) == (503, "store_clock"), told.text
            await asyncio.sleep(away_s)
            clock.write_text("0")
        ends = await Ledger(system).audit()
        assert ends == {"completed": 2 * share * steps}
        assert system.tries() == {1}
        said = [
            record
            for child in system.of("worker")
            for record in child.records()
            if "clock" in record.get("message", "")
        ]
        assert said  # by workers, whose results had to wait
        told = f"{steps} steps within and {steps} beyond what S3 bears, these for {away_s} s"
        return f"{told}, {len(said)} calls that were refused made again: {dict(ends)}"


def _ends(system: System) -> list[str]:
    return [str(event) for event in system.events if isinstance(event, contracts.StageFailed | contracts.JobFailed)]


def _overtaken(system: System) -> list[str]:
    """The attempts that were overtaken while their workers lived: who began, and who began next."""
    dead = {system.id_of(child.name) for child in system.dead}
    begun: dict[tuple[str, str], contracts.StageStarted] = {}
    overtaken = []
    for event in (event for event in system.events if isinstance(event, contracts.StageEvent)):
        before = begun.pop((event.job_id, event.stage), None)
        if isinstance(event, contracts.StageStarted):
            begun[event.job_id, event.stage] = event
            if before is not None and before.worker not in dead:
                overtaken.append(f"{event.job_id} {event.stage}: {before.worker}, at {event.at} by {event.worker}")
    return overtaken


async def test_a_bus_whose_clock_steps_by_an_hour_has_no_task_run_twice(lab: Lab) -> None:
    await campaign_of_the_bus(lab, steps=6, jobs=4, kills=1)


async def test_a_store_whose_clock_is_wrong_is_waited_for_and_its_clock_named(lab: Lab) -> None:
    await campaign_of_the_store(lab, steps=1, jobs=6, away_s=1.5)
