"""A task's state in the middle of its denoising, kept in the object store: one safetensors file, never pickle.

The engine gives the tensors, and metadata of its own; the runtime adds a header that says whose they are. Which
checkpoint is good is said by the job's log alone: an attempt stores its own under a key of its own, and the event that
hands the task back names it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from vidgen import contracts, errors, results
from vidgen.artifacts import CHECKPOINTS, ArtifactStore
from vidgen.contracts import Message, Task
from vidgen.engine import EngineInfo

CONTENT_TYPE = "application/octet-stream"
MAX_BYTES = 1 << 30  # four tensors of the latents of 257 frames at 720p are a quarter of that
MAX_TABLE_BYTES = 1 << 20
LENGTH_BYTES = 8
METADATA, HEADER = "__metadata__", "vidgen"


class UnusableError(errors.VidgenError):
    """The checkpoint does not fit what it is to be used for."""

    code = "checkpoint_unusable"


class Header(Message):
    """Whose state it is: a task goes on from it only where all of this is the same."""

    schema_version: Literal[2] = 2
    fingerprint: str
    engine: str
    model: str
    revision: str | None = None
    profile: str | None = None
    step: int
    steps: int
    sha256: str


@dataclass(frozen=True)
class Found:
    """A checkpoint that fits: the step after which it was made, and what the engine goes on from."""

    step: int
    state: bytes


def key(task: Task, attempt: int) -> str:
    """Where an attempt at a task keeps its state: a key names one content here, too."""
    return f"{CHECKPOINTS}{task.job_id}/{task.stage}-{task.run}-{attempt}.safetensors"


async def keep(
    store: ArtifactStore, task: Task, attempt: int, info: EngineInfo, suspended: errors.Suspended, folder: Path
) -> contracts.Checkpoint:
    """Store what an engine left; raises StoreError, and UnusableError for what is no state."""
    if suspended.state is None:
        raise UnusableError("the engine left no state")
    path = folder / "checkpoint"
    await asyncio.to_thread(write, path, suspended.state, task, info, suspended.step, suspended.steps)
    await store.put(key(task, attempt), path, CONTENT_TYPE)
    return contracts.Checkpoint(attempt=attempt, step=suspended.step, steps=suspended.steps)


async def fetch(
    store: ArtifactStore, task: Task, checkpoint: contracts.Checkpoint, info: EngineInfo, folder: Path
) -> Found:
    """A stored state for this very task and engine; raises NotFoundError, StoreError and UnusableError."""
    path = folder / "checkpoint"
    try:
        await store.fetch(key(task, checkpoint.attempt), path, MAX_BYTES)
    except errors.NotFoundError:
        raise
    except errors.RejectedError as exc:  # of the checkpoint, not of the task
        raise UnusableError(exc.message) from exc
    return await asyncio.to_thread(read, path, task, info)


def write(path: Path, state: bytes, task: Task, info: EngineInfo, step: int, steps: int) -> None:
    """Write an engine's state with a header; raises UnusableError for one that is no safetensors file, or too large."""
    table, tensors = _split(state)
    header = Header(
        fingerprint=results.fingerprint(task), engine=info.name, model=info.model, revision=info.revision,
        profile=info.profile, step=step, steps=steps, sha256=_digest(table, tensors),
    )  # fmt: skip
    table[METADATA] = {**table.get(METADATA, {}), HEADER: header.model_dump_json()}
    packed = json.dumps(table, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % LENGTH_BYTES)  # tensors begin aligned
    if len(packed) + len(tensors) > MAX_BYTES - LENGTH_BYTES:
        raise UnusableError(f"the state has {len(tensors):,} bytes, more than {MAX_BYTES:,} are not kept")
    try:
        with path.open("wb") as file:
            file.write(len(packed).to_bytes(LENGTH_BYTES, "little"))
            file.write(packed)
            file.write(tensors)
    except OSError as exc:
        raise errors.StoreError(f"the checkpoint could not be written: {exc.strerror}") from exc


def read(path: Path, task: Task, info: EngineInfo) -> Found:
    """What `write` wrote for this very task and engine; raises UnusableError with what differs."""
    state = path.read_bytes()
    table, tensors = _split(state)
    try:
        header = Header.model_validate_json(table[METADATA][HEADER])
    except (KeyError, TypeError, pydantic.ValidationError) as exc:
        raise UnusableError("the checkpoint is of another version of this program") from exc
    if _digest(table, tensors) != header.sha256:
        raise UnusableError("the checkpoint is damaged: it is not what was stored")
    differs = difference(header, task, info)
    if differs is not None:
        raise UnusableError(differs)
    return Found(header.step, state)


def difference(header: Header, task: Task, info: EngineInfo) -> str | None:
    """Why a task cannot go on from a checkpoint on an engine; None if it can."""
    if header.fingerprint != results.fingerprint(task):
        return "the checkpoint is of another task"
    here: dict[str, str | None] = {
        "engine": info.name, "model": info.model, "revision": info.revision, "profile": info.profile
    }  # fmt: skip
    for name, value in here.items():
        made = getattr(header, name)
        if made != value:
            return f"the checkpoint is of {name} {made}, this worker has {value}"
    if not 0 < header.step < header.steps:
        return f"the checkpoint says step {header.step} of {header.steps}"
    return None


def metadata_of(state: bytes) -> dict[str, str]:
    """A safetensors file's own metadata; raises UnusableError for what is no such file."""
    metadata = _split(state)[0].get(METADATA, {})
    return dict(metadata) if isinstance(metadata, dict) else {}


def _digest(table: dict[str, Any], tensors: memoryview) -> str:
    """Of all that the engine left: its scheduler's numbers stand in the table."""
    metadata = {name: value for name, value in table.get(METADATA, {}).items() if name != HEADER}
    said = hashlib.sha256(json.dumps(table | {METADATA: metadata}, sort_keys=True).encode())
    said.update(tensors)
    return said.hexdigest()


def _split(state: bytes) -> tuple[dict[str, Any], memoryview]:
    """A safetensors file's table and the bytes of its tensors."""
    length = int.from_bytes(state[:LENGTH_BYTES], "little")
    end = LENGTH_BYTES + length
    if len(state) < LENGTH_BYTES or length > MAX_TABLE_BYTES or len(state) < end:
        raise UnusableError("the checkpoint is damaged: it is no whole safetensors file")
    try:
        table = json.loads(state[LENGTH_BYTES:end])
    except ValueError as exc:
        raise UnusableError("the checkpoint is damaged: its table cannot be read") from exc
    if not isinstance(table, dict):
        raise UnusableError("the checkpoint is damaged: its table is none")
    return table, memoryview(state)[end:]
