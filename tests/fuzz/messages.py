"""Bytes that claim to be requests, tasks, events and the like: each is taken or refused by name, and that is all."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
from tests.fuzz.pictures import mutate

from gateway import intake, pipeline, plan
from gateway.jobs import now
from vidgen import contracts, errors
from vidgen.contracts import DeadLetter, Event, Job, Progress, Task, WorkerInfo

READERS = {
    "task": pydantic.TypeAdapter(Task), "event": Event, "job": pydantic.TypeAdapter(Job),
    "letter": pydantic.TypeAdapter(DeadLetter), "progress": pydantic.TypeAdapter(Progress),
    "worker": pydantic.TypeAdapter(WorkerInfo),
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 4, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", " ", "x" * 300, "\0",
    "\ud800", "uploads/a.png", "uploads/../x", "jobs/other/x", "💃", [], {}, [[]], "2026-01-01T00:00:00Z", "standard",
    "batch", "edit",
)  # fmt: skip


def seeds() -> list[dict[str, Any]]:
    """Valid messages of every kind."""
    asked = {
        "references": ["uploads/a.png", "uploads/b.png"], "review": True, "lane": "batch", "deadline_s": 60,
        "labels": {"a": "b"},
        "edit": {"prompt": "p", "background": "beach", "candidates": 2, "seed": 1, "width": 512, "height": 512},
        "i2v": {"prompt": "p", "num_frames": 81, "fps": 16, "width": 832, "height": 480, "steps": 4},
    }  # fmt: skip
    request = contracts.VideoRequest.model_validate(asked | {"edit": {"prompt": "p"}})
    job = _accepted(request, "job-1")
    (record, *_) = job.stages
    stamp = {"job_id": "job-1", "run": 1, "stage": "edit", "attempt": 1, "tries": 1, "worker": "w", "at": now()}
    started = contracts.StageStarted.model_validate(stamp | {"engine": "e", "model": "m"})
    error = contracts.JobError(code="c", message="m", fields=(contracts.FieldError(field="f", message="m"),))
    failed = contracts.StageFailed.model_validate(stamp | {"error": error, "final": True})
    told = contracts.Progress(job_id="job-1", stage="edit", run=1, step=1, steps=8, at=now())
    letter = DeadLetter(subject="s", error=error, payload="e30=", at=now())
    messages = (request, job, pipeline.task_of(job, record), started, failed, told, letter)
    return [asked, *(json.loads(message.model_dump_json()) for message in messages)]


def _accepted(request: contracts.VideoRequest, job_id: str) -> Job:
    return pipeline.accept(
        request, job_id, list(request.references), plan.plan(request.edit, request.i2v, job_id, (64, 48)), now()
    )


def inputs(chance: random.Random, count: int) -> Iterator[bytes]:
    """Valid messages with some values replaced, keys added or lost, and a few with broken bytes."""
    known = seeds()
    for _ in range(count):
        message = json.loads(json.dumps(chance.choice(known)))
        for _ in range(chance.randint(0, 3)):
            _twist(message, chance)
        body = bytearray(json.dumps(message).encode("utf-8", "surrogatepass"))
        if chance.random() < 0.3:
            mutate(body, chance)
        yield bytes(body)


def _twist(message: Any, chance: random.Random) -> None:
    """Change one place, somewhere inside."""
    while isinstance(message, dict | list) and message:
        places = list(message) if isinstance(message, dict) else list(range(len(message)))
        place = chance.choice(places)
        inner = message[place]
        if isinstance(inner, dict | list) and inner and chance.random() < 0.7:
            message = inner
            continue
        match chance.randrange(4):
            case 0:
                del message[place]
            case 1 if isinstance(message, dict):
                message[chance.choice(("unknown", "schema_version", "type", "kind", "job_id"))] = chance.choice(ODD)
            case _:
                message[place] = chance.choice(ODD)
        return


def take(body: bytes) -> str:
    """What becomes of bytes: which message they are, or `refused`; anything but a refusal by name raises."""
    found = "refused"
    try:
        request = intake.parse(body)
    except intake.InvalidRequestError as exc:
        assert exc.errors
        assert all(error.field and error.message for error in exc.errors)
    else:
        found = "request"
        assert intake.parse(request.to_bytes()) == request
        try:
            job = _accepted(request, request.job_id or "job-1")
        except errors.RejectedError as exc:
            assert exc.message
        else:
            assert Job.model_validate_json(job.to_bytes()) == job
    for name, reader in READERS.items():
        try:
            message = reader.validate_json(body)
        except pydantic.ValidationError as exc:
            assert contracts.field_errors(exc)
            continue
        found = name
        assert reader.validate_json(message.to_bytes()) == message, name
    return found


def main(count: int, seed: int) -> None:
    """Take `count` inputs of our own making; prints how many became what."""
    found: Counter[str] = Counter()
    for body in inputs(random.Random(seed), count):
        try:
            found[take(body)] += 1
        except BaseException:
            sys.stderr.write(f"{body!r}\n")
            raise
    print(f"{count} messages: {dict(sorted(found.items()))}")


def guided(count: int, seed: int) -> None:
    """The same with atheris, which looks at the branches that an input takes; does not return."""
    import atheris

    corpus = Path(tempfile.mkdtemp(prefix="vidgen-corpus-"))
    for number, message in enumerate(seeds()):
        (corpus / str(number)).write_text(json.dumps(message))
    flags = [f"-runs={count}", f"-seed={seed}", "-max_len=4096", "-timeout=60", f"-artifact_prefix={corpus}/"]
    atheris.Setup(["messages", *flags, str(corpus)], _taken)
    atheris.Fuzz()


def _taken(body: bytes) -> None:
    take(body)
