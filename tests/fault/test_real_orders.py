"""Random orders of submit, cancel, retry, approve and kill, on real servers and processes, against the model.

Gateways, workers and the bus are killed between two requests and in the middle of one. All orders of a run are given to
one system, one after another; its books are drawn up at the end.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import httpx
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from tests.fault.ledger import Ledger, patiently
from tests.fault.orders import Answer, Orders, Question, Way
from tests.fault.system import POLL_S, Asked, Lab, System

from vidgen import contracts, errors, topology
from vidgen.contracts import Event, Job, Stage

LEASE = {"VIDGEN_ACK_WAIT": "10"}  # what a dead gateway held comes back when it has run out
WITHIN_S = 90.0  # an order comes to its end, once it is left alone
ANSWER_S = 15.0
AWAY_S = 10.0  # from the restart of the bus until each gateway answers again
LOG_LENGTH = 500

Fate = Literal["worker", "gateway", "bus"]
T = TypeVar("T")


class RealParts:
    """A running system, as the orders see it."""

    def __init__(self, system: System, http: httpx.AsyncClient) -> None:
        self.system, self._http = system, http
        self.made: dict[str, Asked] = {}
        self.kills: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()  # what was asked of gateways, and what they said
        self._doom: tuple[Fate, int, float] | None = None
        self._bus_back = float("-inf")
        self._sent = 0

    def request(self, stages: Sequence[Stage], review: bool) -> tuple[str, bytes]:
        asked, body = self.system.request(stages=stages, review=review)
        self.made[asked.job_id] = asked
        return asked.job_id, body

    async def submit(self, job_id: str, body: bytes, way: Way) -> bool:
        if way == "bus":
            self._sent += 1
            sending = self.system.bus.publish(topology.SUBJECT_REQUESTS, body, message_id=f"{job_id}:{self._sent}")
            try:
                await self._meanwhile(sending)
            except errors.BusError:
                return False
        elif await self._post("", content=body, headers={"Content-Type": "application/json"}, ok=(200, 202)) is None:
            return False
        self.system.asked[job_id] = self.made[job_id]
        return True

    async def ask(self, what: Question, job_id: str) -> Answer:
        answer = await self._post(f"/{job_id}/{what}", ok=(200,), **({"json": {}} if what == "approve" else {}))
        if answer is None or answer.status_code == 200:
            return Job.model_validate_json(answer.content) if answer else None
        return "unknown" if answer.status_code == 404 else "refused"

    async def _post(self, path: str, *, ok: tuple[int, ...], **what: Any) -> httpx.Response | None:
        """The answer; None where there was none, or one that says that nothing is known (503)."""
        gateways = [url for gateway in self.system.of("gateway") if (url := gateway.url)]
        if not gateways:
            return None
        self._sent, of = self._sent + 1, path.rpartition("/")[2] or "submit"
        asking = self._http.post(f"{gateways[self._sent % len(gateways)]}/v1/jobs{path}", **what)
        try:
            answer = await self._meanwhile(asking)
        except httpx.TransportError:
            self.asked[f"{of} unheard"] += 1
            return None
        self.asked[f"{of} {answer.status_code}"] += 1
        assert answer.status_code in (*ok, 503, *((404, 409) if path else ())), answer.text
        away = asyncio.get_running_loop().time() - self._bus_back
        assert answer.status_code != 503 or away < AWAY_S, f"{away:.0f} s behind the bus's restart: {answer.text}"
        return None if answer.status_code == 503 else answer

    async def _meanwhile(self, asking: Coroutine[Any, Any, T]) -> T:
        """Ask, and let what was foreseen happen meanwhile."""
        if self._doom is None:
            return await asking
        (what, which, after), self._doom = self._doom, None

        async def strike() -> None:
            await asyncio.sleep(after)
            await self.kill(what, which)

        striking = asyncio.create_task(strike())
        try:
            return await asking
        finally:
            await striking

    async def doom(self, what: Fate, which: int, after: float) -> None:
        self._doom = what, which, after

    async def kill(self, what: Fate, which: int) -> None:
        self.kills[what] += 1
        if what == "bus":
            await self.system.nats.kill()
            await asyncio.sleep(0.1 * which)
            await self.system.nats.start()
            self._bus_back = asyncio.get_running_loop().time()
        else:
            alive = self.system.of(what)
            await self.system.kill(alive[which % len(alive)])

    async def turn(self) -> None:
        self._doom = None
        await asyncio.sleep(POLL_S)

    async def records(self, job_ids: Sequence[str]) -> dict[str, Job]:
        bucket = self.system.bus.records(topology.JOBS_BUCKET)
        found = await asyncio.gather(*(patiently(lambda job_id=job_id: bucket.get(job_id)) for job_id in job_ids))
        jobs = {job.id: job for one in found if one for job in [Job.model_validate_json(one[0])]}
        # What nobody acknowledged may have been taken all the same.
        self.system.asked.update((job_id, self.made[job_id]) for job_id in jobs)
        return jobs

    async def log(self, job_id: str) -> list[contracts.AnyEvent]:
        subject = topology.subject_of_events(job_id)
        newest_first = await patiently(lambda: self.system.bus.tail(topology.EVENTS, None, LOG_LENGTH, subject))
        return [Event.validate_json(stored.body) for stored in reversed(newest_first)]

    async def left(self) -> dict[str, int]:
        return await patiently(Ledger(self.system).left)


class OnRealParts(Orders):
    """Time passes by itself."""

    floor: RealParts
    turns = round(WITHIN_S / POLL_S)

    def __init__(self, floor: RealParts, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        super().__init__(floor)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @rule(seconds=st.sampled_from([0.05, 0.2, 0.5]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule(what=st.sampled_from(["bus", "gateway", "worker"]), which=st.integers(0, 3), after=st.floats(0, 0.05))
    def a_kill_while_somebody_asks(self, what: Fate, which: int, after: float) -> None:
        self.blows += what == "worker"
        self.run(self.floor.doom(what, which, after))


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))


async def campaign(lab: Lab, *, orders: int, steps: int = 30) -> str:
    """Some of them, one after another on one system; they are drawn in a thread, for hypothesis does not await."""
    wanted = settings(
        max_examples=orders, stateful_step_count=steps, deadline=None, database=None, derandomize=False,
        # A shorter order that fails would be another run of everything, and another draw of what the machine does.
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    async with (
        lab.system(gateways=2, workers=2, env=LEASE, pace_s=0.03) as system,
        httpx.AsyncClient(timeout=ANSWER_S) as http,
    ):
        floor, loop = RealParts(system, http), asyncio.get_running_loop()
        await asyncio.to_thread(
            run_state_machine_as_test, seed(lab.seed)(lambda: OnRealParts(floor, loop)), settings=wanted
        )
        ends = await Ledger(system, counters=False).audit()
        return (
            f"{orders} random orders of {steps} steps: killed {_told(floor.kills)}; asked {_told(floor.asked)}; "
            f"{len(system.asked)} jobs: {_told(ends)}"
        )


async def test_real_parts_do_in_random_orders_what_the_model_allows(lab: Lab) -> None:
    # Of the small seeds the one whose few orders have most of everything in them.
    await campaign(replace(lab, seed=2), orders=5, steps=12)
