"""Submitting, looking, listing, cancelling, retrying, approving over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from structlog.testing import capture_logs
from tests.gateways import EDIT, KEY, Gateway, completed, failed, picture, progress, put, started

from gateway.intake import id_from_key
from vidgen import contracts, errors, topology
from vidgen.bus import Stored
from vidgen.contracts import Job, JobStatus
from vidgen.testing import MemoryBus, MemoryStore

GOOD = {"references": [KEY], "edit": EDIT}


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    opened = await Gateway.open()
    async with opened.client:
        yield opened


async def nothing_came_of_it(gateway: Gateway) -> bool:
    return await gateway.count(topology.REQUESTS) == await gateway.count(topology.HISTORY) == 0


# ── submit ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_becomes_a_queued_job_and_a_message_on_the_public_subject(gateway: Gateway) -> None:
    answer = await gateway.client.post("/v1/jobs", json=GOOD)

    job = Job.model_validate_json(answer.content)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job.id}"
    assert (job.status, job.stage) == (JobStatus.QUEUED, "edit")
    assert uuid.UUID(job.id).version == 7
    [message] = await gateway.parts.bus.tail(topology.REQUESTS, None, 10)
    assert message.subject == topology.SUBJECT_REQUESTS
    assert job.request is not None
    assert message.body == job.request.to_bytes()
    assert (await gateway.parts.bus.tail(topology.TASKS, None, 10))[0].subject == topology.subject_of_task(
        "edit", "interactive", job.id
    )


async def test_the_same_idempotency_key_twice_is_one_job(gateway: Gateway) -> None:
    first = await gateway.client.post("/v1/jobs", json=GOOD, headers={"Idempotency-Key": "order 7"})
    second = await gateway.client.post("/v1/jobs", json=GOOD, headers={"Idempotency-Key": "order 7"})

    assert (first.status_code, second.status_code) == (202, 200)
    assert first.json() == second.json()
    assert first.json()["id"] == id_from_key("order 7")
    assert await gateway.count(topology.REQUESTS) == 1


async def test_the_same_job_id_twice_is_one_job_and_wins_over_the_key(gateway: Gateway) -> None:
    body = GOOD | {"job_id": "mine"}
    first = await gateway.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "a"})
    second = await gateway.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "b"})

    assert (first.status_code, second.status_code) == (202, 200)
    assert first.json()["id"] == second.json()["id"] == "mine"


async def test_nobody_looks_for_a_job_whose_id_was_made_for_it(gateway: Gateway) -> None:
    bus = gateway.parts.bus
    assert isinstance(bus, MemoryBus)
    looked = []
    for headers in ({}, {"Idempotency-Key": "a"}):
        before = bus.calls["records.latest"]
        assert (await gateway.client.post("/v1/jobs", json=GOOD, headers=headers)).status_code == 202
        looked.append(bus.calls["records.latest"] - before)
    assert looked == [0, 1]


async def test_an_empty_idempotency_key_is_refused(gateway: Gateway) -> None:
    answer = await gateway.client.post("/v1/jobs", json=GOOD, headers={"Idempotency-Key": ""})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Idempotency-Key"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"references": ["uploads/missing.png"]}, "references.0"),
        ({"references": ["secrets/key.pem"]}, "references.0"),
        ({"references": ["jobs/another/edit-0.png"]}, "references.0"),
        ({"references": ["uploads/../jobs/x.png"]}, "references.0"),
        ({"references": [KEY] * 4}, "references"),
        ({"references": []}, "references"),
        ({"edit": {"prompt": ""}}, "edit.prompt"),
        ({"edit": {"prompt": "   "}}, "edit.prompt"),
        ({"edit": {"prompt": "x" * 4001}}, "edit.prompt"),
        ({"edit": EDIT | {"seed": -1}}, "edit.seed"),
        ({"edit": EDIT | {"width": 833, "height": 480}}, "edit"),
        ({"i2v": {"num_frames": 82}}, "i2v.num_frames"),
        ({"i2v": {"width": 100, "height": 100}}, "i2v"),
        ({"colour": "red"}, "colour"),
        ({"schema_version": 2}, "schema_version"),
        ({"job_id": "no/slash"}, "job_id"),
        ({"edit": None}, "request"),
    ],
)
async def test_each_wrong_field_is_named_and_nothing_is_stored_or_published(
    gateway: Gateway, change: dict[str, Any], field: str
) -> None:
    answer = await gateway.client.post("/v1/jobs", json=GOOD | change)

    problem = answer.json()
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["status"] == 422
    assert problem["code"] == "invalid_request"
    assert any(error["field"].startswith(field) and error["message"] for error in problem["errors"])
    assert await nothing_came_of_it(gateway)


async def test_every_wrong_field_is_named_at_once_and_no_value_is_echoed(gateway: Gateway) -> None:
    body = {
        "references": ["hidden/hunter2.png"], "edit": {"prompt": "", "negative_prompt": "hunter2" * 1000},
        "i2v": {"num_frames": 82, "seed": -1}, "extra": "hunter2",
    }  # fmt: skip
    answer = await gateway.client.post("/v1/jobs", json=body)

    named = {error["field"] for error in answer.json()["errors"]}
    assert named == {
        "references.0", "edit.prompt", "edit.negative_prompt", "i2v.num_frames", "i2v.seed", "extra"
    }  # fmt: skip
    assert "hunter2" not in answer.text


@pytest.mark.parametrize(
    ("body", "code"), [(b"{", "not_json"), (b"", "not_json"), (b'{"a": NaN}', "not_json"), (b'"\xff"', "invalid_utf8")]
)
async def test_a_body_that_is_no_json_is_a_bad_request(gateway: Gateway, body: bytes, code: str) -> None:
    answer = await gateway.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, code)


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", ""])
async def test_another_content_type_is_refused_with_what_is_taken(gateway: Gateway, content_type: str) -> None:
    answer = await gateway.client.post("/v1/jobs", content=b"{}", headers={"Content-Type": content_type})
    assert answer.status_code == 415
    assert "multipart/form-data" in answer.headers["accept"]


async def test_thousands_of_wrong_fields_make_a_short_answer(gateway: Gateway) -> None:
    answer = await gateway.client.post("/v1/jobs", json={f"field{n}": 1 for n in range(5000)})
    assert answer.status_code == 422
    assert len(answer.content) < 20_000
    assert "more fields are wrong" in answer.json()["errors"][-1]["message"]


# ── forms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_form_with_images_becomes_a_job_and_the_same_upload_is_one_object(gateway: Gateway) -> None:
    images = [picture(), picture("JPEG"), picture("WEBP")]
    first = await gateway.post_form(images, {"edit": EDIT, "job_id": "first"})
    second = await gateway.post_form(images, {"edit": EDIT, "job_id": "second"})

    assert (first.status_code, second.status_code) == (202, 202)
    keys = first.json()["request"]["references"]
    assert keys == second.json()["request"]["references"]
    assert [key.rsplit(".", 1)[1] for key in keys] == ["png", "jpg", "webp"]
    assert all(key.startswith("uploads/") for key in keys)


def odd_picture(kind: str) -> bytes:
    match kind:
        case "cmyk":
            return picture("JPEG", mode="CMYK")
        case "16-bit":
            return picture("PNG", mode="I;16")
        case "palette":
            return picture("PNG", mode="P")
        case "alpha":
            return picture("PNG", mode="RGBA")
        case "rotated":
            exif = Image.Exif()
            exif[0x0112] = 6  # a quarter turn
            return picture("JPEG", exif=exif)
        case _:
            frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
            return picture("WEBP", save_all=True, append_images=frames)


async def test_a_form_for_which_there_is_no_room_on_the_disk_may_come_again(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.parts.intake.scratch, "folder", lambda: tmp_path / "no folder")

    answer = await gateway.post_form([picture()], {"edit": EDIT})

    assert (answer.status_code, answer.json()["code"]) == (503, "local_file")
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize("kind", ["cmyk", "16-bit", "palette", "alpha", "rotated", "animated"])
async def test_an_odd_picture_is_stored_as_a_plain_one(gateway: Gateway, kind: str) -> None:
    answer = await gateway.post_form([odd_picture(kind)], {"edit": EDIT})
    job = Job.model_validate_json(answer.content)
    assert answer.status_code == 202
    assert job.request is not None
    assert job.inputs == job.request.references
    assert job.inputs[0].endswith(".png")


@pytest.mark.parametrize(
    "body",
    [b"", b"just text", picture()[:60], picture("JPEG")[:200], picture(size=(10_000, 10_000), mode="1")],
    ids=["empty", "not an image", "truncated png", "truncated jpeg", "too many pixels"],
)
async def test_a_bad_image_is_named_by_its_place_and_nothing_is_stored(gateway: Gateway, body: bytes) -> None:
    answer = await gateway.post_form([picture(), body], {"edit": EDIT})

    [error] = answer.json()["errors"]
    assert answer.status_code == 422
    assert error["field"] == "image.1"
    assert ":" in error["message"]  # what is wrong: what to do
    assert await nothing_came_of_it(gateway)


async def test_bad_images_and_bad_fields_are_named_in_one_answer(gateway: Gateway) -> None:
    answer = await gateway.post_form([b"no", picture(), b"no"], {"edit": {"prompt": ""}})
    assert [error["field"] for error in answer.json()["errors"]] == ["image.0", "image.2", "edit.prompt"]


@pytest.mark.parametrize(
    ("images", "request_", "field"),
    [
        ([], {"edit": EDIT}, "image"),
        ([picture()] * 4, {"edit": EDIT}, "image"),
        ([picture()], {"edit": EDIT, "references": [KEY]}, "references"),
        ([picture()], [1], "request"),
    ],
)
async def test_a_form_that_is_not_as_it_should_be_is_refused(
    gateway: Gateway, images: list[bytes], request_: Any, field: str
) -> None:
    answer = await gateway.post_form(images, request_)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]


async def test_a_form_with_an_unknown_field_or_without_a_request_is_refused(gateway: Gateway) -> None:
    unknown = await gateway.client.post("/v1/jobs", files={"photo": picture()})
    without = await gateway.client.post("/v1/jobs", files={"image": picture()})
    assert unknown.json()["errors"][0]["field"] == "photo"
    assert without.json()["errors"][0]["field"] == "request"


async def test_a_form_whose_request_is_no_json_is_a_bad_request(gateway: Gateway) -> None:
    assert (await gateway.post_form([picture()], b"{")).json()["code"] == "not_json"
    assert (await gateway.post_form([picture()], b'"\xff"')).json()["code"] == "invalid_utf8"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"nothing of the kind"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{}'),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 100),
        ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"b" * 100_000),  # kept in memory, as a file is not
    ],
)
async def test_a_body_that_is_no_form_is_a_bad_request(gateway: Gateway, content_type: str, body: bytes) -> None:
    answer = await gateway.client.post("/v1/jobs", content=body, headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["code"]) == (400, "not_a_form")


async def test_an_image_over_the_limit_is_too_large_and_named() -> None:
    gateway = await Gateway.open(max_upload_bytes=1000)
    answer = await gateway.post_form([picture(), b"\0" * 1001], {"edit": EDIT})
    assert answer.status_code == 413
    assert answer.json()["errors"][0]["field"] == "image.1"


# ── look and list ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_job_shows_its_newest_progress_while_it_runs(gateway: Gateway) -> None:
    job = await gateway.submit()
    await gateway.tell(started(job))
    await gateway.parts.bus.signal(topology.subject_of_progress(job.id), progress(job, 3).to_bytes())

    shown = (await gateway.client.get(f"/v1/jobs/{job.id}")).json()
    assert shown["status"] == "in_progress"
    assert shown["progress"]["step"] == 3


async def test_what_an_attempt_told_that_handed_its_task_back_is_no_progress_of_the_next(gateway: Gateway) -> None:
    job = await gateway.submit()
    subject, begun = topology.subject_of_progress(job.id), started(job)

    async def shown() -> tuple[str, int | None]:
        told = (await gateway.client.get(f"/v1/jobs/{job.id}")).json()
        return told["stages"][0]["state"], told.get("progress", {}).get("step")

    await gateway.tell(begun)
    await gateway.parts.bus.signal(subject, progress(job, 7).to_bytes())
    assert await shown() == ("running", 7)
    released = begun.model_dump(include=set(contracts.StageEvent.model_fields))
    await gateway.tell(contracts.StageReleased.model_validate(released))
    assert await shown() == ("queued", None)
    again = begun.model_copy(update={"attempt": 2})
    await gateway.parts.bus.publish(topology.subject_of_events(job.id), again.to_bytes(), message_id="again")
    assert await shown() == ("running", None)
    await gateway.parts.bus.signal(subject, progress(job, 8).model_copy(update={"attempt": 2}).to_bytes())
    assert await shown() == ("running", 8)


async def test_what_a_run_told_is_no_progress_of_the_next(gateway: Gateway) -> None:
    job = await gateway.submit()
    await gateway.tell(started(job))
    await gateway.parts.bus.signal(topology.subject_of_progress(job.id), progress(job, 7).to_bytes())
    await gateway.tell(failed(job))
    again = Job.model_validate_json((await gateway.client.post(f"/v1/jobs/{job.id}/retry")).content)

    await gateway.tell(started(again))

    shown = (await gateway.client.get(f"/v1/jobs/{job.id}")).json()
    assert (shown["run"], shown["stages"][0]["state"], shown.get("progress")) == (2, "running", None)


async def test_nobody_looks_for_the_progress_of_a_stage_that_waits(gateway: Gateway) -> None:
    bus = gateway.parts.bus
    assert isinstance(bus, MemoryBus)
    job = await gateway.submit(i2v={"prompt": "zoom"})
    looked = []
    for event in (started(job), completed(job)):
        await gateway.tell(event)
        before = bus.calls["latest"]
        shown = (await gateway.client.get(f"/v1/jobs/{job.id}")).json()
        assert (shown["status"], shown.get("progress")) == ("in_progress", None)
        looked.append(bus.calls["latest"] - before)
    assert looked == [2, 1]  # at its log, and at its progress


@pytest.mark.parametrize("path", ["/v1/jobs/none", "/v1/jobs/none/events", "/v1/jobs/a.b", "/v1/jobs/" + "x" * 65])
async def test_an_unknown_job_is_not_found(gateway: Gateway, path: str) -> None:
    answer = await gateway.client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


async def test_pages_stay_the_same_while_new_jobs_come(gateway: Gateway) -> None:
    ids = [(await gateway.submit(f"job-{n}")).id for n in range(5)]

    first = (await gateway.client.get("/v1/jobs?limit=2")).json()
    await gateway.submit("late")
    second = (await gateway.client.get(f"/v1/jobs?limit=2&cursor={first['next_cursor']}")).json()
    third = (await gateway.client.get(f"/v1/jobs?limit=2&cursor={second['next_cursor']}")).json()

    seen = [job["id"] for page in (first, second, third) for job in page["jobs"]]
    assert seen == ids[::-1]
    assert third["next_cursor"] is None


async def test_a_record_that_cannot_be_read_is_left_out_of_the_list(gateway: Gateway) -> None:
    for number in range(3):
        await gateway.submit(f"j{number}")
    await gateway.parts.bus.records(topology.JOBS_BUCKET).put("j1", b'{"of": "another version"}')

    listed = await gateway.client.get("/v1/jobs")

    assert (listed.status_code, [job["id"] for job in listed.json()["jobs"]]) == (200, ["j2", "j0"])


async def test_jobs_are_listed_by_status(gateway: Gateway) -> None:
    for n in range(4):
        await gateway.submit(f"job-{n}")
    await gateway.client.post("/v1/jobs/job-1/cancel")

    cancelled = (await gateway.client.get("/v1/jobs?status=cancelled")).json()
    queued = (await gateway.client.get("/v1/jobs?status=queued&limit=2")).json()
    assert [job["id"] for job in cancelled["jobs"]] == ["job-1"]
    assert [job["id"] for job in queued["jobs"]] == ["job-3", "job-2"]


@pytest.mark.parametrize(
    ("query", "field"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("status=done", "status"), ("cursor=x", "cursor")],
)
async def test_a_wrong_query_names_its_parameter(gateway: Gateway, query: str, field: str) -> None:
    answer = await gateway.client.get(f"/v1/jobs?{query}")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field


# ── cancel, retry, approve ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_queued_job_is_cancelled_and_its_task_withdrawn(gateway: Gateway) -> None:
    job = await gateway.submit()
    answer = await gateway.client.post(f"/v1/jobs/{job.id}/cancel")
    again = await gateway.client.post(f"/v1/jobs/{job.id}/cancel")

    assert (answer.status_code, again.status_code) == (200, 200)
    assert answer.json()["status"] == again.json()["status"] == "cancelled"
    assert await gateway.count(topology.TASKS) == 0


async def test_a_failed_job_is_retried_and_a_running_one_is_not(gateway: Gateway) -> None:
    job = await gateway.submit()
    refused = await gateway.client.post(f"/v1/jobs/{job.id}/retry")
    await gateway.tell(failed(job))
    retried = await gateway.client.post(f"/v1/jobs/{job.id}/retry")

    assert (refused.status_code, refused.json()["code"]) == (409, "not_possible")
    assert retried.status_code == 200
    assert (retried.json()["status"], retried.json()["run"]) == ("queued", 2)


async def test_a_review_waits_for_approval_of_a_candidate_that_exists(gateway: Gateway) -> None:
    job = await gateway.submit(edit=EDIT | {"candidates": 2}, i2v={"prompt": "zoom"}, review=True)
    early = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 0})
    await gateway.tell(completed(job, names=("edit-0.png", "edit-1.png")))
    wrong = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 2})
    odd = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": "first", "x": 1})
    approved = await gateway.client.post(f"/v1/jobs/{job.id}/approve", json={"candidate": 1})

    assert early.status_code == 409
    assert wrong.json()["errors"][0]["field"] == "candidate"
    assert {error["field"] for error in odd.json()["errors"]} == {"candidate", "x"}
    assert approved.status_code == 200
    assert (approved.json()["approved"], approved.json()["stage"]) == (1, "i2v")


@pytest.mark.parametrize("part", ["edit", "i2v"])
async def test_a_review_of_what_no_video_follows_is_refused_with_all_else_that_is_wrong(
    gateway: Gateway, part: str
) -> None:
    """It was passed over without a word, and the job completed. A record of before is still read."""
    asked = {"references": ["uploads/a.png"], part: {"prompt": "x"}, "review": True}
    alone = await gateway.client.post("/v1/jobs", json=asked)
    with_more = await gateway.client.post("/v1/jobs", json=asked | {"lane": "fast"})
    assert [error["field"] for error in alone.json()["errors"]] == ["review"]
    assert [error["field"] for error in with_more.json()["errors"]] == ["lane", "review"]
    assert contracts.VideoRequest.model_validate(asked).review


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/json"}])
async def test_an_approval_without_a_body_is_of_the_first_candidate(gateway: Gateway, headers: dict[str, str]) -> None:
    """It was 415, or 400, where cancel and retry take no body."""
    job = await gateway.submit(i2v={"prompt": "zoom"}, review=True)
    await gateway.tell(completed(job))
    answer = await gateway.client.post(f"/v1/jobs/{job.id}/approve", headers=headers)
    assert (answer.status_code, answer.json().get("approved")) == (200, 0)


@pytest.mark.parametrize("action", ["cancel", "retry", "approve"])
async def test_nothing_can_be_done_to_an_unknown_job(gateway: Gateway, action: str) -> None:
    answer = await gateway.client.post(f"/v1/jobs/none/{action}", json={})
    assert answer.status_code == 404


# ── when the bus or the store is not there ───────────────────────────────────────────────────────────────────────────


class LostStore(MemoryStore):
    async def fetch(self, *_: Any, **__: Any) -> None:
        raise errors.StoreError


class FullBus(MemoryBus):
    async def publish(self, subject: str, *args: Any, **options: Any) -> int:
        if subject == topology.SUBJECT_REQUESTS:
            raise errors.QueueFullError
        return await super().publish(subject, *args, **options)


class BrokenBus(MemoryBus):
    async def tail(self, stream: str, before: int | None, limit: int) -> list[Stored]:
        raise KeyError("the password is hunter2")


async def test_a_store_out_of_reach_is_told_with_when_to_come_back() -> None:
    gateway = await Gateway.open(store=LostStore())
    answer = await gateway.client.post("/v1/jobs", json=GOOD)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert await nothing_came_of_it(gateway)


async def test_a_full_queue_is_told_with_when_to_come_back() -> None:
    gateway = await Gateway.open(bus=FullBus())
    answer = await gateway.client.post("/v1/jobs", json=GOOD)
    assert (answer.status_code, answer.json()["code"]) == (503, "queue_full")
    assert int(answer.headers["retry-after"]) > 0
    assert await gateway.count(topology.HISTORY) == 0


async def test_what_nobody_foresaw_is_a_problem_document_without_internals() -> None:
    gateway = await Gateway.open(bus=BrokenBus())
    with capture_logs() as logs:  # structlog's own console takes seconds for a traceback
        answer = await gateway.client.get("/v1/jobs")
    assert answer.status_code == 500
    assert any(line.get("exc_info") for line in logs)
    assert answer.headers["content-type"] == "application/problem+json"
    assert "hunter2" not in answer.text


async def test_a_reference_that_is_too_large_in_the_store_is_named() -> None:
    gateway = await Gateway.open(max_upload_bytes=1000)
    await put(gateway.parts.store, "uploads/big.png", b"\0" * 1001)
    answer = await gateway.client.post("/v1/jobs", json=GOOD | {"references": ["uploads/big.png"]})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "references.0"


async def test_what_a_caller_is_shown_is_kept_in_no_cache(gateway: Gateway) -> None:
    job = await gateway.submit()
    for path in (f"/v1/jobs/{job.id}", "/v1/jobs", "/v1/workers", "/v1/jobs/none", "/v1/options"):
        assert (await gateway.client.get(path)).headers["cache-control"] == "no-store", path
    assert "cache-control" not in (await gateway.client.get("/healthz")).headers
