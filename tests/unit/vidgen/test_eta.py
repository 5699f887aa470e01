from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vidgen import eta

durations = st.lists(st.floats(0.001, 1000), min_size=1, max_size=20)


def run(seconds: list[float], *, finishing_s: float = 0.0, steps: int | None = None) -> eta.StepClock:
    clock, at = eta.StepClock(0.0, finishing_s=finishing_s), 0.0
    for step, duration in enumerate(seconds, start=1):
        at += duration
        clock.step(step, steps or len(seconds), at)
    return clock


def test_nothing_is_claimed_before_a_step_was_measured() -> None:
    clock = eta.StepClock()

    assert clock.seconds_per_step is None
    assert clock.eta_s() is None


@given(st.floats(0.001, 100), st.integers(2, 50), st.integers(0, 50), st.floats(0, 60))
def test_even_steps_give_an_exact_estimate(per_step: float, done: int, left: int, finishing_s: float) -> None:
    clock = run([per_step] * done, steps=done + left, finishing_s=finishing_s)

    assert clock.seconds_per_step == pytest.approx(per_step, rel=1e-6)
    assert clock.eta_s() == pytest.approx(left * per_step + finishing_s, rel=1e-6)


@given(st.floats(0.01, 100), st.floats(0.01, 1000), st.integers(2, 20))
def test_the_warm_up_of_the_first_step_is_left_out_once_another_is_known(even: float, first: float, more: int) -> None:
    assert run([first]).seconds_per_step == pytest.approx(first)
    assert run([first, *[even] * more]).seconds_per_step == pytest.approx(even, rel=1e-6)


@given(st.floats(0.01, 10), st.integers(3, 20), st.floats(1, 1000), st.data())
def test_one_slow_step_does_not_move_the_estimate(even: float, count: int, slow: float, data: st.DataObject) -> None:
    seconds = [even] * (count + 1)
    seconds[data.draw(st.integers(1, count))] += slow

    assert run(seconds).seconds_per_step == pytest.approx(even, rel=1e-6)


@given(durations, st.integers(0, 100), st.floats(-100, 100), st.floats(-10, 60))
def test_the_time_left_is_finite_and_never_negative(
    seconds: list[float], more: int, later: float, finishing_s: float
) -> None:
    clock = run(seconds, steps=len(seconds) + more, finishing_s=finishing_s)

    for now in (None, sum(seconds) + later):
        left = clock.eta_s(now)
        assert left is not None
        assert math.isfinite(left)
        assert left >= 0


@given(durations, st.integers(0, 20), st.lists(st.floats(0, 2000), min_size=2, max_size=5))
def test_between_steps_the_time_left_only_shrinks(seconds: list[float], more: int, waits: list[float]) -> None:
    clock = run(seconds, steps=len(seconds) + more, finishing_s=3.0)

    left = [clock.eta_s(sum(seconds) + wait) or 0.0 for wait in sorted(waits)]

    assert left == sorted(left, reverse=True)


@given(durations)
def test_a_step_noted_twice_changes_nothing(seconds: list[float]) -> None:
    clock = run(seconds)
    before = clock.seconds_per_step, clock.eta_s()

    assert clock.step(len(seconds), len(seconds), sum(seconds) + 5) is None

    assert (clock.seconds_per_step, clock.eta_s()) == before


def test_steps_noted_together_share_their_time() -> None:
    clock = eta.StepClock(0.0)
    clock.step(1, 9, 1.0)

    assert clock.step(5, 9, 9.0) == pytest.approx(2.0)
    assert clock.eta_s() == pytest.approx(8.0)


def test_without_a_start_the_first_step_only_starts_the_clock() -> None:
    clock = eta.StepClock()

    assert clock.step(1, 4, 100.0) is None
    assert clock.eta_s() is None
    assert clock.step(2, 4, 101.5) == pytest.approx(1.5)
    assert clock.eta_s() == pytest.approx(3.0)


def test_recent_forgets_what_is_older_than_its_window() -> None:
    recent = eta.Recent(window=3)
    assert recent.value is None

    for seconds in (9, 9, 9, 1, 2, 3):
        recent.add(seconds)

    assert recent.value == 2


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.floats(0.5, 20))
def test_the_pace_lets_the_first_and_the_last_through_and_at_most_so_many_a_second(
    gaps: list[float], per_second: float
) -> None:
    times = [sum(gaps[:count]) for count in range(len(gaps) + 1)]
    pace = eta.Pace(per_second)

    spoken = [at for at in times[:-1] if pace.allows(at)]

    assert spoken[0] == times[0]
    assert pace.allows(times[-1], last=True)
    for at in spoken:
        within = [other for other in spoken if at <= other < at + 1]
        assert (len(within) - 1) / per_second < 1 + 1e-6


@given(st.lists(st.floats(0, 0.1), min_size=2, max_size=50))
def test_the_pace_speaks_again_as_soon_as_it_may(gaps: list[float]) -> None:
    pace, at, spoken = eta.Pace(5), 0.0, 0.0
    assert pace.allows(at)
    for gap in gaps:
        at += gap
        assume(abs(at - spoken - 0.2) > 1e-9)
        assert pace.allows(at) == (at - spoken >= 0.2)
        spoken = at if at - spoken >= 0.2 else spoken


def test_a_clock_that_goes_on_behind_a_step_counts_only_its_own() -> None:
    clock = eta.StepClock(0.0, done=30)

    assert clock.step(31, 40, 5.0) == 5.0  # carries the warm-up
    assert clock.step(32, 40, 7.0) == 2.0

    assert clock.seconds_per_step == 2.0
    assert clock.eta_s() == 16.0
