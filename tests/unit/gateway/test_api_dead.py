"""Dead letters over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator

import pytest
from tests.gateways import EDIT, KEY, Gateway, failed

from vidgen import contracts, dead, topology

ERROR = contracts.JobError(code="invalid_request", message="edit.prompt: too short")


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    opened = await Gateway.open()
    async with opened.client:
        yield opened


async def bury(
    gateway: Gateway, payload: bytes, *, subject: str = topology.SUBJECT_REQUESTS, job_id: str | None = "j1",
    stage: contracts.Stage | None = None, number: int = 0,
) -> int:  # fmt: skip
    letter = dead.letter(payload, subject, ERROR, job_id=job_id, stage=stage)
    await dead.publish(gateway.parts.bus, letter, message_id=f"test:{number}")
    [newest] = await gateway.parts.bus.tail(topology.DEAD, None, 1)
    return newest.seq


async def test_letters_are_listed_newest_first_in_pages(gateway: Gateway) -> None:
    seqs = [await bury(gateway, b"%d" % n, number=n) for n in range(5)]

    first = (await gateway.client.get("/v1/dead?limit=3")).json()
    second = (await gateway.client.get(f"/v1/dead?limit=3&cursor={first['next_cursor']}")).json()

    assert [letter["seq"] for page in (first, second) for letter in page["dead"]] == seqs[::-1]
    assert second["next_cursor"] is None
    assert first["dead"][0]["error"]["code"] == "invalid_request"


async def test_a_letter_shows_the_original_bytes(gateway: Gateway) -> None:
    seq = await bury(gateway, b"\xff not json")
    letter = (await gateway.client.get(f"/v1/dead/{seq}")).json()
    assert base64.b64decode(letter["payload"]) == b"\xff not json"
    assert (letter["seq"], letter["subject"]) == (seq, "vidgen.requests")


async def test_a_letter_of_an_unknown_form_is_shown_as_it_is(gateway: Gateway) -> None:
    seq = await gateway.parts.bus.publish("vidgen.dead.requests", b"what is this", message_id="odd")
    letter = (await gateway.client.get(f"/v1/dead/{seq}")).json()
    assert letter["error"]["code"] == "unreadable"
    assert base64.b64decode(letter["payload"]) == b"what is this"


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/replay"), ("DELETE", "")])
async def test_a_letter_that_is_not_there_is_not_found(gateway: Gateway, method: str, path: str) -> None:
    answer = await gateway.client.request(method, f"/v1/dead/7{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "letter_not_found")


@pytest.mark.parametrize("seq", ["0", "-1", "x", "9" * 25])
async def test_a_number_that_cannot_be_is_refused(gateway: Gateway, seq: str) -> None:
    answer = await gateway.client.get(f"/v1/dead/{seq}")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "seq"


async def test_a_request_is_replayed_as_a_new_job_and_the_letter_goes(gateway: Gateway) -> None:
    payload = json.dumps({"job_id": "j1", "references": [KEY], "edit": EDIT}).encode()
    seq = await bury(gateway, payload)

    answer = await gateway.client.post(f"/v1/dead/{seq}/replay")

    assert answer.status_code == 202
    assert answer.json()["status"] == "queued"
    assert answer.json()["id"] != "j1"
    assert (await gateway.client.get(f"/v1/dead/{seq}")).status_code == 404


@pytest.mark.parametrize(
    "payload", [b"\xff", b"[1]", b'{"references":["uploads/photo.png"],"edit":{"prompt":""}}', b"[" * 100_000]
)
async def test_a_request_that_is_still_wrong_stays(gateway: Gateway, payload: bytes) -> None:
    seq = await bury(gateway, payload)
    answer = await gateway.client.post(f"/v1/dead/{seq}/replay")
    assert answer.status_code == 422
    assert answer.json()["errors"]
    assert (await gateway.client.get(f"/v1/dead/{seq}")).status_code == 200


async def test_a_task_is_replayed_by_a_retry_of_its_job(gateway: Gateway) -> None:
    job = await gateway.submit()
    await gateway.tell(failed(job))
    seq = await bury(gateway, b"{}", subject="vidgen.tasks.edit.interactive.x", job_id=job.id, stage="edit")

    answer = await gateway.client.post(f"/v1/dead/{seq}/replay")

    assert answer.status_code == 202
    assert (answer.json()["id"], answer.json()["run"]) == (job.id, 2)
    assert await gateway.count(topology.DEAD) == 0


async def test_a_task_whose_job_goes_on_is_not_replayed(gateway: Gateway) -> None:
    job = await gateway.submit()
    seq = await bury(gateway, b"{}", subject="vidgen.tasks.edit.interactive.x", job_id=job.id, stage="edit")
    assert (await gateway.client.post(f"/v1/dead/{seq}/replay")).status_code == 409
    assert await gateway.count(topology.DEAD) == 1


async def test_what_is_neither_a_request_nor_a_task_can_only_be_dropped(gateway: Gateway) -> None:
    seq = await bury(gateway, b"{}", subject="vidgen.events.j1", job_id=None)
    refused = await gateway.client.post(f"/v1/dead/{seq}/replay")
    dropped = await gateway.client.delete(f"/v1/dead/{seq}")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_replayable")
    assert (dropped.status_code, dropped.content) == (204, b"")
    assert await gateway.count(topology.DEAD) == 0
