"""Artifacts and uploads over HTTP."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from urllib.parse import unquote

import pytest
from tests.gateways import KEY, Gateway, completed, picture, put, started

from vidgen import images, topology
from vidgen.contracts import Job
from vidgen.testing import MemoryStore

BODY = bytes(range(256)) * 10
SIZE = len(BODY)


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    opened = await Gateway.open()
    async with opened.client:
        yield opened


@pytest.fixture
async def job(gateway: Gateway) -> Job:
    job = await gateway.submit()
    event = completed(job, body=BODY)
    await put(gateway.parts.store, event.artifacts[0].key, BODY)
    await gateway.tell(event)
    return job


def path(job: Job, name: str = "edit-0.png") -> str:
    return f"/v1/jobs/{job.id}/artifacts/{name}"


async def test_an_artifact_is_found_by_a_presigned_url(gateway: Gateway, job: Job) -> None:
    answer = await gateway.client.get(path(job))
    assert answer.status_code == 307
    assert f"jobs/{job.id}/edit-0.png" in answer.headers["location"]
    assert answer.headers["cache-control"] == "no-store"
    assert "&shown=image/png&disposition=inline; filename*=UTF-8''edit-0.png" in unquote(answer.headers["location"])


@pytest.mark.parametrize("way", ["jobs/{job}/edit-0.png", "jobs/{own}/../{job}/edit-0.png", "uploads/photo.png"])
async def test_an_artifact_that_is_said_to_be_another_jobs_is_not_shown(gateway: Gateway, job: Job, way: str) -> None:
    other = await gateway.submit()
    event = completed(other)
    stolen = event.artifacts[0].model_copy(update={"key": way.format(job=job.id, own=other.id)})
    await gateway.tell(event.model_copy(update={"artifacts": (stolen,)}))
    for query in ({}, {"proxy": 1}):
        answer = await gateway.client.get(path(other), params=query)
        assert (answer.status_code, answer.json()["code"]) == (404, "artifact_not_found")


@pytest.mark.parametrize("kind", ["text/html", "image/svg+xml", "application/octet-stream"])
async def test_what_is_no_image_or_film_of_ours_is_for_saving_only(gateway: Gateway, kind: str) -> None:
    job = await gateway.submit()
    event = completed(job, body=BODY, content_type=kind)
    await put(gateway.parts.store, event.artifacts[0].key, BODY)
    await gateway.tell(event)
    answer = await gateway.client.get(path(job), params={"proxy": 1})
    assert answer.headers["content-disposition"].startswith("attachment; ")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "disposition=attachment" in (await gateway.client.get(path(job))).headers["location"]


@pytest.mark.parametrize("query", [{}, {"proxy": 1}])
async def test_an_artifact_of_which_the_log_told_is_there_though_the_record_does_not_say_so_yet(
    gateway: Gateway, query: dict[str, int]
) -> None:
    """Who follows a job hears of a file from its log, and asks before a busy gateway has written its record."""
    job = await gateway.submit()
    event = completed(job, body=BODY)
    await put(gateway.parts.store, event.artifacts[0].key, BODY)
    assert (await gateway.client.get(path(job), params=query)).status_code == 404
    await gateway.parts.bus.publish(topology.subject_of_events(job.id), event.to_bytes(), message_id="done")

    answer = await gateway.client.get(path(job), params=query)

    assert answer.status_code == (200 if query else 307)
    assert (await gateway.client.get(path(job, "edit-1.png"))).status_code == 404
    assert (await gateway.parts.jobs.get(job.id)).artifacts == ()


async def test_an_artifact_is_there_though_the_next_stage_has_begun_since_the_record_was_read(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read before the edit's end, its record knew of no frame, nor did the log's newest event: it was a 404."""
    get = gateway.parts.jobs.get
    job = await gateway.submit(i2v={"prompt": "zoom"})
    event = completed(job, body=BODY)
    await put(gateway.parts.store, event.artifacts[0].key, BODY)

    async def a_moment_old(job_id: str) -> Job:
        found = await get(job_id)
        for news in (event, started(job, "i2v")):
            await gateway.tell(news)
        return found

    monkeypatch.setattr(gateway.parts.jobs, "get", a_moment_old)
    answer = await gateway.client.get(path(job), params={"proxy": 1})
    assert (answer.status_code, answer.content) == (200, BODY)


async def test_an_artifact_comes_through_the_gateway_whole(gateway: Gateway, job: Job) -> None:
    answer = await gateway.client.get(path(job), params={"proxy": 1})
    assert answer.status_code == 200
    assert answer.content == BODY
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["etag"] == f'"{"ab" * 32}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"] == "inline; filename*=UTF-8''edit-0.png"
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-0", 0, 0), ("bytes=100-199", 100, 199), ("bytes=100-", 100, SIZE - 1),
        ("bytes=-10", SIZE - 10, SIZE - 1), ("bytes=-99999", 0, SIZE - 1), ("bytes=0-99999", 0, SIZE - 1),
    ],
)  # fmt: skip
async def test_a_range_brings_that_part(gateway: Gateway, job: Job, wanted: str, first: int, last: int) -> None:
    answer = await gateway.client.get(path(job), params={"proxy": 1}, headers={"Range": wanted})
    assert answer.status_code == 206
    assert answer.content == BODY[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{SIZE}"
    assert answer.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("wanted", [f"bytes={SIZE}-", "bytes=99999-100000", "bytes=-0"])
async def test_a_range_outside_the_file_is_refused(gateway: Gateway, job: Job, wanted: str) -> None:
    answer = await gateway.client.get(path(job), params={"proxy": 1}, headers={"Range": wanted})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("wanted", ["bytes=0-1,5-6", "bytes=-", "bytes=9-1", "lines=1-2", "nonsense"])
async def test_a_range_that_is_not_understood_brings_the_whole(gateway: Gateway, job: Job, wanted: str) -> None:
    answer = await gateway.client.get(path(job), params={"proxy": 1}, headers={"Range": wanted})
    assert (answer.status_code, len(answer.content)) == (200, SIZE)


async def test_a_range_of_another_version_brings_the_whole(gateway: Gateway, job: Job) -> None:
    headers = {"Range": "bytes=0-1", "If-Range": '"another"'}
    answer = await gateway.client.get(path(job), params={"proxy": 1}, headers=headers)
    assert (answer.status_code, len(answer.content)) == (200, SIZE)


async def test_what_the_client_has_is_not_sent_again(gateway: Gateway, job: Job) -> None:
    etag = (await gateway.client.head(path(job))).headers["etag"]
    answer = await gateway.client.get(path(job), params={"proxy": 1}, headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content) == (304, b"")


async def test_head_tells_size_and_type_without_the_file(gateway: Gateway, job: Job) -> None:
    answer = await gateway.client.head(path(job))
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["content-type"] == "image/png"


async def test_a_name_that_the_job_does_not_have_is_not_found(gateway: Gateway, job: Job) -> None:
    for name in ("video.mp4", "..%2f..%2fother", "edit-0.png%00"):
        answer = await gateway.client.get(path(job, name), params={"proxy": 1})
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


async def test_an_artifact_that_is_gone_from_the_store_is_not_found(gateway: Gateway) -> None:
    job = await gateway.submit()
    await gateway.tell(completed(job, body=BODY))
    answer = await gateway.client.get(path(job), params={"proxy": 1})
    assert (answer.status_code, answer.json()["code"]) == (404, "artifact_gone")


# ── uploads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", images.MEDIA_TYPES)
async def test_an_upload_of_any_image_that_is_read_gets_a_key_and_a_url_to_put_it_to(
    gateway: Gateway, kind: str
) -> None:
    answer = await gateway.client.post("/v1/uploads", json={"content_type": kind, "size": SIZE})
    end = {"image/jpeg": "jpg"}.get(kind, kind.removeprefix("image/"))
    slot = answer.json()
    assert answer.status_code == 201
    assert re.fullmatch(rf"uploads/default/[0-9a-f-]{{36}}\.{end}", slot["key"])
    assert slot["key"] in slot["url"]
    assert slot["url"].endswith(f"&size={SIZE}")
    assert slot["method"] == "PUT"
    assert slot["headers"] == {"Content-Type": kind, "Content-Length": str(SIZE), "If-None-Match": "*"}
    assert slot["expires_at"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"content_type": "text/html", "size": 1}, "content_type"),
        ({"content_type": "image/svg+xml", "size": 1}, "content_type"),
        ({"size": 1}, "content_type"),
        ({"content_type": "image/png"}, "size"),
        ({"content_type": "image/png", "size": 0}, "size"),
        ({"content_type": "image/png", "size": 1, "x": 1}, "x"),
    ],
)
async def test_an_upload_of_something_else_is_refused(gateway: Gateway, body: dict[str, object], field: str) -> None:
    answer = await gateway.client.post("/v1/uploads", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field


async def test_an_upload_larger_than_an_image_may_be_is_refused_before_it_comes(gateway: Gateway) -> None:
    limit = gateway.parts.settings.max_upload_bytes
    answer = await gateway.client.post("/v1/uploads", json={"content_type": "image/png", "size": limit + 1})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert [error["field"] for error in answer.json()["errors"]] == ["size"]
    allowed = await gateway.client.post("/v1/uploads", json={"content_type": "image/png", "size": limit})
    assert allowed.status_code == 201


# ── references ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_reference_comes_as_the_engines_read_it(gateway: Gateway) -> None:
    job = await gateway.submit(references=[KEY, KEY])
    address = f"/v1/jobs/{job.id}/references/1"
    whole = await gateway.client.get(address, params={"proxy": 1})
    assert (whole.status_code, whole.headers["content-type"], whole.content) == (200, "image/png", picture())
    part = await gateway.client.get(address, params={"proxy": 1}, headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, b"PNG")
    again = await gateway.client.get(address, params={"proxy": 1}, headers={"If-None-Match": whole.headers["etag"]})
    assert again.status_code == 304
    assert KEY in (await gateway.client.get(address)).headers["location"]


async def test_a_reference_is_never_shown_as_what_its_uploader_called_it(gateway: Gateway) -> None:
    await put(gateway.parts.store, "uploads/page.png", picture(), "text/html")
    job = await gateway.submit(references=["uploads/page.png"])
    answer = await gateway.client.get(f"/v1/jobs/{job.id}/references/0", params={"proxy": 1})
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize(("index", "status"), [("1", 404), ("-1", 422), ("first", 422)])
async def test_a_reference_that_is_none_is_not_found(gateway: Gateway, index: str, status: int) -> None:
    job = await gateway.submit()
    assert (await gateway.client.get(f"/v1/jobs/{job.id}/references/{index}")).status_code == status


async def test_a_reference_whose_time_is_over_is_gone(gateway: Gateway) -> None:
    job = await gateway.submit()
    store = gateway.parts.store
    assert isinstance(store, MemoryStore)
    store._stats.pop(KEY)
    answer = await gateway.client.get(f"/v1/jobs/{job.id}/references/0", params={"proxy": 1})
    assert (answer.status_code, answer.json()["code"]) == (404, "artifact_gone")
