"""The autoscaler's arithmetic: KEDA's at its polls, the HPA's at its syncs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen.planning import scaling
from vidgen.planning.scaling import Scaling


@pytest.mark.parametrize(("backlog", "ahead", "expected"), [(0, 0, 0), (5, 0, 5), (0, 50, 1), (3, 2, 3)])
def test_work_of_the_stage_before_asks_for_one_replica_at_least(backlog: int, ahead: int, expected: int) -> None:
    assert scaling.value(backlog, ahead) == expected


@pytest.mark.parametrize(
    ("value", "lag", "expected"), [(0, 2, 0), (1, 2, 1), (2, 2, 1), (5, 2, 3), (50, 2, 25), (5, 15, 1), (50, 15, 4)]
)
def test_replicas_are_one_for_each_threshold_and_one_for_the_rest(value: int, lag: int, expected: int) -> None:
    assert scaling.replicas(value, lag) == expected


def test_a_poll_starts_the_first_replica_and_leaves_the_others_to_the_hpa() -> None:
    some = Scaling(most=10, lag_threshold=2)

    assert some.polled(50, 0, 0) == 1
    assert some.polled(50, 3, 0) == 3


def test_a_poll_ends_all_replicas_when_the_cooldown_is_over() -> None:
    some = Scaling(most=10, cooldown_s=300)

    assert some.polled(0, 4, 300) == 4
    assert some.polled(0, 4, 301) == 0


def test_a_poll_ends_nothing_where_there_is_a_floor() -> None:
    assert Scaling(floor=1, most=10, cooldown_s=300).polled(0, 4, 1000) == 4


def synced(some: Scaling, value: float, current: int, lately: int = 0) -> int:
    return some.synced(some.asked(value, current), current, lately=lately, may_end=True)


def test_a_sync_starts_nothing_from_zero_and_ends_nothing_without_a_floor() -> None:
    some = Scaling(most=10, lag_threshold=2)

    assert synced(some, 50, 0) == 0
    assert synced(some, 2, 6) == 6


def test_a_sync_that_finds_no_work_asks_for_one_as_only_a_poll_ends_the_last() -> None:
    assert Scaling(most=10).asked(0, 3) == 1
    assert Scaling(floor=2, most=10).asked(0, 3) == 2


def test_a_sync_at_most_doubles_or_adds_four() -> None:
    some = Scaling(most=100, lag_threshold=1)

    assert [synced(some, 100, current) for current in (1, 4, 30, 90)] == [5, 8, 60, 100]


def test_a_sync_leaves_what_is_within_a_tenth() -> None:
    some = Scaling(most=100, lag_threshold=10)

    assert synced(some, 109, 10) == 10
    assert synced(some, 111, 10) == 12


def test_with_a_floor_a_sync_ends_one_replica_that_nothing_asked_for_lately() -> None:
    some = Scaling(floor=1, most=10, lag_threshold=2)

    assert synced(some, 2, 6, lately=4) == 5
    assert synced(some, 2, 6, lately=6) == 6
    assert some.synced(1, 6, lately=1, may_end=False) == 6
    assert synced(some, 0, 1, lately=1) == 1


@given(
    st.integers(0, 10_000), st.integers(0, 40), st.floats(0, 1e6), st.integers(0, 20), st.integers(0, 20),
    st.integers(1, 100), st.integers(0, 40),
)  # fmt: skip
def test_replicas_stay_between_floor_and_most(
    value: int, current: int, idle_s: float, floor: int, more: int, lag: int, lately: int
) -> None:
    some = Scaling(floor=floor, most=max(1, floor + more), lag_threshold=lag)
    current = min(max(current, floor), some.most)

    for after in (some.polled(value, current, idle_s), synced(some, value, current, lately)):
        assert floor <= after <= some.most
