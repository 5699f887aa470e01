"""The fence by tables, and by what must hold for any log."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen import attempts, contracts
from vidgen.attempts import Drop, Exhausted, Run
from vidgen.contracts import Stage

T0 = datetime(2026, 1, 1, tzinfo=UTC)
MAX = 3
ERROR = contracts.JobError(code="x", message="it broke")
WORK: dict[Stage, contracts.Work] = {
    "edit": contracts.EditWork(
        prompt="p", user_prompt="p", negative_prompt=" ", steps=4, true_cfg_scale=1, guidance_scale=1, seed=1,
        width=64, height=64, candidates=1,
    ),
    "i2v": contracts.I2VWork(
        prompt="p", negative_prompt="", steps=3, guidance_scale=1, seed=1, num_frames=5, fps=8, width=64, height=64
    ),
}  # fmt: skip


def task(stage: Stage = "i2v", run: int = 2) -> contracts.Task:
    return contracts.Task(
        job_id="job", stage=stage, lane="batch", run=run, inputs=("uploads/a.png",), work=WORK[stage], queued_at=T0
    )


def stamp(
    stage: Stage = "i2v", run: int = 2, attempt: int = 1, tries: int | None = None, *, alone: bool = False
) -> dict[str, object]:
    return {
        "job_id": "job", "run": run, "at": T0, "stage": stage, "attempt": attempt,
        "tries": attempt if tries is None else tries, "worker": "w", "alone": alone,
    }  # fmt: skip


def started(**given: object) -> contracts.StageStarted:
    return contracts.StageStarted(**stamp(**given), engine="e", model="m")  # type: ignore[arg-type]


def completed(**given: object) -> contracts.StageCompleted:
    return contracts.StageCompleted(**stamp(**given), engine="e", model="m", seed=1, artifacts=())  # type: ignore[arg-type]


def failed(*, final: bool, **given: object) -> contracts.StageFailed:
    return contracts.StageFailed(**stamp(**given), error=ERROR, final=final)  # type: ignore[arg-type]


def released(**given: object) -> contracts.StageReleased:
    return contracts.StageReleased(**stamp(**given))  # type: ignore[arg-type]


def stage_cancelled(**given: object) -> contracts.StageCancelled:
    return contracts.StageCancelled(**stamp(**given))  # type: ignore[arg-type]


def of_job(kind: type[contracts.JobEvent], run: int = 2, **given: object) -> contracts.AnyEvent:
    return kind(job_id="job", run=run, at=T0, **given)  # type: ignore[arg-type, return-value]


CANCELS = [of_job(contracts.CancelRequested), of_job(contracts.JobCancelled)]
ENDS = [
    of_job(contracts.JobCompleted),
    of_job(contracts.JobFailed, error=ERROR),
    of_job(contracts.Rejected, errors=()),
]
BEGINNINGS = [of_job(contracts.Accepted), of_job(contracts.RetryRequested), of_job(contracts.Approved)]


def name(value: object) -> str:
    return getattr(value, "type", type(value).__name__)


# ── judge ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("newest", [None, *BEGINNINGS], ids=name)
def test_a_task_that_nobody_began_is_a_first_try(newest: contracts.AnyEvent | None) -> None:
    assert attempts.judge(task(), newest, MAX) == Run(1, 1)


def test_an_edit_of_which_a_candidate_was_approved_is_done_though_its_task_comes_again() -> None:
    # Found by random orders: its worker died before its ack, and somebody approved before the lease had run out.
    approved = of_job(contracts.Approved)
    assert attempts.judge(task("edit"), approved, MAX) == Drop("settled")
    assert attempts.judge(task("edit", run=3), approved, MAX) == Run(1, 1)


@pytest.mark.parametrize("newest", CANCELS, ids=name)
def test_a_task_of_a_cancelled_job_is_dropped(newest: contracts.AnyEvent) -> None:
    assert attempts.judge(task(), newest, MAX) == Drop("cancelled")


@pytest.mark.parametrize("newest", ENDS, ids=name)
def test_a_task_of_a_job_that_ended_is_dropped(newest: contracts.AnyEvent) -> None:
    assert attempts.judge(task(), newest, MAX) == Drop("settled")


@pytest.mark.parametrize(
    ("newest", "verdict"),
    [
        (started(attempt=1), Run(2, 1, alone=True)),
        (started(attempt=9, tries=3), Run(10, 3, alone=True)),
        (started(attempt=5, tries=2, alone=True), Run(6, 3, alone=True)),
        (failed(final=False, attempt=2, alone=True), Run(3, 3, alone=True)),
        (released(attempt=4, tries=1, alone=True), Run(5, 2, alone=True)),
        (failed(final=False, attempt=2), Run(3, 3)),
        (released(attempt=4, tries=0), Run(5, 1)),
        (started(attempt=3, alone=True), Exhausted(4, 4)),
        (failed(final=False, attempt=3), Exhausted(4, 4)),
        (failed(final=True, attempt=1), Drop("settled")),
        (completed(attempt=1), Drop("settled")),
        (stage_cancelled(attempt=1), Drop("cancelled")),
    ],
    ids=lambda value: repr(value) if isinstance(value, Run | Drop) else value.type,
)
def test_a_task_that_was_begun_goes_on_from_its_newest_event(
    newest: contracts.AnyEvent, verdict: attempts.Verdict
) -> None:
    assert attempts.judge(task(), newest, MAX) == verdict


@pytest.mark.parametrize(
    "newest", [started(run=1, attempt=9), stage_cancelled(run=1), failed(run=1, final=True)], ids=name
)
def test_what_a_run_before_left_behind_does_not_count(newest: contracts.AnyEvent) -> None:
    assert attempts.judge(task(run=2), newest, MAX) == Run(1, 1)


def test_a_task_of_an_older_run_is_superseded() -> None:
    assert attempts.judge(task(run=1), of_job(contracts.RetryRequested, run=2), MAX) == Drop("superseded")


def test_the_end_of_the_edit_is_the_beginning_of_the_video() -> None:
    assert attempts.judge(task("i2v"), completed(stage="edit"), MAX) == Run(1, 1)


def test_an_edit_whose_video_has_begun_is_settled() -> None:
    assert attempts.judge(task("edit"), started(stage="i2v"), MAX) == Drop("settled")


KEPT = contracts.Checkpoint(attempt=1, step=3, steps=8)


@pytest.mark.parametrize("begin", [started, released], ids=["a worker died", "handed back"])
def test_a_task_goes_on_from_the_checkpoint_that_its_newest_event_names(
    begin: Callable[..., contracts.StageEvent],
) -> None:
    newest = begin(attempt=2, tries=1, alone=True).model_copy(update={"checkpoint": KEPT, "preempted": 2})

    assert attempts.judge(task(), newest, MAX) == Run(3, 2, KEPT, 2, alone=True)  # type: ignore[arg-type]


def test_a_task_that_failed_starts_over() -> None:
    assert attempts.judge(task(), failed(final=False, attempt=2), MAX) == Run(3, 3, None)


def test_a_checkpoint_of_a_run_before_does_not_count() -> None:
    newest = released(run=1).model_copy(update={"checkpoint": KEPT})

    assert attempts.judge(task(run=2), newest, MAX) == Run(1, 1)


# ── standing ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("newest", "expected"),
    [
        (None, "mine"),
        (of_job(contracts.Accepted), "mine"),
        (of_job(contracts.Approved), "mine"),
        (started(attempt=2), "mine"),
        (completed(stage="edit", attempt=7), "mine"),
        (started(run=1, attempt=7), "mine"),
        (started(attempt=1), "mine"),
        (started(attempt=3), "fenced"),
        (completed(attempt=3), "fenced"),
        (of_job(contracts.JobCompleted), "fenced"),
        (of_job(contracts.JobFailed, error=ERROR), "fenced"),
        (of_job(contracts.RetryRequested, run=3), "cancelled"),
        (of_job(contracts.CancelRequested, run=3), "fenced"),
        (of_job(contracts.CancelRequested), "cancelled"),
        (of_job(contracts.JobCancelled), "cancelled"),
        (of_job(contracts.CancelRequested, run=1), "mine"),
        (stage_cancelled(attempt=2), "cancelled"),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_an_attempt_stands_as_the_newest_event_says(newest: contracts.AnyEvent | None, expected: str) -> None:
    assert attempts.standing(task(run=2), 2, newest) == expected


def test_an_edit_is_fenced_once_its_video_has_begun() -> None:
    assert attempts.standing(task("edit"), 1, started(stage="i2v")) == "fenced"


# ── for any log ──────────────────────────────────────────────────────────────────────────────────────────────────

runs, counts, stages = st.integers(1, 4), st.integers(1, 9), st.sampled_from(contracts.STAGES)
numbers = st.fixed_dictionaries({"stage": stages, "run": runs, "attempt": counts, "tries": counts})
stage_events = st.one_of(
    st.builds(lambda given: started(**given), numbers),
    st.builds(lambda given: completed(**given), numbers),
    st.builds(lambda given, final: failed(final=final, **given), numbers, st.booleans()),
    st.builds(lambda given: released(**given), numbers),
    st.builds(lambda given: stage_cancelled(**given), numbers),
)
job_events = st.builds(
    lambda event, run: event.model_copy(update={"run": run}), st.sampled_from(CANCELS + ENDS + BEGINNINGS), runs
)
events = st.one_of(stage_events, job_events)
tasks = st.builds(task, stages, runs)


@given(tasks, events, st.integers(1, 9))
def test_a_new_attempt_is_always_newer_than_every_one_before(
    given_task: contracts.Task, newest: contracts.AnyEvent, most: int
) -> None:
    verdict = attempts.judge(given_task, newest, most)

    if isinstance(verdict, Run):
        assert newest.run <= given_task.run
        if isinstance(newest, contracts.StageEvent) and (newest.run, newest.stage) == (
            given_task.run,
            given_task.stage,
        ):
            assert verdict.attempt == newest.attempt + 1


@given(tasks, events, st.integers(1, 9))
def test_no_task_runs_more_often_than_it_may(given_task: contracts.Task, newest: contracts.AnyEvent, most: int) -> None:
    verdict = attempts.judge(given_task, newest, most)

    assert isinstance(verdict, Exhausted) == (isinstance(verdict, Run) and verdict.tries > most)


@given(tasks, events, st.integers(1, 9))
def test_who_may_start_fences_everyone_before_and_stands_himself(
    given_task: contracts.Task, newest: contracts.AnyEvent, most: int
) -> None:
    verdict = attempts.judge(given_task, newest, most)
    if not isinstance(verdict, Run):
        return
    start = started(stage=given_task.stage, run=given_task.run, attempt=verdict.attempt, tries=verdict.tries)

    assert attempts.standing(given_task, verdict.attempt, start) == "mine"
    for older in range(1, verdict.attempt):
        assert attempts.standing(given_task, older, start) == "fenced"


@given(tasks, events, counts)
def test_whoever_is_dropped_could_not_go_on_either(
    given_task: contracts.Task, newest: contracts.AnyEvent, attempt: int
) -> None:
    """`judge` and `standing` agree: a cancel or an end that turns a task away also stops one that runs."""
    verdict = attempts.judge(given_task, newest, MAX)

    if isinstance(verdict, Drop) and not isinstance(newest, contracts.StageEvent):
        assert attempts.standing(given_task, attempt, newest) != "mine"


def test_whoever_made_candidates_once_more_is_fenced_by_the_choice_among_those_that_were_there() -> None:
    approved = contracts.Approved(job_id="job", run=1, at=datetime(2026, 1, 1, tzinfo=UTC), candidate=0)
    assert attempts.standing(task("edit", 1), 1, approved) == "fenced"
    assert attempts.standing(task("i2v", 1), 1, approved) == "mine"


@given(counts, st.integers(1, 6), st.sampled_from(["kills", "fails", "releases"]))
def test_only_attempts_that_are_held_against_a_task_use_it_up(most: int, rounds: int, how: str) -> None:
    newest: contracts.AnyEvent | None = None
    begun = 0
    for _ in range(most + rounds):
        verdict = attempts.judge(task(), newest, most)
        if isinstance(verdict, Exhausted):
            break
        assert isinstance(verdict, Run)
        begun += 1
        said = {"attempt": verdict.attempt, "tries": verdict.tries, "alone": verdict.alone}
        match how:
            case "kills":
                newest = started(**said)
            case "fails":
                newest = failed(final=False, **said)
            case "releases":
                newest = released(**said | {"tries": verdict.tries - 1})

    # Of those that ended without a word, the first was not alone.
    assert begun == {"kills": most + 1, "fails": most, "releases": most + rounds}[how]


# ── back-off ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("tries", "seconds"), [(0, 1), (1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (500, 60)])
def test_the_wait_doubles_up_to_its_limit(tries: int, seconds: float) -> None:
    assert attempts.back_off(tries, base=1.0, limit=60.0) == seconds


@given(st.integers(0, 5000), st.floats(0, 100), st.floats(0, 1000))
def test_the_wait_never_shrinks_never_passes_its_limit_and_never_overflows(
    tries: int, base: float, limit: float
) -> None:
    wait = attempts.back_off(tries, base, limit)

    assert 0 <= wait <= limit
    assert attempts.back_off(tries + 1, base, limit) >= wait
