"""A zoo of engines: one that does nothing at no cost, and one for each way in which an engine misbehaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edit_service.engine.preview import PreviewEditEngine
from vidgen import checkpoints, errors, profiles
from vidgen.contracts import EditWork, I2VWork, Work
from vidgen.engine import EngineInfo, Finished, Generated, OnStep
from vidgen.turn import Phase

PATIENCE = 90.0  # an engine that is never released gives up, so that a broken test ends
SIDE = 16


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


PNG = (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    + _chunk(b"IDAT", zlib.compress((b"\0" + b"\x80\x40\x20" * SIDE) * SIDE))
    + _chunk(b"IEND", b"")
)
MP4 = struct.pack(">I", 24) + b"ftypisom\0\0\2\0isommp41" + struct.pack(">I", 8) + b"mdat"  # a box, no video


class Instant:
    """Walks through the steps and writes a tiny valid PNG, or a file that only looks like an MP4.

    `calls` is what was called, in order; `png` and `mp4` may be replaced by contents of another size.
    """

    def __init__(self, *, png: bytes = PNG, mp4: bytes = MP4) -> None:
        self.info = EngineInfo(name=type(self).__name__.lower(), model="none", revision="1", profile="test")
        self.png, self.mp4 = png, mp4
        self.calls: list[str] = []

    def setup(self) -> dict[str, float]:
        self.calls.append("setup")
        return {"weights": 0.5}

    def prepare(self, work: Work, files: Sequence[Path]) -> Any:
        self.calls.append("prepare")
        for file in files:
            assert file.stat().st_size > 0
        return work

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        self.calls.append("generate")
        work: Work = inputs
        for step in range(1, work.steps + 1):
            self.step(step, work.steps, on_step)
        return Generated(work, denoise_s=0.0, decode_s=0.0)

    def step(self, step: int, steps: int, on_step: OnStep) -> None:
        on_step(step, steps)

    def finish(self, output: Any, folder: Path) -> tuple[Finished, ...]:
        self.calls.append("finish")
        if isinstance(output, I2VWork):
            path = folder / "video.mp4"
            path.write_bytes(self.mp4)
            return (Finished(path, "video/mp4", output.width, output.height, output.num_frames, output.fps),)
        assert isinstance(output, EditWork)
        paths = [folder / f"edit-{n}.png" for n in range(output.candidates)]
        for path in paths:
            path.write_bytes(self.png)
        return tuple(Finished(path, "image/png", SIDE, SIDE) for path in paths)


class Paced(Instant):
    """Holds the device: for `seconds` a task, or from the first step on until `released`.

    `started` is set when it holds. It reports its step all the while, so a cancel gets through.
    """

    def __init__(self, seconds: float = 0.0, released: threading.Event | None = None, **files: bytes) -> None:
        super().__init__(**files)
        self.seconds, self.released, self.started = seconds, released, threading.Event()

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        begun = time.monotonic()
        made = super().generate(inputs, on_step)
        return Generated(made.output, denoise_s=time.monotonic() - begun, decode_s=0.0)

    def step(self, step: int, steps: int, on_step: OnStep) -> None:
        self.started.set()
        if self.released is None:
            time.sleep(self.seconds / steps)
        else:
            give_up = time.monotonic() + PATIENCE
            while not self.released.wait(0.01) and time.monotonic() < give_up:
                on_step(step, steps)
        on_step(step, steps)


class FailsOnce(Instant):
    """A passing fault: the first `times` tasks fail, later ones succeed."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.left = times

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        if self.left > 0:
            self.left -= 1
            raise errors.RetryableError("out of memory, this once", code="out_of_memory")
        return super().generate(inputs, on_step)


class AlwaysRetryable(Instant):
    """A passing fault that never passes."""

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        self.calls.append("generate")
        raise errors.RetryableError("out of memory, as always", code="out_of_memory")


class Rejects(Instant):
    """Takes no task for good."""

    def prepare(self, work: Work, files: Sequence[Path]) -> Any:
        self.calls.append("prepare")
        raise errors.RejectedError("the image cannot be read: send a PNG or a JPEG", code="bad_image")


class Picky(PreviewEditEngine):
    """The preview, but whoever asks for the impossible is turned down as by `Rejects`.

    What is endless stands at its third step, of which it tells all the while, until it is cancelled.
    """

    def prepare(self, work: Work, files: Sequence[Path]) -> Any:
        return (Rejects() if "impossible" in work.prompt else super()).prepare(work, files)

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        give_up = time.monotonic() + 4 * PATIENCE  # a browser on a busy machine takes its time

        def stand(step: int, steps: int) -> None:
            while step == 3 and time.monotonic() < give_up:
                on_step(step, steps)
                time.sleep(0.05)
            on_step(step, steps)

        return super().generate(inputs, stand if "endless" in inputs.work.prompt else on_step)


class FatalOnGenerate(Instant):
    """Loses its device in the middle of a task."""

    def step(self, step: int, steps: int, on_step: OnStep) -> None:
        raise errors.FatalError("the device fell off the bus", code="device_lost")


class Breaks(Instant):
    """Has a bug: raises what no engine should."""

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        raise ZeroDivisionError("a bug in the engine")


class KillsItself(Instant):
    """Takes its whole process with it, before any `except` can look."""

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


class Naps(Paced):
    """Is too large to share a GPU with another of its kind, and insists on being awake where it generates."""

    GPU = 40 << 30

    def __init__(self) -> None:
        super().__init__(seconds=0.05)
        self.asleep = False

    def demand(self) -> profiles.Demand | None:
        return profiles.Demand("naps", self.GPU, {"transformer": self.GPU, "vae": 4 << 30}, 4 << 30)

    def settle_for(self, profile: profiles.Name, room: int) -> None:
        self.info = replace(self.info, profile=profile)

    def sleep(self) -> None:
        assert not self.asleep
        self.asleep = True

    def wake(self) -> None:
        assert self.asleep
        self.asleep = False

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        assert not self.asleep
        return super().generate(inputs, on_step)


class Hangs(Instant):
    """Never comes to its first step, or to the end of another phase, until `released`; hears of no cancel."""

    def __init__(self, phase: Phase = "generating") -> None:
        super().__init__()
        self.phase = phase
        self.started, self.released = threading.Event(), threading.Event()

    def prepare(self, work: Work, files: Sequence[Path]) -> Any:
        self._hang("preparing")
        return super().prepare(work, files)

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        self._hang("generating")
        return super().generate(inputs, on_step)

    def finish(self, output: Any, folder: Path) -> tuple[Finished, ...]:
        self._hang("finishing")
        return super().finish(output, folder)

    def _hang(self, phase: Phase) -> None:
        if phase == self.phase:
            self.started.set()
            self.released.wait(PATIENCE)


class FullBesideAHang(Instant):
    """A clip hangs on the device, for ever; then the disk is full behind an edit of the same process."""

    _hangs = threading.Event()

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        if isinstance(inputs, I2VWork):
            self._hangs.set()
            threading.Event().wait()
        return super().generate(inputs, on_step)

    def finish(self, output: Any, folder: Path) -> tuple[Finished, ...]:
        self._hangs.wait(PATIENCE)
        raise OSError(errno.ENOSPC, "no space left on device")


class ShortOfMemory(Instant):
    """Runs out of memory behind step 3, and makes the candidates one after another; `fault` comes after that."""

    def __init__(self, fault: errors.VidgenError | None = None) -> None:
        super().__init__()
        self.fault = fault

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        steps = inputs.steps * inputs.candidates
        for step, of in [*((k, inputs.steps) for k in (1, 2, 3)), *((k, steps) for k in range(1, steps + 1))]:
            on_step(step, of)
        if self.fault is not None:
            raise self.fault
        return Generated(inputs, denoise_s=0.0, decode_s=0.0, rungs=("one_by_one",))


class LiesAboutSteps(Instant):
    """Counts backwards, past the end and from zero."""

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        steps = inputs.steps
        for step, of in ((0, steps), (steps + 7, steps), (2, steps), (1, 0), (-1, steps)):
            on_step(step, of)
        return Generated(inputs, denoise_s=0.0, decode_s=0.0)


class WritesNothing(Instant):
    """Says that it wrote a file, and did not."""

    def finish(self, output: Any, folder: Path) -> tuple[Finished, ...]:
        found = super().finish(output, folder)
        for file in found:
            file.path.unlink()
        return found


class DiesInSetup(Instant):
    """Finds no weights."""

    def setup(self) -> dict[str, float]:
        raise errors.FatalError("the weights are not there: set VIDGEN_EDIT_MODEL", code="weights_missing")


class Gate:
    """A place where an engine waits: `reached` when it is there, on it goes when `opened`."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def open(self) -> None:
        self.opened.set()


class Gated(Instant):
    """Waits wherever a test put a gate: in `prepare`, in `finish`, or in `generate` before a step ends.

    Tasks are told apart by their seed. A gate is passed once: what comes later finds it open.
    """

    def __init__(self) -> None:
        super().__init__()
        self._gates: dict[tuple[str, int, int], Gate] = {}
        self.generated: list[int] = []

    def hold(self, phase: str, seed: int = 7, step: int = 0) -> Gate:
        return self._gates.setdefault((phase, seed, step), Gate())

    def open_all(self) -> None:
        for gate in self._gates.values():
            gate.open()

    def prepare(self, work: Work, files: Sequence[Path]) -> Any:
        self._pass("prepare", work.seed)
        return super().prepare(work, files)

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        self.calls.append("generate")
        work: Work = inputs
        self.generated.append(work.seed)
        self._pass("generate", work.seed)
        for step in range(1, work.steps + 1):
            self._pass("generate", work.seed, step)
            on_step(step, work.steps)
        return Generated(work, denoise_s=0.0, decode_s=0.0)

    def finish(self, output: Any, folder: Path) -> tuple[Finished, ...]:
        self._pass("finish", output.seed)
        return super().finish(output, folder)

    def _pass(self, phase: str, seed: int, step: int = 0) -> None:
        gate = self._gates.get((phase, seed, step))
        if gate is not None:
            gate.reached.set()
            gate.opened.wait(PATIENCE)


class Resumes(Gated):
    """Can be left after any step and gone on with. What it makes depends on every step before.

    `seen` are the steps that it did, `made` what came out; its state is a safetensors file without tensors.
    """

    def __init__(self, *, leaves: bool = True) -> None:
        super().__init__()
        self.info = replace(self.info, name="resumes")  # whatever a test makes of it
        self.leaves = leaves
        self.seen: list[int] = []
        self.made: list[str] = []

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        return self.resume(inputs, on_step, None)

    def resume(self, inputs: Any, on_step: OnStep, state: bytes | None) -> Generated:
        work: Work = inputs
        done, made = 0, f"{work.seed}:"
        if state is not None:
            kept = checkpoints.metadata_of(state)
            if "made" not in kept:
                raise checkpoints.UnusableError("nothing of this engine's is in the state")
            done, made = int(kept["step"]), kept["made"]
        self.generated.append(work.seed)
        self._pass("generate", work.seed)
        for step in range(done + 1, work.steps + 1):
            self._pass("generate", work.seed, step)
            self.seen.append(step)
            made += f" {step}"
            try:
                on_step(step, work.steps)
            except errors.Suspended as exc:
                exc.state = safetensors({"step": str(step), "made": made}) if self.leaves else None
                raise
        self.made.append(made)
        return Generated(work, denoise_s=0.0, decode_s=0.0)


def safetensors(metadata: dict[str, str], tensors: bytes = b"") -> bytes:
    """The smallest file of that format: metadata, and bytes that no tensor owns."""
    table = json.dumps({"__metadata__": metadata}).encode()
    return len(table).to_bytes(8, "little") + table + tensors
