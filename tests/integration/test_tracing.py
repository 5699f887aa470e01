"""One trace for each job, as a collector gets it from the real stack; and the stack without the collector."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import nats
import pytest
from tests.collector import Collector, Span, running_collector
from tests.servers import finished, running_stack

from vidgen.artifacts import S3Store
from vidgen.client import AsyncClient
from vidgen.contracts import JobStatus, VideoRequest
from vidgen.local import Stack

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "examples" / "portrait.jpg"
BOUND = 60.0
SMALL = {"width": 320, "height": 192, "steps": 2, "seed": 7}
WORK = {"edit": {"prompt": "a-secret-prompt"} | SMALL, "i2v": {"prompt": "", "num_frames": 9, "fps": 8} | SMALL}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = {"edit": "edit-service", "i2v": "i2v-service"}


@pytest.fixture(scope="module")
def closing() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def collector(closing: contextlib.ExitStack) -> Collector:
    return closing.enter_context(running_collector())


@pytest.fixture(scope="module")
def stack(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    env = {"VIDGEN_ENGINE": "preview", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with running_stack(tmp_path_factory.mktemp("stack"), env) as stack:
        yield stack


def all_there(spans: list[Span]) -> bool:
    """Whether the last thing that is done about a job was told of, and all that led to it."""
    ids = {span.id for span in spans} | {PARENT, ""}
    decided = [span for span in spans if span.name == "decide stage_completed"]
    return len(decided) == 2 and all(span.parent in ids for span in spans)


async def trace_of(collector: Collector, job_id: str) -> list[Span]:
    return await asyncio.to_thread(collector.until, job_id, all_there, BOUND)


def documented() -> set[str]:
    """The first words of the spans in the table of `docs/tracing.md`."""
    page = (ROOT / "docs" / "tracing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    return {name.split()[0] for row in rows for name in re.findall(r"`([^`]+)`", row)}


def check(spans: list[Span], root: Span) -> None:
    """One trace, with the phases of both stages where they belong."""
    assert {span.trace for span in spans} == {root.trace}
    assert {span.name.split()[0] for span in spans} <= documented()
    by_id = {span.id: span for span in spans}
    cause = root
    for stage, service in STAGES.items():
        [task] = [span for span in spans if span.name == stage]
        assert (task.service, by_id[task.parent]) == (service, cause)
        assert task.attributes.items() >= {"vidgen.attempt": 1, "vidgen.outcome": "completed"}.items()
        inside = [span for span in spans if span.parent == task.id and span.service == service]
        assert {span.name for span in inside} == {"queued", "prepare", "device", "encode", "store"}
        [device] = [span for span in inside if span.name == "device"]
        assert {span.name for span in spans if span.parent == device.id} == {"denoise", "decode"}
        [waited] = [span for span in spans if span.parent == cause.id and span.name == "queued"]
        assert waited.begun <= waited.ended <= task.ended
        assert all(task.begun <= span.begun <= span.ended <= task.ended for span in inside)
        [cause] = [span for span in spans if span.name == "decide stage_completed" and span.parent == task.id]
        assert cause.service == "gateway"


async def test_a_job_by_http_is_one_trace_from_its_request_to_its_video(
    client: AsyncClient, collector: Collector, stack: Stack
) -> None:
    job = await client.submit(VideoRequest.model_validate({"references": ("uploads/x",)} | WORK), images=[PHOTO])
    assert (await finished(client, job)).status is JobStatus.COMPLETED

    spans = await trace_of(collector, job.id)

    [root] = [span for span in spans if not span.parent]
    assert (root.service, root.name) == ("gateway", "POST /v1/jobs")
    check(spans, root)
    assert collector.jobs(root.trace) == {job.id}
    assert not [span for span in spans if "secret" in str(span) or "uploads/" in str(span)]
    for service in STAGES.values():
        lines = [json.loads(line) for line in (stack.folder / "services" / f"{service}.log").read_text().splitlines()]
        assert {line["trace_id"] for line in lines if line.get("job") == job.id} == {root.trace}


async def test_a_job_by_nats_goes_on_in_the_trace_of_its_client(
    client: AsyncClient, collector: Collector, stack: Stack
) -> None:
    own = stack.environment()
    store = S3Store(*(own[f"VIDGEN_S3_{name}"] for name in ("ENDPOINT", "ACCESS_KEY", "SECRET_KEY", "BUCKET")))
    await store.put("uploads/traced.jpg", PHOTO, "image/jpeg")
    connection = await nats.connect(stack.nats_url)
    request = {"job_id": "traced", "references": ["uploads/traced.jpg"]} | WORK
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    await connection.jetstream().publish("vidgen.requests", json.dumps(request).encode(), headers=headers)
    await connection.close()

    spans = await trace_of(collector, "traced")

    [root] = [span for span in spans if span.name == "request"]
    assert (root.service, root.trace, root.parent) == ("gateway", TRACE, PARENT)
    check(spans, root)
    assert collector.jobs(TRACE) == {"traced"}


async def test_without_its_collector_the_stack_works_on_and_drains(
    client: AsyncClient, closing: contextlib.ExitStack, stack: Stack
) -> None:
    """The last one here: the collector goes, and then the services."""
    await asyncio.to_thread(closing.close)

    job = await client.submit(VideoRequest.model_validate({"references": ("uploads/x",)} | WORK), images=[PHOTO])

    assert (await finished(client, job)).status is JobStatus.COMPLETED
    assert await asyncio.gather(*(service.terminate(BOUND) for service in stack.services)) == [0, 0, 0]
    log = (stack.folder / "services" / "edit-service.log").read_text()
    told = [event for line in log.splitlines() if (event := json.loads(line).get("event", "")).startswith("tracing_")]
    # The exporter tries again for some seconds before it gives a batch up: the process may leave before it has.
    assert told in (["tracing_lost"], ["tracing_cut"], ["tracing_lost", "tracing_cut"])
