"""Steps that are foretold: which ones, and what they get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.cache_utils import CacheMixin
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vidgen.accel import stepcache

STEPS = 20


class Line(nn.Module, CacheMixin):
    """A prediction that is a straight line over the timestep, in each guidance branch another one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[float] = []
        self.more = 0.0

    def forward(self, timestep: torch.Tensor, slope: float) -> tuple[torch.Tensor]:
        self.calls.append(float(timestep.max()))
        return (torch.full((2, 3), 1 + self.more + slope * float(timestep.max())),)


def run(
    cache: stepcache.StepCache, *models: Any, done: int = 0, steps: int = STEPS, twice: bool = False
) -> list[float]:
    """The predictions of one run, in which each model does its share of the steps; `twice`: two at each timestep."""
    cache.begin(steps, done)
    found = []
    for index in range(done, steps):
        model = models[index * len(models) // steps]
        for branch, slope in (("cond", 0.5), ("uncond", -2.0)):
            time = 1000 - 10.0 * (index // 2 * 2 if twice else index)
            with model.cache_context(branch):
                [made] = model(timestep=torch.tensor([0.0, time]), slope=slope)
            found.append(float(made[0, 0]) - (1 + slope * time))
    return found


@given(st.integers(1, 100), st.integers(1, 5))
def test_the_first_and_the_last_steps_are_computed_and_one_in_so_many_of_the_middle(steps: int, every: int) -> None:
    plan = stepcache.computed(steps, every)
    assert len(plan) == steps
    assert all(plan[: stepcache.LEAST_FIRST])
    assert all(plan[-stepcache.LAST :])
    foretold = "".join("x" if here else "." for here in plan)
    assert "." * every not in foretold
    if every == 1:
        assert all(plan)


def test_of_forty_steps_every_other_one_leaves_seventeen_out() -> None:
    assert stepcache.computed(40, 2).count(False) == 17


def test_a_draft_of_four_steps_is_computed_whole() -> None:
    assert all(stepcache.computed(4, 5))


@pytest.mark.parametrize("every", [2, 3])
def test_what_changes_in_a_straight_line_is_foretold_exactly_in_each_branch(every: int) -> None:
    model, cache = Line(), stepcache.StepCache(every)
    cache.attach([model])
    for _ in range(2):  # the second run knows nothing of the first
        model.calls.clear()
        assert run(cache, model) == pytest.approx([0.0] * 2 * STEPS, abs=1e-3)
        assert len(model.calls) == 2 * sum(stepcache.computed(STEPS, every))


def test_steps_that_have_one_timestep_are_counted_all_the_same() -> None:
    """Qwen-Image's are rounded to bfloat16: of a hundred some coincide, and the last ones were foretold."""
    model, cache = Line(), stepcache.StepCache(3)
    cache.attach([model])
    run(cache, model, twice=True)
    assert len(model.calls) == 2 * sum(stepcache.computed(STEPS, 3))


def test_an_expert_that_takes_over_computes_its_own_first_steps() -> None:
    high, low = Line(), Line()
    cache = stepcache.StepCache(4)
    cache.attach([high, low])
    assert run(cache, high, low) == pytest.approx([0.0] * 2 * STEPS, abs=1e-3)
    first = 1000 - 10.0 * (STEPS // 2)
    assert low.calls[:4] == [first, first, first - 10, first - 10]


def test_a_run_that_goes_on_from_a_checkpoint_leaves_out_the_same_steps_once_it_has_two() -> None:
    whole, rest = Line(), Line()
    cache, resumed = stepcache.StepCache(2), stepcache.StepCache(2)
    cache.attach([whole])
    resumed.attach([rest])
    run(cache, whole)
    run(resumed, rest, done=7)
    assert [time for time in rest.calls if time < 1000 - 10.0 * 9] == [t for t in whole.calls if t < 1000 - 10.0 * 9]


@pytest.mark.parametrize("done", range(3, STEPS - 2))
def test_nothing_is_foretold_from_another_run(done: int) -> None:
    """The run before may have been of another task; one that goes on may have a step to leave out as its first."""
    model, cache = Line(), stepcache.StepCache(2)
    cache.attach([model])
    run(cache, model)
    model.more = 100.0
    assert run(cache, model, done=done) == pytest.approx([100.0] * 2 * (STEPS - done), abs=1e-3)


def test_two_predictions_of_one_moment_make_no_line() -> None:
    known = stepcache._Known()
    known.add(500.0, torch.zeros(1))
    known.add(500.0, torch.ones(1))
    assert not known.makes_a_line
    known.add(490.0, torch.ones(1))
    assert known.makes_a_line


def test_what_is_foretold_in_bfloat16_is_not_rounded_on_the_way() -> None:
    known = stepcache._Known()
    known.add(990.0, torch.tensor([1.0], dtype=torch.bfloat16))
    known.add(980.0, torch.tensor([0.5], dtype=torch.bfloat16))
    made = known.at(970.0)
    assert made.dtype is torch.bfloat16
    assert float(made) == pytest.approx(0.0, abs=1e-6)


def test_a_step_that_nobody_told_of_is_computed() -> None:
    model, cache = Line(), stepcache.StepCache(3)
    cache.attach([model])
    run(cache, model, steps=10)
    for time in (500.0, 490.0, 480.0):
        with model.cache_context("cond"):
            model(timestep=torch.tensor([0.0, time]), slope=0.5)
    assert model.calls[-3:] == [500.0, 490.0, 480.0]
