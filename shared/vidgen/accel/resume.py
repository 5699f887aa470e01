"""Leaves a diffusers pipeline after any step, and goes on from there in another process, bit for bit.

The pipeline is called as ever: it encodes its inputs and lays out the whole schedule. Then its loop gets the latents
and the timesteps that are left, and at the first of them the scheduler is put back as it was behind the step before.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vidgen import checkpoints, diffusion, errors
from vidgen.checkpoints import UnusableError
from vidgen.engine import OnStep

log = structlog.get_logger(__name__)

ENTRY = "diffusers"  # of the file's metadata
LATENTS, GENERATOR, MADE = "latents", "generator.{}", "made.{}"
FIELDS = ("made_with", "step", "generators", "part", "scheduler", "state", "tensors")
CONFIG = "_internal_dict"  # of a scheduler: of the model, not of the run


@dataclass(frozen=True)
class Part:
    """A run's share of a task: all of it, or candidate `index` of `count` that are made one after another.

    `made` is what those before it came to: pixels of one shape.
    """

    index: int = 0
    count: int = 1
    made: tuple[torch.Tensor, ...] = ()


WHOLE = Part()


class Course(diffusion.Steps):
    """The steps of one run of a pipeline: from the first one, or on from a `state`.

    `generators` are those of the task's candidates. `made_with` is what besides model, profile and task decides over
    the numbers, such as a LoRA: a state made with something else is refused. Raises UnusableError.

    As one `part` of several it goes on from its share of a state of all, or from its own, tells the steps of all parts
    together, and leaves its own state with what the parts before it made.

    What fails behind the last step but one, such as a decode that has no room, can be tried again from there: that is
    `kept`.
    """

    def __init__(
        self, on_step: OnStep, device: torch.device, generators: Sequence[torch.Generator],
        made_with: Mapping[str, object], state: bytes | None = None, part: Part = WHOLE,
    ) -> None:  # fmt: skip
        self._generators = generators
        self._part = part
        self._made_with = {
            "diffusers": diffusers.__version__, "torch": torch.__version__, "device": device.type,
            **{k: str(v) for k, v in made_with.items()},
        }  # fmt: skip
        self._from = None if state is None else self._read(state)
        self.done: int = 0 if self._from is None else self._from["step"]
        of_all = self._from is not None and self._from["part"] is None
        if part.count > 1:
            self._generators = [generators[part.index]]
            if self._from is not None and of_all:
                self._from = _share(self._from, part.index)

        done = self.done

        def told(step: int, steps: int) -> None:
            whole = done + steps
            before = part.count * done + part.index * steps if of_all else part.index * whole + done
            on_step(before + step, part.count * whole)

        super().__init__(told, device)
        self._begun = state
        self._kept: Callable[[], bytes | None] = lambda: state

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[dict[str, Any]]:
        """What the pipeline is called with, while its scheduler does what is left."""
        given: dict[str, Any] = {
            "generator": list(self._generators),
            "callback_on_step_end": self,
            "callback_on_step_end_tensor_inputs": [LATENTS],
        }
        if self._from is None:
            yield given
            return
        with self._cut(pipe.scheduler, self._from):
            yield given | {LATENTS: self._from["tensors"][LATENTS].to(self.device)}

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step = self.done + index + 1
        try:
            answer = super().__call__(pipe, index, timestep, tensors)
        except errors.Suspended as exc:
            try:
                exc.state = self._state(pipe.scheduler, tensors[LATENTS], step)()
            except UnusableError as fault:  # then the task is handed back without
                log.warning(fault.message, _event="checkpoint_failed")
            raise
        if index + 2 == pipe.num_timesteps and self._part.count == 1:
            self._kept = self._state(pipe.scheduler, tensors[LATENTS], step)
        return answer

    def kept(self) -> bytes | None:
        """The state behind the last step but one, once that is done, else the one that this run began with."""
        try:
            return self._kept()
        except UnusableError:
            return self._begun

    def _state(self, scheduler: Any, latents: torch.Tensor, step: int) -> Callable[[], bytes]:
        """All that the steps behind `step` depend on, besides the inputs, to be packed as a safetensors file.

        Later steps may go on before it is packed: they make new tensors, and change lists in place.
        """
        generators = {GENERATOR.format(index): one.get_state() for index, one in enumerate(self._generators)}
        state = {name: list(value) if isinstance(value, list) else value
                 for name, value in vars(scheduler).items() if name != CONFIG}  # fmt: skip

        part, made_with = self._part, self._made_with

        def packed() -> bytes:
            made = {MADE.format(index): _kept(one) for index, one in enumerate(part.made)}
            tensors = {LATENTS: _kept(latents), **generators, **made}
            described = {
                "made_with": made_with, "step": step, "generators": len(generators),
                "part": {"index": part.index, "count": part.count} if part.count > 1 else None,
                "scheduler": type(scheduler).__name__,
                "state": {name: _described(value, name, tensors) for name, value in state.items()},
            }  # fmt: skip
            return save(tensors, {ENTRY: json.dumps(described)})

        return packed

    def _read(self, state: bytes) -> dict[str, Any]:
        found = _unpacked(state)
        if found["made_with"] != self._made_with:
            raise UnusableError(f"the checkpoint was made with {found['made_with']}, here are {self._made_with}")
        part = {"index": self._part.index, "count": self._part.count}
        if found["part"] is not None and found["part"] != part:
            raise UnusableError(f"the checkpoint is of part {found['part']}, this is {part}")
        expected = len(self._generators) if found["part"] is None else 1
        if found["generators"] != expected:
            raise UnusableError(f"the checkpoint is of {found['generators']} at once, not {expected}")
        return found

    @contextlib.contextmanager
    def _cut(self, scheduler: Any, found: dict[str, Any]) -> Iterator[None]:
        """Let the pipeline's next schedule begin behind the step of the state.

        Only the loop may see the cut: a multistep scheduler counts its timesteps to know which one is the last. So
        the first step brings back the whole schedule, with all that the scheduler had gathered by then.
        """
        if found["scheduler"] != type(scheduler).__name__:
            raise UnusableError(f"the checkpoint is of a {found['scheduler']}, not of a {type(scheduler).__name__}")
        tensors = found["tensors"]
        saved = {name: _restored(value, tensors) for name, value in found["state"].items()}
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        @functools.wraps(set_timesteps)  # the pipelines look at its signature
        def set_and_cut(*args: Any, **kwargs: Any) -> None:
            vars(scheduler).pop("set_timesteps", None)
            set_timesteps(*args, **kwargs)
            for name in ("timesteps", "sigmas"):
                if not torch.equal(getattr(scheduler, name).cpu(), saved[name]):
                    raise UnusableError("the checkpoint is of another schedule")
            scheduler.timesteps = scheduler.timesteps[self.done :]

        @functools.wraps(step)
        def first_step(output: torch.Tensor, timestep: Any, sample: torch.Tensor, **more: Any) -> Any:
            vars(scheduler).pop("step", None)
            if sample.dtype != tensors[LATENTS].dtype:
                raise UnusableError(f"the pipeline takes latents as {sample.dtype} and leaves {tensors[LATENTS].dtype}")
            for name, value in saved.items():
                # Where a tensor lives is the scheduler's to say: its schedule was laid out anew, the rest is the run's.
                now = vars(scheduler).get(name)
                setattr(scheduler, name, _moved(value, now.device if torch.is_tensor(now) else sample.device))
            for index, generator in enumerate(self._generators):
                generator.set_state(tensors[GENERATOR.format(index)])
            return step(output, timestep, sample, **more)

        scheduler.set_timesteps, scheduler.step = set_and_cut, first_step
        try:
            yield
        finally:
            for name in ("set_timesteps", "step"):
                vars(scheduler).pop(name, None)


def step_of(state: bytes) -> int:
    """The step behind which a state was made by a `Course`, of its own part; raises UnusableError."""
    step: int = _unpacked(state)["step"]
    return step


def part_of(state: bytes) -> Part | None:
    """The part of several that a state was left in, None for one of all of a task; raises UnusableError."""
    found = _unpacked(state)
    if found["part"] is None:
        return None
    try:
        made = tuple(found["tensors"][MADE.format(index)] for index in range(found["part"]["index"]))
        return Part(found["part"]["index"], found["part"]["count"], made)
    except (KeyError, TypeError) as exc:
        raise UnusableError("the checkpoint lacks what was made before it") from exc


def _unpacked(state: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(checkpoints.metadata_of(state)[ENTRY])
        found["tensors"] = load(state)
        found = {name: found[name] for name in FIELDS}
        names = {LATENTS, *(GENERATOR.format(index) for index in range(found["generators"]))}
        if not found["tensors"].keys() >= names or not isinstance(found["step"], int):
            raise KeyError(LATENTS)
    except (KeyError, TypeError, ValueError, SafetensorError) as exc:
        raise UnusableError(f"the checkpoint's state cannot be read: {type(exc).__name__}") from exc
    return found


def _share(found: dict[str, Any], index: int) -> dict[str, Any]:
    """One candidate's share of a state of several: of what is shaped as their latents, and its generator."""
    tensors: dict[str, torch.Tensor] = found["tensors"]
    shape = tensors[LATENTS].shape
    own = {name: one[index : index + 1] if one.shape == shape else one for name, one in tensors.items()}
    return found | {"tensors": own | {GENERATOR.format(0): tensors[GENERATOR.format(index)]}}


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _described(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON; its tensors go to `tensors`. Raises UnusableError for what could not be brought back."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if torch.is_tensor(value):
        tensors[f"scheduler.{name}"] = _kept(value)
        return {"tensor": f"scheduler.{name}"}
    if isinstance(value, list | tuple):
        items = [_described(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    raise UnusableError(f"a checkpoint cannot keep the scheduler's {name}: it is of type {type(value).__name__}")


def _restored(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `_described` was given."""
    if not isinstance(value, dict):
        return value
    [(kind, held)] = value.items()
    if kind == "tensor":
        return tensors[held]
    items = [_restored(item, tensors) for item in held]
    return tuple(items) if kind == "tuple" else items


def _moved(value: Any, device: torch.device) -> Any:
    if torch.is_tensor(value):
        return value.to(device)
    return type(value)(_moved(item, device) for item in value) if isinstance(value, list | tuple) else value
