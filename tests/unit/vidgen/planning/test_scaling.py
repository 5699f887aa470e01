"""The autoscaler's arithmetic: KEDA's at its polls, the HPA's at its syncs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen.planning import scaling
from vidgen.planning.scaling import Scaling


@pytest.mark.parametrize(("backlog", "ahead", "expected"), [(0, 0, 0), (5, 0, 5), (0, 50, 1), (3, 2, 4)])
def test_work_of_the_stage_before_counts_as_one(backlog: int, ahead: int, expected: int) -> None:
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


def test_a_poll_ends_all_replicas_but_the_floor_when_the_cooldown_is_over() -> None:
    some = Scaling(floor=1, most=10, cooldown_s=300)

    assert some.polled(0, 4, 300) == 4
    assert some.polled(0, 4, 301) == 1


def test_a_sync_starts_nothing_from_zero_and_never_scales_down() -> None:
    some = Scaling(most=10, lag_threshold=2)

    assert some.synced(50, 0) == 0
    assert some.synced(2, 6) == 6


def test_a_sync_at_most_doubles_or_adds_four() -> None:
    some = Scaling(most=100, lag_threshold=1)

    assert [some.synced(100, current) for current in (1, 4, 30, 90)] == [5, 8, 60, 100]


def test_a_sync_leaves_what_is_within_a_tenth() -> None:
    some = Scaling(most=100, lag_threshold=10)

    assert some.synced(109, 10) == 10
    assert some.synced(111, 10) == 12


@given(
    st.integers(0, 10_000), st.integers(0, 40), st.floats(0, 1e6), st.integers(0, 20), st.integers(0, 20),
    st.integers(1, 100),
)  # fmt: skip
def test_replicas_stay_between_floor_and_most(
    value: int, current: int, idle_s: float, floor: int, more: int, lag: int
) -> None:
    some = Scaling(floor=floor, most=max(1, floor + more), lag_threshold=lag)
    current = min(max(current, floor), some.most)

    for after in (some.polled(value, current, idle_s), some.synced(value, current)):
        assert floor <= after <= some.most
