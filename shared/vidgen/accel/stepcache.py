"""Denoising steps that are foretold from the ones before instead of computed: faster, lossy, off by default.

The prediction of a flow-matching model changes little from one step of the middle to the next. A step that is left out
gets what a straight line through the last two computed predictions says at its timestep: the first-order form of the
forecast in TaylorSeer (arXiv:2503.06923), of the whole transformer's output, so that compiled blocks stay whole.
Which steps are left out depends on their number alone: a run costs the same whatever its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

HOOK = "vidgen_step_cache"
# The picture's layout is decided in the first steps, its detail in the last ones: these are always computed.
FIRST_SHARE, LEAST_FIRST, LAST = 0.1, 3, 2


def computed(steps: int, every: int) -> tuple[bool, ...]:
    """Which of so many steps are computed where one in `every` of the middle is."""
    first = max(LEAST_FIRST, math.ceil(FIRST_SHARE * steps))
    return tuple(index < first or index >= steps - LAST or (index - first + 1) % every == 0 for index in range(steps))


@dataclass
class _Known(BaseState):
    """The last two computed predictions of one guidance branch, older first, with their timesteps."""

    times: list[float] = field(default_factory=list)
    predictions: list[torch.Tensor] = field(default_factory=list)

    def reset(self) -> None:
        self.times, self.predictions = [], []

    def add(self, time: float, prediction: torch.Tensor) -> None:
        self.times = [*self.times[-1:], time]
        self.predictions = [*self.predictions[-1:], prediction]

    @property
    def makes_a_line(self) -> bool:
        return len(self.times) == 2 and self.times[0] != self.times[1]

    def at(self, time: float) -> torch.Tensor:
        (earlier, later), (before, last) = self.times, self.predictions
        # Differences of predictions that are alike are lost in bfloat16.
        slope = (last.float() - before.float()) / (later - earlier)
        return (last.float() + slope * (time - later)).to(last.dtype)


class StepCache:
    """Lets transformers leave out steps: one in `every` of the middle of a run is computed.

    `begin` before each run of the pipeline. An expert that takes over in the middle computes its own first two steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._plan: tuple[bool, ...] = ()
        self._index = -1
        self._time: float | None = None
        self._asked: list[object] = []
        self._transformers: Sequence[Any] = ()

    def attach(self, transformers: Sequence[Any]) -> None:
        """Watch the transformers of a pipeline; their blocks are left alone."""
        self._transformers = transformers
        for model in transformers:
            registry = HookRegistry.check_if_exists_or_initialize(model)
            registry.remove_hook(HOOK, recurse=False)
            registry.register_hook(_Foretold(self), HOOK)

    def begin(self, steps: int, done: int = 0) -> None:
        """Forget the run before; this one has so many steps, of which `done` were made elsewhere."""
        self._plan, self._index, self._time = computed(steps, self.every), done - 1, None
        for model in self._transformers:
            model._diffusers_hook.reset_stateful_hooks(recurse=False)

    def computes(self, time: float, branch: object) -> bool:
        """Whether the step at this timestep is to be computed; asked once by each guidance branch."""
        # In bfloat16 two steps can have one timestep: then the second is the one in which a branch asks once more.
        if time != self._time or any(one is branch for one in self._asked):
            self._time, self._index, self._asked = time, self._index + 1, []
        self._asked.append(branch)
        return self._index >= len(self._plan) or self._plan[self._index]


class _Foretold(ModelHook):
    """Answers for a transformer where its next prediction is foretold."""

    _is_stateful = True

    def __init__(self, cache: StepCache) -> None:
        super().__init__()
        self._cache = cache
        self.state_manager = StateManager(_Known)

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Per token where the first frame is given: the others have the timestep.
        time = float(kwargs["timestep"].max())
        known: _Known = self.state_manager.get_state()
        computes = self._cache.computes(time, known)
        if not computes and known.makes_a_line:
            return (known.at(time),)
        made = self.fn_ref.original_forward(*args, **kwargs)
        known.add(time, made[0])
        return made

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.state_manager.reset()
        return module
