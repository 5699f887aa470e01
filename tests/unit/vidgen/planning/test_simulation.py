"""The simulation against queueing theory, against a recursion that is exact, and against what it promises."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen import worker
from vidgen.contracts import LANES, Stage
from vidgen.planning import arrivals
from vidgen.planning.arrivals import KINDS, Arrival
from vidgen.planning.scaling import Scaling
from vidgen.planning.simulation import Policy, Run, Served, Task, simulate

NO_LEAD = Policy(lead_s=0.0)
RANDOM = Policy(lead_s=0.0, vary="exponential")


def fixed(number: int) -> Scaling:
    return Scaling(floor=number, most=number)


def at(seconds: float, kind: arrivals.Kind = "edit", lane: worker.topology.Lane = "interactive") -> Arrival:
    return Arrival(seconds, lane, kind)


def tasks(run: Run, stage: Stage = "edit") -> list[Task]:
    return [task for job in run.jobs for task in job.tasks if task.stage == stage]


# ── theory ───────────────────────────────────────────────────────────────────────────────────────────────────────


def erlang_c(servers: int, offered: float) -> float:
    """The probability that a job of M/M/c waits; `offered` is arrivals a second times seconds a task."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def first_come(jobs: Sequence[tuple[float, float]], servers: int) -> list[float]:
    """Seconds that each job (when it comes, how long it takes) waits for the first server that is free."""
    free = [0.0] * servers
    waited = []
    for comes, takes in jobs:
        begin = max(comes, free[0])
        heapq.heapreplace(free, begin + takes)
        waited.append(begin - comes)
    return waited


@pytest.mark.parametrize(("servers", "utilisation"), [(1, 0.5), (2, 0.6), (5, 0.7)])
def test_random_tasks_take_as_long_as_queueing_theory_says(servers: int, utilisation: float) -> None:
    seconds = 10.0
    per_s = utilisation * servers / seconds
    jobs = arrivals.poisson(per_s * 3600, 5_000 / per_s / 3600, mix={"edit": 1}, seed=1)
    run = simulate(jobs, {"edit": Served(seconds, fixed(servers))}, RANDOM)

    # The rates that came out, and not those that were asked for: chance in them is none of the queue's.
    mean = sum(task.seconds for task in tasks(run)) / len(jobs)
    rate = len(jobs) / jobs[-1].at
    wait = erlang_c(servers, rate * mean) * mean / (servers - rate * mean)
    assert sum(job.total_s for job in run.jobs) / len(jobs) == pytest.approx(mean + wait, rel=0.03)


@pytest.mark.parametrize("servers", [1, 3, 8])
@pytest.mark.parametrize("policy", [NO_LEAD, RANDOM], ids=["constant", "exponential"])
def test_every_job_waits_exactly_for_the_first_gpu_that_is_free(servers: int, policy: Policy) -> None:
    jobs = arrivals.poisson(0.85 * servers * 360, 800 / (0.85 * servers * 360), mix={"edit": 1}, seed=servers)
    run = simulate(jobs, {"edit": Served(10.0, fixed(servers))}, policy, seed=5)

    expected = first_come([(task.queued_at, task.seconds) for task in tasks(run)], servers)
    assert [job.waiting_s for job in run.jobs] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("servers", "utilisation"), [(1, 0.5), (2, 0.6), (5, 0.7)])
def test_the_first_gpu_that_is_free_gives_the_waits_of_queueing_theory(servers: int, utilisation: float) -> None:
    import numpy as np

    count = 250_000
    draw = np.random.default_rng(2)
    takes = draw.exponential(1.0, count)
    comes = np.cumsum(draw.exponential(1.0, count)) / (utilisation * servers)
    waited = first_come(list(zip(comes.tolist(), takes.tolist(), strict=True)), servers)

    mean, rate = takes.mean(), count / comes[-1]
    expected = erlang_c(servers, rate * mean) * mean / (servers - rate * mean)
    assert np.mean(waited) == pytest.approx(expected, rel=0.03)


def test_constant_tasks_on_one_gpu_wait_half_as_long_as_random_ones() -> None:
    jobs = arrivals.poisson(0.5 * 360, 5_000 / (0.5 * 360), mix={"edit": 1}, seed=1)
    run = simulate(jobs, {"edit": Served(10.0, fixed(1))}, NO_LEAD)

    load = len(jobs) / jobs[-1].at * 10.0
    total = sum(job.total_s for job in run.jobs) / len(jobs)
    assert total == pytest.approx(10.0 + load * 10.0 / (2 * (1 - load)), rel=0.03)


# ── the policy ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_video_begins_when_its_frame_is_stored() -> None:
    run = simulate([at(0, "both")], {"edit": Served(2, fixed(1), 0.5), "i2v": Served(10, fixed(1), 1.0)})

    [job] = run.jobs
    assert [task.queued_at for task in job.tasks] == [0, 2.5]
    assert job.total_s == 13.5
    assert job.waiting_s == 0


def test_an_idle_worker_looks_for_a_batch_task_every_half_second() -> None:
    run = simulate([at(0.7, lane="batch")], {"edit": Served(2, fixed(1))})

    assert tasks(run)[0].started_at == pytest.approx(1.0)


def test_an_interactive_task_that_comes_before_an_idle_worker_looks_goes_first() -> None:
    run = simulate([at(0.1, lane="batch"), at(0.3)], {"edit": Served(2, fixed(1))}, NO_LEAD)

    assert [task.started_at for task in tasks(run)] == [2.3, 0.3]


@pytest.mark.parametrize(
    ("jobs", "starts"),
    [([at(20.3, lane="batch")], [20.5]), ([at(20.3), at(20.35, lane="batch")], [20.3, 20.7])],
    ids=["batch", "interactive first"],
)
def test_of_two_idle_workers_the_one_that_asks_anew_next_is_given_a_task(
    jobs: list[Arrival], starts: list[float]
) -> None:
    # They wait from 10 on and from 10.2 on.
    run = simulate([at(0), at(0.2), *jobs], {"edit": Served(10, fixed(2))}, NO_LEAD)

    assert [task.started_at for task in tasks(run)][2:] == pytest.approx(starts)


def test_of_ten_tasks_in_a_row_one_is_a_batch_task() -> None:
    waiting = [at(0)] * 30 + [at(0, lane="batch")] * 3
    run = simulate(waiting, {"edit": Served(1, fixed(1))}, NO_LEAD)

    ordered = sorted(tasks(run), key=lambda task: task.started_at or 0.0)
    assert [number for number, task in enumerate(ordered) if task.lane == "batch"] == [9, 19, 29]


def test_a_long_batch_task_makes_way_and_goes_on_where_it_was() -> None:
    jobs = [at(0, lane="batch"), at(50.25)]
    run = simulate(jobs, {"edit": Served(100, fixed(1))})

    batch, interactive = tasks(run)
    # It is looked for once a second, and the batch task began half a second after the worker.
    assert interactive.started_at == pytest.approx(51)
    assert (batch.started_at, batch.preempted) == (0.5, 1)
    assert [job.done_at for job in run.jobs] == pytest.approx([200.5 - 0.5, 151], abs=0.51)
    assert run.stages["edit"].busy_s == pytest.approx(200)


def test_a_batch_task_that_made_way_often_enough_runs_to_its_end() -> None:
    jobs = [at(0, lane="batch"), at(20), at(250), at(480), at(710)]
    run = simulate(jobs, {"edit": Served(200, fixed(1))})

    assert tasks(run)[0].preempted == worker.MAX_PREEMPTIONS
    assert tasks(run)[-1].started_at == run.jobs[0].done_at


def test_what_went_before_a_batch_task_makes_no_way_itself() -> None:
    run = simulate([at(0, lane="batch"), at(20), at(40)], {"edit": Served(100, fixed(1))}, NO_LEAD)

    assert [task.preempted for task in tasks(run)] == [1, 0, 0]
    assert tasks(run)[2].started_at == run.jobs[1].done_at


def test_a_task_that_made_way_goes_on_before_other_batch_tasks() -> None:
    run = simulate([at(0, lane="batch"), at(0, lane="batch"), at(50)], {"edit": Served(100, fixed(1))}, NO_LEAD)

    first, second, _ = tasks(run)
    assert (first.preempted, second.preempted) == (1, 0)
    assert second.started_at == run.jobs[0].done_at


def test_a_batch_task_in_its_own_turn_makes_no_way() -> None:
    jobs = [at(0), at(0, lane="batch"), at(0)]
    run = simulate(jobs, {"edit": Served(100, fixed(1))}, Policy(lead_s=0.0, batch_share=2))

    assert [task.started_at for task in tasks(run)] == [0, 100, 200]
    assert tasks(run)[1].preempted == 0


def test_a_turn_of_the_batch_lane_that_finds_nothing_there_is_over() -> None:
    jobs = [*[at(0)] * 6, at(2.5, lane="batch")]
    run = simulate(jobs, {"edit": Served(1, fixed(1))}, Policy(lead_s=0.0, batch_share=3))

    # It was its turn at 2, and is again behind two others.
    assert tasks(run)[-1].started_at == 4


@pytest.mark.parametrize("comes", [90, 80.1], ids=["by then", "when it is looked for"])
def test_a_batch_task_that_is_nearly_done_makes_no_way(comes: float) -> None:
    # It is done at 100.5, and looks at 80.5.
    policy = Policy(checkpoint_over_s=20.3)
    run = simulate([at(0, lane="batch"), at(comes)], {"edit": Served(100, fixed(1))}, policy)

    assert tasks(run)[0].preempted == 0
    assert tasks(run)[1].started_at == run.jobs[0].done_at


def test_what_a_worker_took_shortly_before_its_gpu_is_free_goes_first_whatever_comes_then() -> None:
    jobs = [at(0), at(6.3, lane="batch"), at(7.4)]
    held = tasks(simulate(jobs, {"edit": Served(10, fixed(1))}, Policy(lead_s=3.0)))
    free = tasks(simulate(jobs, {"edit": Served(10, fixed(1))}, Policy(lead_s=0.0)))

    assert [task.started_at for task in held] == [0, 10, 20]
    assert [task.started_at for task in free] == [0, 20, 10]


# ── the autoscaler ───────────────────────────────────────────────────────────────────────────────────────────────

COLD = Scaling(most=4, lag_threshold=1, cold_start_s=60, polling_s=30, cooldown_s=120)


def test_the_first_job_waits_for_a_poll_and_a_cold_start() -> None:
    run = simulate([at(1), at(1000)], {"edit": Served(5, COLD)})

    assert [job.waiting_s for job in run.jobs] == pytest.approx([30 - 1 + 60, 1020 - 1000 + 60])


def test_replicas_go_to_zero_after_the_cooldown_and_not_before() -> None:
    run = simulate([at(1)], {"edit": Served(5, COLD)}, horizon_s=1000)

    gone = next(sample.at for sample in run.samples if sample.at > 100 and sample.replicas["edit"] == 0)
    # Polled at 30 and 60 with work, at 90 (from 0 on: 60 s of start, then 5 s) still with it, then without.
    assert gone == pytest.approx(240, abs=2)
    assert run.stages["edit"].paid_s == pytest.approx(gone - 30, abs=2)


def test_the_look_ahead_starts_the_gpu_for_the_video_while_the_frame_is_made() -> None:
    stages = {"edit": Served(40, fixed(1)), "i2v": Served(10, COLD)}
    waits = {
        ahead: simulate([at(1, "both")], stages, Policy(look_ahead=ahead)).jobs[0].waiting_s for ahead in (True, False)
    }

    # The frame is there at 41; the GPU was started at 30, or is at 60, and takes 60 s to start.
    assert waits == {True: pytest.approx(30 + 60 - 41), False: pytest.approx(60 + 60 - 41)}


def test_with_a_floor_gpus_leave_one_by_one_and_finish_what_they_have() -> None:
    rule = Scaling(floor=1, most=4, lag_threshold=1, down_window_s=300, down_every_s=120)
    run = simulate([at(0)] * 4, {"edit": Served(60, rule)}, horizon_s=1200)

    assert all(job.total_s < 121 for job in run.jobs)
    counts = [sample.replicas["edit"] for sample in run.samples]
    assert max(counts) == 4
    assert sorted(counts[counts.index(4) :], reverse=True) == counts[counts.index(4) :]
    steps = {count: counts.count(count) * 2 for count in (3, 2)}
    assert steps == {3: pytest.approx(120, abs=4), 2: pytest.approx(120, abs=4)}
    assert counts[-1] == 1


def replicas(run: Run, moment: float) -> int:
    """How many there are at a moment, by the sample behind it."""
    return next(sample.replicas["edit"] for sample in run.samples if sample.at >= moment)


def test_with_a_floor_no_gpu_leaves_while_as_many_were_asked_for_lately() -> None:
    rule = Scaling(floor=1, most=4, lag_threshold=1, down_window_s=300, down_every_s=120)
    run = simulate([at(1001)] * 4, {"edit": Served(63, rule)}, horizon_s=1800)

    # All four were asked for last at the sync at 1050, three at the next one.
    assert [replicas(run, moment) for moment in (1000, 1010, 1360, 1370)] == [1, 4, 4, 3]
    assert [replicas(run, moment) for moment in (1480, 1490, 1600, 1610)] == [3, 2, 2, 1]


def test_that_some_started_is_no_reason_to_keep_one_that_nobody_asks_for() -> None:
    rule = Scaling(floor=1, most=4, lag_threshold=1, down_window_s=15, down_every_s=600)
    run = simulate([at(1001)] * 4, {"edit": Served(20, rule)}, horizon_s=1800)

    assert [replicas(run, moment) for moment in (1045, 1055, 1645, 1655)] == [4, 3, 3, 2]


# Behind each of its syncs, every 15 s, one GPU leaves that is not asked for then.
HASTY = Scaling(floor=1, most=2, lag_threshold=1, down_window_s=0, down_every_s=0)


def test_a_gpu_that_leaves_at_work_is_there_and_paid_for_until_it_is_done() -> None:
    rule = dataclasses.replace(HASTY, lag_threshold=2)
    run = simulate([at(0)] * 4, {"edit": Served(100, rule)}, NO_LEAD, horizon_s=300)

    # The second one is there from 15 on, and at 120 one is enough for the two tasks that are left: the newest leaves.
    assert [task.started_at for task in tasks(run)] == [0, 15, 100, 115]
    assert [job.done_at for job in run.jobs] == [100, 115, 200, 215]
    assert [replicas(run, moment) for moment in (10, 16, 200, 216)] == [1, 2, 2, 1]
    assert run.stages["edit"].paid_s == 300 + (215 - 15)
    assert run.stages["edit"].most_replicas == 2


def test_an_idle_gpu_leaves_before_one_at_work() -> None:
    run = simulate([at(0), at(1)], {"edit": Served(100, HASTY)}, NO_LEAD, horizon_s=300)

    # At 105 the older one is idle, and the other at work until 115.
    assert run.stages["edit"].paid_s == 105 + (300 - 15)


def test_a_gpu_that_only_starts_leaves_before_one_that_is_there() -> None:
    rule = dataclasses.replace(HASTY, cold_start_s=200)
    run = simulate([at(1), at(1), at(100)], {"edit": Served(16, rule)}, NO_LEAD)

    assert tasks(run)[-1].started_at == 100


def test_what_a_gpu_that_leaves_had_taken_is_done_by_another() -> None:
    rule = dataclasses.replace(HASTY, lag_threshold=3)
    run = simulate([at(0)] * 4, {"edit": Served(100, rule)}, Policy(lead_s=90.0))

    # At 105 the second leaves, with a task in its hand for 115.
    assert [task.started_at for task in tasks(run)] == [0, 100, 15, 200]
    assert run.lasted_s == 300


def test_nothing_is_given_to_a_gpu_that_left_while_it_waited() -> None:
    run = simulate([at(0.9), at(1), at(100), at(100)], {"edit": Served(20.3, HASTY)}, NO_LEAD)

    # It would have been the first to be given one, and what it handed back would have come second.
    assert [task.started_at for task in tasks(run)][2:] == [100, 105]


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────

JOBS = st.lists(
    st.builds(
        Arrival,
        st.floats(0, 600).map(lambda seconds: round(seconds, 1)),
        st.sampled_from(LANES),
        st.sampled_from(KINDS),
    ),
    min_size=1,
    max_size=40,
).map(lambda jobs: sorted(jobs, key=lambda job: job.at))
SCALINGS = st.builds(
    lambda floor, more, lag, cold: Scaling(floor, max(1, floor + more), lag, cold, 30.0, 90.0),
    st.integers(0, 2), st.integers(0, 4), st.integers(1, 4), st.floats(0, 100),
)  # fmt: skip
SERVED = st.builds(Served, st.floats(0.1, 60), SCALINGS, st.floats(0, 3))


@given(JOBS, SERVED, SERVED, st.sampled_from(["constant", "exponential"]))
@settings(max_examples=25, deadline=None)
def test_every_job_is_done_once_and_gpus_work_for_its_seconds(
    jobs: list[Arrival], edit: Served, i2v: Served, vary: str
) -> None:
    served: dict[Stage, Served] = {"edit": edit, "i2v": i2v}
    policy = Policy(vary="exponential" if vary == "exponential" else "constant")
    run = simulate(jobs, served, policy, seed=1)

    assert [job.arrival for job in run.jobs] == jobs
    assert all(tuple(task.stage for task in job.tasks) == job.arrival.stages for job in run.jobs)
    for stage, one in run.stages.items():
        assert one.busy_s == pytest.approx(sum(task.seconds for task in tasks(run, stage)))
        assert one.busy_s <= one.paid_s + 1e-6
        assert one.most_replicas <= served[stage].scaling.most
        for sample in run.samples:
            assert served[stage].scaling.floor <= sample.replicas[stage]
            assert 0 <= sample.busy[stage] <= sample.replicas[stage]
            assert sample.waiting[stage] >= 0
    again = simulate(jobs, served, policy, seed=1)
    assert [job.done_at for job in again.jobs] == [job.done_at for job in run.jobs]


@given(JOBS, st.integers(1, 3), st.floats(0.1, 60))
@settings(max_examples=25, deadline=None)
def test_without_the_one_in_ten_no_interactive_task_starts_after_a_batch_task_that_came_later(
    jobs: list[Arrival], servers: int, seconds: float
) -> None:
    policy = Policy(lead_s=0.0, batch_share=10**9)
    run = simulate(jobs, {"edit": Served(seconds, fixed(servers)), "i2v": Served(1, fixed(1))}, policy)

    edits = [task for task in tasks(run) if task.started_at is not None]
    for task in edits:
        if task.lane == "interactive":
            later = [one for one in edits if one.lane == "batch" and one.queued_at > task.queued_at]
            assert all((task.started_at or 0.0) <= (one.started_at or 0.0) for one in later)


@given(JOBS, st.integers(1, 3), st.floats(0.1, 60))
@settings(max_examples=25, deadline=None)
def test_no_gpu_is_idle_while_an_interactive_task_waits(jobs: list[Arrival], servers: int, seconds: float) -> None:
    jobs = [Arrival(job.at, "interactive", "edit") for job in jobs]
    run = simulate(jobs, {"edit": Served(seconds, fixed(servers))}, NO_LEAD)

    expected = first_come([(job.at, seconds) for job in jobs], servers)
    assert [job.waiting_s for job in run.jobs] == pytest.approx(expected, abs=1e-6)
