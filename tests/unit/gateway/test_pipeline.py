"""`decide` by properties: any order, duplicates and crashes end in exactly one final state."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway import pipeline, plan
from vidgen import attempts, contracts
from vidgen.contracts import EditParams, I2VParams, Job, JobStatus, StageState, VideoRequest

T0 = datetime(2026, 1, 1, tzinfo=UTC)
ERROR = contracts.JobError(code="x", message="it broke")


def new_job(*, edit: bool = True, i2v: bool = True, review: bool = False, candidates: int = 1) -> Job:
    request = VideoRequest(
        references=("uploads/a.png",),
        edit=EditParams(prompt="make it blue", candidates=candidates) if edit else None,
        i2v=I2VParams(prompt="zoom") if i2v else None,
        review=review,
    )
    work = plan.plan(request.edit, request.i2v, "job", (512, 512))
    return pipeline.accept(request, "job", ["uploads/a.png"], work, T0)


def artifact(name: str) -> contracts.Artifact:
    kind = "image/png" if name.endswith("png") else "video/mp4"
    return contracts.Artifact(name=name, key=f"jobs/job/{name}", content_type=kind, size=1, sha256="0" * 64)


def started(stage: str, attempt: int = 1, run: int = 1, at: datetime = T0) -> contracts.StageStarted:
    return contracts.StageStarted(
        job_id="job", run=run, at=at, stage=stage, attempt=attempt, tries=attempt, worker="w", engine="e", model="m"
    )


def completed(stage: str, attempt: int = 1, run: int = 1, gpu: float = 1.0, count: int = 1) -> contracts.StageCompleted:
    names = [f"edit-{index}.png" for index in range(count)] if stage == "edit" else ["video.mp4"]
    return contracts.StageCompleted(
        job_id="job", run=run, at=T0, stage=stage, attempt=attempt, tries=attempt, worker="w", engine="e", model="m",
        seed=1, artifacts=tuple(map(artifact, names)), gpu_seconds=gpu, cost_usd=gpu / 10,
    )  # fmt: skip


def failed(
    stage: str, attempt: int = 1, run: int = 1, *, final: bool = False, gpu: float = 1.0
) -> contracts.StageFailed:
    return contracts.StageFailed(
        job_id="job", run=run, at=T0, stage=stage, attempt=attempt, tries=attempt, worker="w", error=ERROR,
        final=final, gpu_seconds=gpu,
    )  # fmt: skip


def feed(job: Job, *events: contracts.AnyEvent) -> Job:
    for event in events:
        job, _ = pipeline.decide(job, event)
    return job


# ── the way of a job ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_job_demands_its_first_task() -> None:
    [command] = pipeline.demands(new_job())
    assert isinstance(command, pipeline.PublishTask)
    assert (command.task.stage, command.task.inputs) == ("edit", ("uploads/a.png",))


def test_a_video_without_an_edit_starts_at_i2v() -> None:
    [command] = pipeline.demands(new_job(edit=False))
    assert isinstance(command, pipeline.PublishTask)
    assert (command.task.stage, command.task.inputs) == ("i2v", ("uploads/a.png",))


def test_the_video_starts_from_the_edited_frame() -> None:
    job, commands = pipeline.decide(new_job(), completed("edit"))
    assert job.status is JobStatus.IN_PROGRESS
    assert job.stage == "i2v"
    [command] = commands
    assert isinstance(command, pipeline.PublishTask)
    assert command.task.inputs == ("jobs/job/edit-0.png",)


def test_a_job_is_complete_when_its_last_stage_is() -> None:
    job, commands = pipeline.decide(feed(new_job(), completed("edit")), completed("i2v"))
    assert job.status is JobStatus.COMPLETED
    assert [made.name for made in job.artifacts] == ["edit-0.png", "video.mp4"]
    assert isinstance(commands[0], pipeline.PublishEvent)
    assert isinstance(commands[0].event, contracts.JobCompleted)


def test_a_review_holds_the_video_back_until_a_candidate_is_approved() -> None:
    job, commands = pipeline.decide(new_job(review=True, candidates=3), completed("edit", count=3))
    assert job.status is JobStatus.AWAITING_REVIEW
    assert commands == ()
    job, commands = pipeline.decide(job, contracts.Approved(job_id="job", run=1, at=T0, candidate=2))
    assert job.status is JobStatus.IN_PROGRESS
    assert isinstance(commands[0], pipeline.PublishTask)
    assert commands[0].task.inputs == ("jobs/job/edit-2.png",)


def test_an_older_attempt_may_not_fail_what_a_newer_one_holds() -> None:
    job = feed(new_job(), started("edit", 1), started("edit", 2), failed("edit", 1, final=True))
    assert job.status is JobStatus.IN_PROGRESS
    assert job.stage_record("edit").state is StageState.RUNNING


def test_a_stage_that_was_given_up_tells_when_and_one_that_is_tried_again_does_not() -> None:
    assert feed(new_job(), failed("edit")).stages[0].completed_at is None
    job = feed(new_job(), failed("edit", final=True))
    assert (job.stages[0].completed_at, job.completed_at) == (T0, T0)


def test_a_start_that_comes_behind_its_end_begins_nothing() -> None:
    job = feed(new_job(), failed("edit"), started("edit"))
    assert (job.stages[0].state, job.stages[0].attempt) == (StageState.QUEUED, 1)


def test_a_stage_that_was_given_up_stays_so_whatever_its_record_learns_first() -> None:
    job = feed(new_job(), failed("i2v", final=True), started("i2v", 2), completed("edit"))
    assert job.status is JobStatus.FAILED


def test_a_completion_counts_from_whichever_attempt() -> None:
    job = feed(new_job(i2v=False), started("edit", 1), started("edit", 2), completed("edit", 1))
    assert (job.status, job.stages[0].attempt) == (JobStatus.COMPLETED, 2)


def test_a_cancelled_job_withdraws_its_task_and_stays_cancelled() -> None:
    job, commands = pipeline.decide(new_job(), contracts.CancelRequested(job_id="job", run=1, at=T0))
    assert job.status is JobStatus.CANCELLED
    assert isinstance(commands[0], pipeline.WithdrawTask)
    assert feed(job, completed("edit"), completed("i2v")).status is JobStatus.CANCELLED


def test_a_retry_goes_on_from_the_failed_stage_only() -> None:
    job = feed(new_job(), completed("edit"), started("i2v"), failed("i2v", final=True))
    assert job.status is JobStatus.FAILED
    job, commands = pipeline.decide(job, contracts.RetryRequested(job_id="job", run=2, at=T0))
    assert job.status is JobStatus.IN_PROGRESS
    [command] = commands
    assert isinstance(command, pipeline.PublishTask)
    assert (command.task.stage, command.task.run) == ("i2v", 2)


def test_a_completed_job_cannot_be_retried() -> None:
    job = feed(new_job(i2v=False), completed("edit"))
    assert feed(job, contracts.RetryRequested(job_id="job", run=2, at=T0)) == job
    assert feed(job, started("edit", run=2)) == job


def test_a_retry_that_comes_again_when_its_run_has_ended_begins_nothing() -> None:
    asked = contracts.RetryRequested(job_id="job", run=2, at=T0)
    job = feed(new_job(), failed("edit", final=True), asked, failed("edit", run=2, final=True))
    assert (job.run, job.status) == (2, JobStatus.FAILED)
    assert feed(job, asked) == job


def test_a_cancel_that_comes_again_when_its_run_has_ended_ends_no_other() -> None:
    asked = contracts.CancelRequested(job_id="job", run=1, at=T0)
    job = feed(new_job(), asked, contracts.RetryRequested(job_id="job", run=2, at=T0))
    assert (job.run, job.status) == (2, JobStatus.QUEUED)
    assert feed(job, asked) == job


def test_a_task_that_is_tried_again_is_in_its_queue_and_not_demanded_anew() -> None:
    job, commands = pipeline.decide(feed(new_job(), started("edit")), failed("edit"))
    assert job.stages[0].state is StageState.QUEUED
    assert commands == ()


def test_a_job_does_not_become_younger_by_an_event_of_a_clock_that_is_behind() -> None:
    later = T0 + timedelta(minutes=5)
    job = feed(new_job(), started("edit", at=later), completed("edit"))
    assert job.updated_at == later


def test_of_candidates_that_are_not_there_the_last_one_is_taken() -> None:
    approved = contracts.Approved(job_id="job", run=1, at=T0, candidate=3)
    _, [command] = pipeline.decide(feed(new_job(review=True), completed("edit", count=2)), approved)
    assert isinstance(command, pipeline.PublishTask)
    assert command.task.inputs == ("jobs/job/edit-1.png",)


def test_every_attempt_is_paid_for_once() -> None:
    job = feed(
        new_job(i2v=False), failed("edit", 1, gpu=2.0), failed("edit", 1, gpu=2.0), completed("edit", 2, gpu=3.0)
    )
    assert job.gpu_seconds == pytest.approx(5.0)


def test_the_attempts_of_each_run_are_paid_for() -> None:
    again = contracts.RetryRequested(job_id="job", run=2, at=T0)
    job = feed(new_job(i2v=False), failed("edit", final=True, gpu=2.0), again, completed("edit", run=2, gpu=3.0))
    assert job.gpu_seconds == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("quality", "size", "area"),
    [("draft", (832, 480), 832 * 480), ("standard", (1344, 768), None), ("high", (1344, 768), None)],
)
def test_a_draft_is_edited_at_the_size_of_its_video_references_too(
    quality: str, size: tuple[int, int], area: int | None
) -> None:
    work = plan.plan_edit(EditParams(prompt="x", quality=quality), I2VParams(), "job", (512, 512))
    assert (work.width, work.height) == size
    assert work.reference_area == area


def test_a_draft_without_a_video_has_its_references_whole() -> None:
    assert plan.plan_edit(EditParams(prompt="x", quality="draft"), None, "job", (512, 512)).reference_area is None


def test_an_explicit_field_wins_over_the_quality() -> None:
    edit = EditParams(prompt="x", quality="draft", steps=7, true_cfg_scale=2.5, seed=3, width=640, height=640)
    work = plan.plan_edit(edit, None, "job", (512, 512))
    assert (work.steps, work.true_cfg_scale, work.seed, work.width, work.height) == (7, 2.5, 3, 640, 640)


def test_a_job_without_a_seed_has_the_same_one_whenever_it_is_planned() -> None:
    first, second = (plan.plan_i2v(I2VParams(), "job") for _ in range(2))
    assert first.seed == second.seed


@given(st.floats(min_value=0.2, max_value=5.0))
def test_a_planned_size_is_about_a_megapixel_at_the_asked_aspect(aspect: float) -> None:
    width, height = plan.size_for(aspect)
    assert width % 32 == 0
    assert height % 32 == 0
    assert width * height == pytest.approx(plan.MEGAPIXEL, rel=0.15)
    assert width / height == pytest.approx(aspect, rel=0.15)


# ── any order, any number ────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[contracts.AnyEvent], float]:
    """What two stages' workers may have said, with the GPU seconds that they used."""
    events: list[contracts.AnyEvent] = []
    spent = 0.0
    for stage in ("edit", "i2v"):
        tries = draw(st.integers(1, 3))
        ends_well = draw(st.booleans())
        for attempt in range(1, tries + 1):
            events.append(started(stage, attempt))
            spent += 1.0
            last = attempt == tries
            events.append(completed(stage, attempt) if last and ends_well else failed(stage, attempt, final=last))
        if not ends_well:
            break
    return events, spent


@given(histories(), st.booleans(), st.data())
def test_any_order_and_number_of_events_ends_in_one_final_state(
    history: tuple[list[contracts.AnyEvent], float], cancel: bool, data: st.DataObject
) -> None:
    events, spent = history
    if cancel:
        events = [*events, contracts.CancelRequested(job_id="job", run=1, at=T0)]
    doubled = events + data.draw(st.lists(st.sampled_from(events), max_size=6))
    job = feed(new_job(), *data.draw(st.permutations(doubled)))
    assert job.status.final
    assert job.gpu_seconds == pytest.approx(spent)
    again = feed(job, *data.draw(st.permutations(doubled)))
    assert again == job
    finals = [command for command in pipeline.demands(job) if isinstance(command, pipeline.PublishEvent)]
    assert [command.event.type for command in finals] == [job.status.value]


@given(histories())
def test_in_order_the_final_state_is_the_one_that_happened(history: tuple[list[contracts.AnyEvent], float]) -> None:
    events, _ = history
    job = feed(new_job(), *events)
    failing = any(isinstance(event, contracts.StageFailed) and event.final for event in events)
    assert job.status is (JobStatus.FAILED if failing else JobStatus.COMPLETED)


# ── crashes: gateways that die between writing and acting, workers that die anywhere ─────────────────────────────


@dataclass
class Bus:
    """As much of JetStream as the promises need: a log with compare-and-set and message ids, and a queue."""

    log: list[contracts.AnyEvent] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    queue: dict[str, contracts.Task] = field(default_factory=dict)

    def append(self, event: contracts.AnyEvent, message_id: str, expect: int | None = None) -> bool:
        if message_id in self.ids:
            return True
        if expect is not None and expect != len(self.log):
            return False
        self.ids.add(message_id)
        self.log.append(event)
        return True

    def carry_out(self, commands: tuple[pipeline.Command, ...]) -> None:
        for command in commands:
            match command:
                case pipeline.PublishTask(task):
                    key = f"{task.job_id}:{task.stage}:{task.run}"
                    if key not in self.ids and task.stage not in self.queue:
                        self.ids.add(key)
                        self.queue[task.stage] = task
                case pipeline.WithdrawTask(stage, _, _):
                    self.queue.pop(stage, None)
                case pipeline.PublishEvent(event):
                    self.append(event, f"{event.job_id}:{event.run}:{event.type}")


@dataclass
class Running:
    task: contracts.Task
    verdict: attempts.Run
    seq: int


class System(RuleBasedStateMachine):
    """Gateways and workers that die anywhere, and a user who cancels and retries."""

    MAX_ATTEMPTS = 3

    @initialize(review=st.booleans())
    def begin(self, review: bool) -> None:
        self.bus = Bus()
        self.job = new_job(review=review)
        self.bus.append(contracts.Accepted(job_id="job", at=T0), "job:accepted", 0)
        self.bus.carry_out(pipeline.demands(self.job))
        self.seen = 0  # the gateway's place in the log; a crash leaves it where it was
        self.running: list[Running] = []
        self.computed: list[tuple[int, str]] = []
        self.finals: dict[int, JobStatus] = {}
        self.nonce = 0

    def unique(self, what: str) -> str:
        self.nonce += 1
        return f"{what}:{self.nonce}"

    def newest(self) -> tuple[contracts.AnyEvent | None, int]:
        return (self.bus.log[-1] if self.bus.log else None), len(self.bus.log)

    def user(self, event: contracts.AnyEvent) -> None:
        self.bus.append(event, f"job:{event.run}:{event.type}")
        self.job, commands = pipeline.decide(self.job, event)
        self.bus.carry_out(commands)

    @rule(crash=st.booleans())
    def gateway_digests_an_event(self, crash: bool) -> None:
        if self.seen == len(self.bus.log):
            return
        self.job, commands = pipeline.decide(self.job, self.bus.log[self.seen])
        if crash:
            return  # written, not acted on, not acked: it comes again
        self.bus.carry_out(commands)
        self.seen += 1

    @rule(stage=st.sampled_from(["edit", "i2v"]))
    def worker_takes_a_task(self, stage: str) -> None:
        task = self.bus.queue.get(stage)
        if task is None:
            return
        newest, seq = self.newest()
        verdict = attempts.judge(task, newest, self.MAX_ATTEMPTS)
        if isinstance(verdict, attempts.Drop):
            self.bus.queue.pop(stage)
        elif isinstance(verdict, attempts.Exhausted):
            event = failed(stage, verdict.attempt, task.run, final=True, gpu=0)
            self.bus.append(event.model_copy(update={"tries": verdict.tries}), self.unique("exhausted"), seq)
            self.bus.queue.pop(stage)
        else:
            update = {"tries": verdict.tries, "alone": verdict.alone}
            event = started(stage, verdict.attempt, task.run).model_copy(update=update)
            assert self.bus.append(event, self.unique("started"), seq)
            self.running.append(Running(task, verdict, len(self.bus.log)))

    def settle(self, held: Running, event: contracts.AnyStageEvent, message_id: str) -> bool:
        """As `Claim.append` does it: again with a newer place while the attempt still stands."""
        while not self.bus.append(event, message_id, held.seq):
            newest, seq = self.newest()
            if attempts.standing(held.task, held.verdict.attempt, newest) != "mine":
                return False
            held.seq = seq
        return True

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["completed", "failed", "released", "died", "unacked"]))
    def worker_ends(self, data: st.DataObject, how: str) -> None:
        held = data.draw(st.sampled_from(self.running))
        self.running.remove(held)
        task, verdict = held.task, held.verdict
        stage, base = task.stage, {"tries": verdict.tries, "alone": verdict.alone}
        if how == "died":
            return
        if how in ("completed", "unacked"):
            event = completed(stage, verdict.attempt, task.run).model_copy(update=base)
            if self.settle(held, event, self.unique("completed")) and how == "completed":
                self.bus.queue.pop(stage, None)
        elif how == "failed":
            final = verdict.tries >= self.MAX_ATTEMPTS
            event = failed(stage, verdict.attempt, task.run, final=final).model_copy(update=base)
            if self.settle(held, event, self.unique("failed")) and final:
                self.bus.queue.pop(stage, None)
        else:
            released = contracts.StageReleased(
                job_id="job", run=task.run, at=T0, stage=stage, worker="w",
                attempt=verdict.attempt, tries=verdict.tries - 1, alone=verdict.alone,
            )  # fmt: skip
            self.settle(held, released, self.unique("released"))

    @rule()
    def user_cancels(self) -> None:
        if not self.job.status.final:
            self.user(contracts.CancelRequested(job_id="job", run=self.job.run, at=T0))

    @rule()
    def user_retries(self) -> None:
        if pipeline.may_retry(self.job) and self.job.run < 4:
            self.user(contracts.RetryRequested(job_id="job", run=self.job.run + 1, at=T0))

    @rule()
    def user_approves(self) -> None:
        if self.job.status is JobStatus.AWAITING_REVIEW:
            self.user(contracts.Approved(job_id="job", run=self.job.run, at=T0))

    @invariant()
    def a_final_state_stays(self) -> None:
        if hasattr(self, "job") and self.job.status.final:
            assert self.finals.setdefault(self.job.run, self.job.status) is self.job.status

    @invariant()
    def attempt_numbers_only_grow(self) -> None:
        for stage in ("edit", "i2v"):
            log = self.bus.log if hasattr(self, "bus") else []
            starts = [event for event in log if isinstance(event, contracts.StageStarted) and event.stage == stage]
            numbers = [(event.run, event.attempt) for event in starts]
            assert numbers == sorted(set(numbers))

    def teardown(self) -> None:
        """Left alone, with healthy workers and gateways, every job ends."""
        if not hasattr(self, "bus"):
            return
        for _ in range(60):
            self.user_approves()
            for held in list(self.running):
                self.running.remove(held)
                event = completed(held.task.stage, held.verdict.attempt, held.task.run)
                event = event.model_copy(update={"tries": held.verdict.tries})
                if self.settle(held, event, self.unique("completed")):
                    self.bus.queue.pop(held.task.stage, None)
            while self.seen < len(self.bus.log):
                self.gateway_digests_an_event(False)
            for stage in ("edit", "i2v"):
                self.worker_takes_a_task(stage)
            if self.job.status.final and not self.bus.queue and not self.running:
                break
        while self.seen < len(self.bus.log):
            self.gateway_digests_an_event(False)
        assert self.job.status.final, self.job.status
        assert self.bus.queue == {}
        this_run = [event.type for event in self.bus.log if event.run == self.job.run]
        ends = [kind for kind in this_run if kind in {"completed", "failed", "cancelled"}]
        assert ends == [self.job.status.value]


TestSystem = System.TestCase
TestSystem.settings = settings(stateful_step_count=30)


def test_a_task_carries_the_deadline_of_its_job() -> None:
    job = new_job().model_copy(update={"deadline_at": T0 + timedelta(seconds=5)})
    [command] = pipeline.demands(job)
    assert isinstance(command, pipeline.PublishTask)
    assert command.task.deadline_at == T0 + timedelta(seconds=5)
