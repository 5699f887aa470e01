"""What a photograph says beside its pixels is in nothing that is stored of it or handed out, whichever way it came."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image
from tests.gateways import EDIT, Gateway, put
from tests.photographs import PLANTED, TELLING

from vidgen import topology
from vidgen.contracts import Job
from vidgen.testing import MemoryBus, MemoryStore

UPLOADED = "uploads/photo"
telling = pytest.mark.parametrize("photograph", TELLING.values(), ids=TELLING.keys())


def tells_nothing(body: bytes) -> bool:
    """Whether a file has pixels and nothing else."""
    with Image.open(io.BytesIO(body)) as image:
        image.load()
        return PLANTED not in body and not image.getexif() and not image.info


async def served(gateway: Gateway, job: Job) -> bytes:
    answer = await gateway.client.get(f"/v1/jobs/{job.id}/references/0?proxy=1")
    assert answer.status_code == 200
    return answer.content


@telling
async def test_an_image_in_a_form_is_stored_without(photograph) -> None:
    store = MemoryStore()
    gateway = await Gateway.open(store=store)
    answer = await gateway.post_form([photograph()], {"edit": EDIT})

    job = Job.model_validate_json(answer.content)
    assert tells_nothing(await served(gateway, job))
    assert list(store.objects) == list(job.inputs)
    assert all(map(tells_nothing, store.objects.values()))


@telling
@pytest.mark.parametrize("door", ["http", "bus"])
async def test_an_uploaded_image_is_used_and_handed_out_without(photograph, door: str) -> None:
    store, bus = MemoryStore(), MemoryBus()
    gateway = await Gateway.open(bus, store)
    await put(store, UPLOADED, photograph())
    body = {"references": [UPLOADED], "edit": EDIT}
    if door == "http":
        job = await gateway.submit(**body)
    else:
        await bus.publish(topology.SUBJECT_REQUESTS, json.dumps(body).encode(), message_id="m")
        job = await gateway.parts.intake.handle(await bus.pull(topology.Consumer(topology.REQUESTS, topology.GATEWAY)))

    assert job.inputs == (f"jobs/{job.id}/reference-0.png",)
    assert tells_nothing(await served(gateway, job))
    kept = {key: body for key, body in store.objects.items() if key != UPLOADED}
    assert list(kept) == list(job.inputs)
    assert all(map(tells_nothing, kept.values()))
    [task] = await bus.tail(topology.TASKS, None, 10)
    assert UPLOADED not in task.body.decode()
