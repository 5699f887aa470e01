"""A stage's result in the store: its files under deterministic keys, the manifest with the last of them.

The main file is stored last and carries the manifest as object metadata, so one look at its key tells whether the stage
is done, and with what; nothing half stored is ever taken for a result.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import pydantic

from vidgen import artifacts, contracts
from vidgen.artifacts import ArtifactStore
from vidgen.contracts import Artifact, Message, Task
from vidgen.engine import EngineInfo, Finished

MAIN_FILE: dict[contracts.Stage, str] = {"edit": "edit-0.png", "i2v": "video.mp4"}
MANIFEST = "manifest"


class Result(Message):
    """What a stage made, and from what."""

    fingerprint: str
    engine: str
    model: str
    revision: str | None = None
    seed: int
    steps: int
    artifacts: tuple[Artifact, ...]


def fingerprint(task: Task) -> str:
    """Names what a task asks for: only a result of the same may be used for it."""
    asked = {"job_id", "stage", "inputs", "work"}
    if task.tenant != contracts.DEFAULT_TENANT:  # what another tenant's job of this id left is none of its business
        asked.add("tenant")
    wanted = task.model_dump_json(include=asked)
    return hashlib.sha256(wanted.encode()).hexdigest()[:32]


def main_key(task: Task) -> str:
    return artifacts.artifact_key(task.job_id, MAIN_FILE[task.stage])


async def find(store: ArtifactStore, task: Task) -> Result | None:
    """The result of this very task if it is stored already; raises StoreError."""
    stat = await store.stat(main_key(task))
    packed = (stat.metadata or {}).get(MANIFEST) if stat else None
    if packed is None:
        return None
    try:
        result = Result.model_validate_json(zlib.decompress(base64.urlsafe_b64decode(packed)))
    except (ValueError, zlib.error, pydantic.ValidationError):
        return None  # of another version of this program
    return result if result.fingerprint == fingerprint(task) else None


@dataclass(frozen=True)
class Made:
    """A result, and the files that are to be stored for it; `manifest` is what the main one carries."""

    result: Result
    files: tuple[Finished, ...]
    manifest: str


def made(task: Task, files: Sequence[Finished], info: EngineInfo) -> Made:
    """What a stage made, described; reads the files, so it runs in a thread. Raises OSError."""
    result = Result(
        fingerprint=fingerprint(task), engine=info.name, model=info.model, revision=info.revision,
        seed=task.work.seed, steps=task.work.steps, artifacts=tuple(_describe(task, file) for file in files),
    )  # fmt: skip
    return Made(result, tuple(files), base64.urlsafe_b64encode(zlib.compress(result.to_bytes(), 9)).decode())


async def keep(store: ArtifactStore, task: Task, made: Made) -> Result:
    """Store a stage's files, the main one last; raises StoreError."""
    main_name = MAIN_FILE[task.stage]
    pairs = list(zip(made.files, made.result.artifacts, strict=True))
    others = [store.put(one.key, file.path, one.content_type) for file, one in pairs if one.name != main_name]
    if others:
        await asyncio.gather(*others)
    for file, one in pairs:
        if one.name == main_name:
            await store.put(one.key, file.path, one.content_type, metadata={MANIFEST: made.manifest})
    return made.result


def _describe(task: Task, file: Finished) -> Artifact:
    return Artifact(
        name=file.path.name,
        key=artifacts.artifact_key(task.job_id, file.path.name),
        content_type=file.content_type,
        size=file.path.stat().st_size,
        sha256=artifacts.sha256_of(file.path),
        width=file.width,
        height=file.height,
        frames=file.frames,
        fps=file.fps,
    )
