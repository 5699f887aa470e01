"""The seam between the runtime and a model: prepare, generate, finish, apart so that the GPU never waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from vidgen import profiles
from vidgen.contracts import GpuFigures, Work
from vidgen.frames import roomy

# What an engine can do without for the length of a task, in this order: the candidates made one after another, the
# VAE in tiles, the weights streamed from the host's memory.
Rung = Literal["one_by_one", "vae_tiling", "offload"]

T = TypeVar("T")


@dataclass(frozen=True)
class EngineInfo:
    """Who made a result: written into the job record, the registry and the artifact."""

    name: str
    model: str
    revision: str | None = None
    profile: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Generated:
    """What `generate` hands to `finish`, how long its two GPU phases took, and what was done for want of memory."""

    output: Any
    denoise_s: float
    decode_s: float
    rungs: tuple[Rung, ...] = ()


@dataclass(frozen=True)
class Finished:
    """A file that `finish` wrote, with what the manifest says of it."""

    path: Path
    content_type: str
    width: int
    height: int
    frames: int | None = None
    fps: int | None = None


class OnStep(Protocol):
    """Called after each denoising step; raises `errors.Cancelled` to stop the engine there.

    An engine that ran out of memory begins again: it says so with step 0, before what that takes. Then `step` goes
    back, and `steps` may be another number.

    `errors.Suspended`, one of those, asks an engine that is `Resumable` for its state.
    """

    def __call__(self, step: int, steps: int) -> None: ...


class Engine(Protocol):
    """One model on one device.

    `setup` once; then `prepare` and `finish` (CPU, any thread, several at a time) around `generate` (the device, one
    call at a time, always in the same thread). An engine raises `RejectedError` for a task that can never work,
    `RetryableError` for one that may work later and `FatalError` when the device or the weights are lost; whatever
    `on_step` raises passes through unchanged and leaves the engine usable.
    """

    info: EngineInfo

    def setup(self) -> Mapping[str, float]:
        """Load and warm up; afterwards `info` is complete. Returns the seconds that each phase took."""

    def prepare(self, work: Work, files: Sequence[Path]) -> Any:
        """Decode and lay out the inputs on the CPU."""

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        """Run the model; `on_step(k, n)` after step k of n, k from 1."""

    def finish(self, output: Any, folder: Path) -> tuple[Finished, ...]:
        """Encode `Generated.output` into files in `folder`, named as the artifacts are (`edit-0.png`, `video.mp4`)."""


@runtime_checkable
class Resumable(Protocol):
    """What an engine has besides where its `generate` can be gone on with elsewhere, and with the same result.

    Where `on_step` raises `Suspended`, `generate` and `resume` put into it all that the rest depends on.
    """

    def resume(self, inputs: Any, on_step: OnStep, state: bytes) -> Generated:
        """Go on from the step in `state`: `on_step(k, n)` begins behind it.

        Raises `checkpoints.UnusableError`, before any step, for a state that does not fit this engine.
        """


@runtime_checkable
class Sleeper(Protocol):
    """What an engine has besides where it can share its device with other engines; all of it in the device's thread.

    `demand` and `settle_for` come before `setup`. Asleep, an engine can `prepare` and `finish`, but not `generate`.
    """

    def demand(self) -> profiles.Demand | None:
        """What its model asks of its GPU; None where it is not to have one. Raises FatalError."""

    def settle_for(self, profile: profiles.Name, room: int) -> None:
        """Take this profile instead of the one that it would choose alone.

        Where weights stream, `room` bytes of the GPU are left for those that better stay.
        """

    def sleep(self) -> None:
        """Leave the device's memory to another engine; raises RetryableError if memory ran out, else FatalError.

        Then it is awake as before.
        """

    def wake(self) -> None:
        """Come back, to give the same results as if it had never slept; raises as `sleep` does.

        Then it is asleep as before.
        """


def in_thread(work: Callable[..., T]) -> Callable[..., T]:
    """What an engine does, to be called in a thread.

    Before Python 3.12 no future takes a StopIteration, and whoever waits for one that should have would for ever.
    """

    def call(*given: Any) -> T:
        try:
            return work(*given)
        except StopIteration as exc:
            raise RuntimeError("the engine raised StopIteration") from exc

    return roomy(call)


class GpuMonitor(Protocol):
    """Reads the devices that this process uses."""

    def read(self) -> tuple[GpuFigures, ...]:
        """The figures now; never raises, a figure that cannot be read is None."""
