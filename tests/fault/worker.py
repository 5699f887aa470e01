"""A worker of both stages whose engines keep a journal, go on from checkpoints, and misbehave as a prompt tells them.

What it makes is named by seed and steps alone, so whoever computed it, and in how many parts, its bytes are known.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines import MP4, safetensors
from tests.fault import memory

from vidgen import checkpoints, choice, errors, service
from vidgen.contracts import EditWork, Stage, Work
from vidgen.engine import EngineInfo, Finished, Generated, OnStep
from vidgen.settings import WorkerSettings

PAD = 2048
MEMORY = 512 << 20  # bytes that a worker may have where they are limited


def made_of(stage: Stage, seed: int, steps: int, pad: int = PAD) -> bytes:
    """The file that a task of this seed makes when every step was done once, and in order."""
    return _file(stage, f"{stage} {seed}:" + "".join(f" {step}" for step in range(1, steps + 1)), pad)


def _file(stage: Stage, made: str, pad: int) -> bytes:
    # Noise, so that no byte of it can be missing unseen.
    told = made.encode() + b"\0" + (zlib.crc32(made.encode()).to_bytes(4, "big") * (pad // 4))
    if stage == "i2v":
        return MP4[:-8] + struct.pack(">I", 8 + len(told)) + b"mdat" + told
    image = zlib.compress(b"\0\x80\x40\x20")
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), (b"tEXt", b"made\0" + told), (b"IDAT", image))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in (*chunks, (b"IEND", b"")))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@dataclass(frozen=True)
class Entry:
    """A line of a journal: what an engine did, and in which process."""

    pid: int
    worker: str
    stage: Stage
    seed: int
    what: str
    step: int


def entries(folder: Path) -> list[Entry]:
    """What all engines wrote, by process."""
    lines = [line for path in sorted(folder.glob("*.journal")) for line in path.read_text().splitlines()]
    return [Entry(**json.loads(line)) for line in lines]


class Told:
    """Paced, resumable, and does what the prompt tells it at its second step."""

    def __init__(self, stage: Stage, settings: WorkerSettings) -> None:
        self.info = EngineInfo(name="told", model="none", revision="1", profile="test")
        self._stage, self._worker = stage, settings.worker_id
        self._pace, self._pad = float(os.environ["FAULT_PACE"]), int(os.environ.get("FAULT_PAD", PAD))
        self._sick, self._hangs = "FAULT_SICK" in os.environ, "FAULT_HANGS" in os.environ
        path = Path(os.environ["FAULT_JOURNALS"]) / f"{os.getpid()}.journal"
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def setup(self) -> dict[str, float]:
        return {}

    def prepare(self, work: Work, files: Sequence[Path]) -> Any:
        for file in files:
            assert file.stat().st_size > 0
        _do(_told(work), "prepared")
        return work

    def generate(self, inputs: Any, on_step: OnStep) -> Generated:
        return self.resume(inputs, on_step, None)

    def resume(self, inputs: Any, on_step: OnStep, state: bytes | None) -> Generated:
        if self._sick:
            raise errors.FatalError("the device fell off the bus", code="device_lost")
        work: Work = inputs
        done, made = 0, f"{self._stage} {work.seed}:"
        if state is not None:
            kept = checkpoints.metadata_of(state)
            done, made = int(kept["step"]), kept["made"]
        self._write(work, "started", done)
        _do(_told(work), "begun")
        begun = time.monotonic()
        for step in range(done + 1, work.steps + 1):
            time.sleep(self._pace)
            if step == 2:
                _do("hang" if self._hangs else _told(work), "midway")
            made += f" {step}"
            self._write(work, "step", step)
            try:
                on_step(step, work.steps)
            except errors.Suspended as exc:
                exc.state = safetensors({"step": str(step), "made": made})
                raise
        self._write(work, "done", work.steps)
        return Generated((work, made), denoise_s=time.monotonic() - begun, decode_s=0.0)

    def finish(self, output: Any, folder: Path) -> tuple[Finished, ...]:
        work, made = output
        _do(_told(work), "finished")
        edit = isinstance(work, EditWork)
        path = folder / ("edit-0.png" if edit else "video.mp4")
        path.write_bytes(_file(self._stage, made, self._pad))
        return (Finished(path, "image/png" if edit else "video/mp4", 1, 1),)

    def _write(self, work: Work, what: str, step: int) -> None:
        line = {
            "pid": os.getpid(), "worker": self._worker, "stage": self._stage, "seed": work.seed, "what": what,
            "step": step,
        }  # fmt: skip
        os.write(self._journal, json.dumps(line).encode() + b"\n")  # in the kernel now: no kill can take it back


def _told(work: Work) -> str:
    return work.user_prompt if isinstance(work, EditWork) else work.prompt


def _do(prompt: str, when: str) -> None:
    """What a task does to the process that runs it: in the midst of its steps, or when its prompt says."""
    what, _, at = prompt.partition(" ")
    if (at or "midway") != when:
        return
    match what:
        case "exit":
            os._exit(3)
        case "segv":
            ctypes.string_at(0)
        case "oom" if "FAULT_MEMORY" in os.environ:
            b"x" * (4 * MEMORY)  # and here the kernel ends it
        case "oom":
            # As native code ends where an allocation fails.
            resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
            try:
                bytearray(1 << 30)
            except MemoryError:
                os.abort()
        case "hang":
            threading.Event().wait()


def main() -> None:
    if "FAULT_MEMORY" in os.environ:
        memory.enter(Path(os.environ["FAULT_MEMORY"]), MEMORY)

    def maker(stage: Stage) -> service.MakeEngine:
        def make(settings: WorkerSettings, _chosen: choice.Choice) -> Any:
            return Told(stage, settings)

        return make

    sys.exit(service.run_stages({"edit": maker("edit"), "i2v": maker("i2v")}, "worker"))
