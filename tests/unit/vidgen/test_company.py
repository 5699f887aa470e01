"""Who was alone in a process, and that it takes no more than that to tell a task that kills from those beside it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.workbench import task_of

from vidgen import attempts, contracts
from vidgen.company import Company, Place

AT = datetime(2026, 1, 1, tzinfo=UTC)
MAX = 3
PROCESSES = 2
ERROR = contracts.JobError(code="x", message="it broke")


async def test_any_number_are_there_together() -> None:
    company = Company()

    assert all(company.enter(alone=False).granted.done() for _ in range(4))


async def test_who_must_be_alone_waits_for_all_who_are_there_and_all_who_come_wait_for_him() -> None:
    company = Company()
    first, second = company.enter(alone=False), company.enter(alone=False)
    alone, last = company.enter(alone=True), company.enter(alone=False)

    company.leave(first)
    assert not alone.granted.done()
    company.leave(second)
    assert (alone.granted.done(), last.granted.done()) == (True, False)
    company.leave(alone)
    assert last.granted.done()


async def test_who_no_longer_waits_is_in_nobodys_way() -> None:
    company = Company()
    company.enter(alone=False)
    alone, last = company.enter(alone=True), company.enter(alone=False)

    company.leave(alone)

    assert last.granted.done()


# ── killers among sound tasks, in any order ──────────────────────────────────────────────────────────────────────


@dataclass
class Held:
    """A task in a process: pulled and, with a verdict, begun."""

    job: str
    place: Place
    alone: bool
    verdict: attempts.Run | None = None


@dataclass
class Process:
    company: Company = field(default_factory=Company)
    held: list[Held] = field(default_factory=list)


class Killers(RuleBasedStateMachine):
    """Workers take, begin and end tasks in any order; a task that kills may do so whenever it was begun."""

    @initialize(sound=st.integers(0, 6), killers=st.integers(0, 4))
    def begin(self, sound: int, killers: int) -> None:
        self.runner = asyncio.Runner()
        self.killers = {f"k{number}" for number in range(killers)}
        self.queue = [*sorted(self.killers), *(f"s{number}" for number in range(sound))]
        self.newest: dict[str, contracts.AnyEvent] = {}
        self.ended: dict[str, str] = {}
        self.processes = [Process() for _ in range(PROCESSES)]
        self.deaths: Counter[tuple[str, bool]] = Counter()  # that were its own doing, and whether it was alone
        self.faults: Counter[str] = Counter()

    def _judged(self, job: str) -> attempts.Verdict:
        return attempts.judge(task_of(job), self.newest.get(job), MAX)

    def _begun(self) -> list[tuple[Process, Held]]:
        return [(process, held) for process in self.processes for held in process.held if held.verdict is not None]

    def _said(self, held: Held, **more: object) -> dict[str, object]:
        assert held.verdict is not None
        return {
            "job_id": held.job, "at": AT, "stage": "edit", "attempt": held.verdict.attempt, "worker": "w",
            "tries": held.verdict.tries, "alone": held.alone, **more,
        }  # fmt: skip

    def _leave(self, process: Process, held: Held, *, again: bool) -> None:
        process.held.remove(held)
        process.company.leave(held.place)
        if again:
            self.queue.append(held.job)

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), number=st.integers(0, PROCESSES - 1))
    def take(self, data: st.DataObject, number: int) -> None:
        self._take(data.draw(st.sampled_from(self.queue)), self.processes[number])

    def _take(self, job: str, process: Process) -> None:
        self.queue.remove(job)
        verdict = self._judged(job)
        alone = isinstance(verdict, attempts.Run) and verdict.alone

        async def enter() -> Place:
            return process.company.enter(alone=alone)

        process.held.append(Held(job, self.runner.run(enter()), alone))

    @rule()
    def those_who_may_begin(self) -> None:
        for process in self.processes:
            for held in [one for one in process.held if one.verdict is None and one.place.granted.done()]:
                verdict = self._judged(held.job)
                assert isinstance(verdict, attempts.Run)
                if isinstance(verdict, attempts.Exhausted):
                    self.ended[held.job] = "given up"
                    self._leave(process, held, again=False)
                    continue
                held.verdict = verdict
                self.newest[held.job] = contracts.StageStarted.model_validate(self._said(held, engine="e", model="m"))

    @precondition(lambda self: any(held.job in self.killers for _, held in self._begun()))
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        places = self._begun()
        number = data.draw(st.sampled_from([n for n, (_, held) in enumerate(places) if held.job in self.killers]))
        self._kill(*places[number])

    def _kill(self, process: Process, killer: Held) -> None:
        self.deaths[killer.job, killer.alone] += 1
        self.processes[self.processes.index(process)] = Process()
        self.queue += [held.job for held in process.held]

    @precondition(lambda self: self._begun())
    @rule(data=st.data(), how=st.sampled_from(["completed", "failed", "released"]))
    def end(self, data: st.DataObject, how: str) -> None:
        places = self._begun()
        process, held = places[data.draw(st.integers(0, len(places) - 1))]
        assert held.verdict is not None
        if how == "released":
            self.newest[held.job] = contracts.StageReleased.model_validate(
                self._said(held, tries=held.verdict.tries - 1)
            )
            self._leave(process, held, again=True)
        elif held.job not in self.killers and how == "failed":
            self.faults[held.job] += 1
            final = held.verdict.tries >= MAX
            self.newest[held.job] = contracts.StageFailed.model_validate(self._said(held, error=ERROR, final=final))
            self._leave(process, held, again=not final)
            if final:
                self.ended[held.job] = "failed"
        elif held.job not in self.killers:
            self.ended[held.job] = "completed"
            self._leave(process, held, again=False)

    @invariant()
    def who_is_begun_alone_has_no_company(self) -> None:
        for process in self.processes if hasattr(self, "processes") else []:
            begun = [held.alone for held in process.held if held.verdict is not None]
            assert not any(begun) or len(begun) == 1

    @invariant()
    def no_sound_task_pays_for_its_neighbours(self) -> None:
        for job, how in self.ended.items() if hasattr(self, "ended") else []:
            assert (how == "given up") == (job in self.killers)
            assert how != "failed" or self.faults[job] == MAX

    @invariant()
    def a_killer_takes_with_it_one_process_of_others_and_as_many_of_its_own_as_it_has_tries(self) -> None:
        for (job, alone), deaths in self.deaths.items() if hasattr(self, "deaths") else []:
            assert deaths <= (MAX if alone else 1), job

    def teardown(self) -> None:
        """Left to themselves all come to their ends, and the killers to theirs after exactly so many tries."""
        if not hasattr(self, "runner"):
            return
        for _ in range(2 * (MAX + 2) * (len(self.queue) + sum(len(one.held) for one in self.processes) + 1)):
            for number, job in enumerate(list(self.queue)):
                self._take(job, self.processes[number % PROCESSES])
            self.those_who_may_begin()
            places = self._begun()
            killing = next(((process, held) for process, held in places if held.job in self.killers), None)
            if killing is not None:
                self._kill(*killing)
                continue
            for process, held in places:
                self.ended[held.job] = "completed"
                self._leave(process, held, again=False)
        self.runner.close()
        assert self.queue == []
        self.no_sound_task_pays_for_its_neighbours()
        self.a_killer_takes_with_it_one_process_of_others_and_as_many_of_its_own_as_it_has_tries()
        assert {self.ended[job] for job in self.killers} <= {"given up"}
        assert {self.deaths[job, True] for job in self.killers} <= {MAX}


TestKillers = Killers.TestCase
TestKillers.settings = settings(max_examples=100, stateful_step_count=40)
