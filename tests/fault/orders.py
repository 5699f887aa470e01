"""What users and fate may do in random orders, and the model of what may become of each job: one for every floor.

Left alone, every job ends; each run of it once, as the model allows, and no end is ever taken back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Literal, Protocol, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vidgen import contracts
from vidgen.artifacts import artifact_key
from vidgen.contracts import STAGES, Job, JobStatus, Stage

MAX_ATTEMPTS = 3
RETRYABLE = (JobStatus.FAILED, JobStatus.CANCELLED)
FINAL = (contracts.JobCompleted, contracts.JobFailed, contracts.JobCancelled)
FILES: dict[Stage, str] = {"edit": "edit-0.png", "i2v": "video.mp4"}

Way = Literal["bus", "http"]
Question = Literal["cancel", "retry", "approve"]
Answer = Job | Literal["refused", "unknown"] | None  # None: nobody answered, and it may be done all the same

REQUEST: dict[str, st.SearchStrategy[Any]] = {
    "edit": st.booleans(), "i2v": st.booleans(), "review": st.booleans(), "way": st.sampled_from(["bus", "http"]),
    "copies": st.integers(1, 3),
}  # fmt: skip

T = TypeVar("T")


class Floor(Protocol):
    """Where the orders are carried out."""

    def request(self, stages: Sequence[Stage], review: bool) -> tuple[str, bytes]:
        """A new job's id, and its request as JSON."""
        ...

    async def submit(self, job_id: str, body: bytes, way: Way) -> bool:
        """Send a request; whether it was acknowledged."""
        ...

    async def ask(self, what: Question, job_id: str) -> Answer:
        """Ask it of a gateway."""
        ...

    async def kill(self, what: Literal["worker", "gateway"], which: int) -> None:
        """End one of them where it stands."""
        ...

    async def turn(self) -> None:
        """Let gateways and workers that are well do something."""
        ...

    async def records(self, job_ids: Sequence[str]) -> dict[str, Job]:
        """The records there are."""
        ...

    async def log(self, job_id: str) -> list[contracts.AnyEvent]:
        """The events of a job."""
        ...

    async def left(self) -> dict[str, int]:
        """What is still in a queue, or in somebody's hands."""
        ...


class Orders(RuleBasedStateMachine):
    """The rules that hold anywhere, and the model; a floor adds its own faults."""

    turns = 200  # in which everything must have come to its end

    def __init__(self, floor: Floor) -> None:
        super().__init__()
        self.floor = floor
        self.asked: list[str] = []  # what is drawn must not depend on what happened to fail
        self.bodies: dict[str, bytes] = {}
        self.taken: set[str] = set()  # what was acknowledged
        self.cancels: dict[str, list[tuple[int, int]]] = {}  # from which run to which one it may have met
        self.restless: set[str] = set()  # jobs with a retry that nobody answered: it may be done at any time
        self.runs: dict[str, int] = {}
        self.ends: dict[tuple[str, int], JobStatus] = {}
        self.blows = 0  # what may have ended an attempt without a word

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await something on the floor's own loop."""
        raise NotImplementedError

    # ── what may happen ──────────────────────────────────────────────────────────────────────────────────────────

    @initialize(**REQUEST)  # hypothesis leaves rules out of an order, and might leave out this one
    def begin(self, edit: bool, i2v: bool, review: bool, way: Way, copies: int) -> None:
        self.submit(edit, i2v, review, way, copies)

    @rule(**REQUEST)
    def submit(self, edit: bool, i2v: bool, review: bool, way: Way, copies: int) -> None:
        stages: list[Stage] = [*(["edit"] if edit or not i2v else []), *(["i2v"] if i2v else [])]
        job_id, body = self.floor.request(stages, review and len(stages) == 2)
        self.asked.append(job_id)
        self.bodies[job_id] = body
        for _ in range(copies):
            self._send(job_id, way)

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), way=st.sampled_from(["bus", "http"]))
    def submit_again(self, data: st.DataObject, way: Way) -> None:
        self._send(data.draw(st.sampled_from(self.asked)), way)

    def _send(self, job_id: str, way: Way) -> None:
        if self.run(self.floor.submit(job_id, self.bodies[job_id], way)):
            self.taken.add(job_id)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.run(self._ask("cancel", data.draw(st.sampled_from(self.asked))))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        self.run(self._ask("retry", data.draw(st.sampled_from(self.asked))))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def approve(self, data: st.DataObject) -> None:
        self.run(self._ask("approve", data.draw(st.sampled_from(self.asked))))

    async def _ask(self, what: Question, job_id: str) -> None:
        before = (await self.floor.records([job_id])).get(job_id)
        answer = await self.floor.ask(what, job_id)
        after = (await self.floor.records([job_id])).get(job_id)
        if what == "cancel":
            met = before.run if before else 1
            self.cancels.setdefault(job_id, []).append((met, after.run if after else met))
        if isinstance(answer, Job):
            self._end_of(answer)
            calm = job_id not in self.restless
            match what:
                case "cancel":
                    assert answer.status.final or not calm, f"cancelled, and told that it is {answer.status}"
                case "retry":
                    assert before is None or answer.run > before.run, "a retry that began nothing"
                case "approve":
                    assert answer.approved == 0
        elif answer == "unknown":
            assert before is None, f"{job_id} has a record, and is told to be unknown"
        elif answer == "refused" and before is not None and after is not None and before.run == after.run:
            could = {"retry": RETRYABLE, "approve": (JobStatus.AWAITING_REVIEW,), "cancel": tuple(JobStatus)}[what]
            assert not (before.status in could and after.status in could), f"{what} was refused: {before.status}"
        elif answer is None and what == "retry":
            self.restless.add(job_id)

    @rule(what=st.sampled_from(["worker", "gateway"]), which=st.integers(0, 1))
    def kill(self, what: Literal["worker", "gateway"], which: int) -> None:
        self.blows += what == "worker"
        self.run(self.floor.kill(what, which))

    # ── what must be true at any time ────────────────────────────────────────────────────────────────────────────

    @invariant()
    def nothing_is_taken_back(self) -> None:
        self._compare(self.run(self.floor.records(self.asked)))

    def _compare(self, jobs: dict[str, Job]) -> None:
        for job in jobs.values():
            assert self.runs.get(job.id, 0) <= job.run
            self.runs[job.id] = job.run
            self._end_of(job)

    def _end_of(self, job: Job) -> None:
        if job.status.final:
            known = self.ends.setdefault((job.id, job.run), job.status)
            assert known is job.status, f"{job.id}, run {job.run}: it was {known}, and is {job.status}"

    # ── and in the end ───────────────────────────────────────────────────────────────────────────────────────────

    def teardown(self) -> None:
        self.run(self._left_alone())
        self.run(self._audit())

    async def _left_alone(self) -> None:
        for _ in range(self.turns):
            await self.floor.turn()
            jobs = await self.floor.records(self.asked)
            for job in jobs.values():
                if job.status is JobStatus.AWAITING_REVIEW:
                    await self.floor.ask("approve", job.id)
            ended = self.taken <= jobs.keys() and all(job.status.final for job in jobs.values())
            if ended and not await self.floor.left():
                return
        missing = self.taken - jobs.keys()
        left = await self.floor.left()
        raise AssertionError(f"stuck: {[(job.id, job.status) for job in jobs.values()]}, {missing=}, {left=}")

    async def _audit(self) -> None:
        jobs = await self.floor.records(self.asked)
        self._compare(jobs)
        for job in jobs.values():
            log = await self.floor.log(job.id)
            story = f"{job.id}: {[(e.type, e.run) for e in log]}"
            finals = [event for event in log if isinstance(event, FINAL)]
            assert Counter(event.run for event in finals).most_common(1)[0][1] == 1, story
            assert (finals[-1].type, finals[-1].run) == (job.status.value, job.run), story
            assert sum(isinstance(event, contracts.Accepted) for event in log) == 1, story
            for (of, run), status in self.ends.items():
                told = [event.type for event in finals if event.run == run]
                assert of != job.id or set(told) <= {status.value}, story
            match job.status:
                case JobStatus.CANCELLED:
                    assert any(low <= job.run <= high for low, high in self.cancels.get(job.id, ())), story
                case JobStatus.FAILED:
                    assert self.blows >= MAX_ATTEMPTS, f"{job.error}, {story}"
                case JobStatus.COMPLETED:
                    made = [artifact_key(job.id, FILES[stage]) for stage in STAGES if job.stage_record(stage)]
                    assert [artifact.key for artifact in job.artifacts] == made, story
                case _:
                    raise AssertionError(f"{job.status}: {story}")
