"""The client against a gateway made of canned answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from tests.gateways import picture
from tests.workbench import LoopClock

from vidgen import client, images
from vidgen.client import AsyncClient, GatewayError
from vidgen.contracts import Accepted, EditParams, I2VParams, Job, JobStatus, Progress, StageStarted, VideoRequest

AT = datetime(2026, 11, 1, tzinfo=UTC)
REQUEST = VideoRequest(references=("uploads/a.png",), edit=EditParams(prompt="a hat"))
PNG = b"\x89PNG\r\n\x1a\n"

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(client, "LONGEST_PAUSE_S", 0.0)


def gateway(handler: Handler) -> AsyncClient:
    return AsyncClient("http://gateway", transport=httpx.MockTransport(handler))


def job(status: JobStatus = JobStatus.QUEUED) -> Job:
    return Job(id="j1", status=status, request=REQUEST, created_at=AT, updated_at=AT)


def answered(model: Any, status: int = 200) -> httpx.Response:
    return httpx.Response(status, content=model.to_bytes())


def problem(status: int, **fields: Any) -> httpx.Response:
    document = {"type": "urn:x", "title": "No", "status": status, **fields}
    return httpx.Response(status, json=document, headers={"content-type": "application/problem+json"})


def frame(kind: str, data: bytes, number: int | None = None) -> bytes:
    place = b"" if number is None else b"id: %d\n" % number
    return b"%bevent: %b\ndata: %b\n\n" % (place, kind.encode(), data)


ACCEPTED = frame("accepted", Accepted(job_id="j1", at=AT).to_bytes(), 7)
STARTED = frame(
    "stage_started",
    StageStarted(
        job_id="j1", at=AT, stage="edit", attempt=1, tries=0, worker="w", engine="preview", model="m"
    ).to_bytes(),
    9,
)  # fmt: skip
STEP = frame("progress", Progress(job_id="j1", stage="edit", step=1, steps=4, at=AT).to_bytes())
DONE = frame("job", job(JobStatus.COMPLETED).to_bytes())


class Stream(httpx.AsyncByteStream):
    """A body of pieces, broken off at the end if it is told so."""

    def __init__(self, *pieces: bytes, breaks: bool = False) -> None:
        self._pieces, self._breaks = pieces, breaks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._breaks:
            raise httpx.ReadError("the connection was reset")


def events(*pieces: bytes, breaks: bool = False) -> httpx.Response:
    return httpx.Response(200, stream=Stream(*pieces, breaks=breaks), headers={"content-type": "text/event-stream"})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def watched(found: AsyncClient) -> list[Any]:
    return [update async for update in found.watch("j1")]


# ── submit ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_with_keys_is_sent_as_json_under_a_key_of_its_own() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answered(job(), 202)

    async with gateway(handler) as found:
        assert (await found.submit(REQUEST)).id == "j1"
        await found.submit(REQUEST)
    assert json.loads(seen[0].content) == json.loads(REQUEST.to_bytes())
    assert len({request.headers["idempotency-key"] for request in seen}) == 2


async def test_a_request_with_a_job_id_needs_no_key() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert "idempotency-key" not in request.headers
        return answered(job(), 200)

    async with gateway(handler) as found:
        await found.submit(REQUEST.model_copy(update={"job_id": "mine"}))


async def test_a_lost_connection_is_tried_again_under_the_same_key() -> None:
    keys: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["idempotency-key"])
        if len(keys) == 1:
            raise httpx.ReadError("reset")
        return answered(job(), 200)

    async with gateway(handler) as found:
        await found.submit(REQUEST)
    assert len(keys) == 2
    assert keys[0] == keys[1]


async def test_images_go_as_a_form_without_references(tmp_path: Path) -> None:
    (tmp_path / "me.jpg").write_bytes(b"\xff\xd8\xff")
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["content-type"].startswith("multipart/form-data")
        bodies.append(request.content)
        return answered(job(), 202)

    async with gateway(handler) as found:
        await found.submit(images=[tmp_path / "me.jpg", PNG], edit=EditParams(prompt="a hat"), lane="batch")
    assert bodies[0].count(b'name="image"') == 2
    assert b"image/jpeg" in bodies[0]
    assert b"image/png" in bodies[0]
    assert b'"lane":"batch"' in bodies[0]
    assert b"references" not in bodies[0]


async def test_an_image_may_be_named_by_a_string(tmp_path: Path) -> None:
    (tmp_path / "me.jpg").write_bytes(b"\xff\xd8\xff")

    def handler(request: httpx.Request) -> httpx.Response:
        assert b'filename="me.jpg"' in request.content
        return answered(job(), 202)

    async with gateway(handler) as found:
        await found.submit(images=[str(tmp_path / "me.jpg")], edit=EditParams(prompt="a hat"))


async def test_an_image_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    photo = tmp_path / os.fsdecode(b"b\xe4r.jpg")  # Latin-1, of an old disk
    photo.write_bytes(b"\xff\xd8jpeg")
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        return answered(job())

    async with gateway(answer) as found:
        await found.submit(images=[photo], edit=EditParams(prompt="x"))
    assert b'filename="b?r.jpg"' in bodies[0]


async def test_an_idempotency_key_may_have_any_letters() -> None:
    keys: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["idempotency-key"])
        return answered(job(), 202)

    async with gateway(handler) as found:
        for key in ("order 17", "Größe-1", "a\nb"):
            await found.submit(REQUEST, idempotency_key=key)
    assert keys == ["order 17", "Gr%C3%B6%C3%9Fe-1", "a%0Ab"]


async def test_what_no_gateway_would_take_is_not_sent() -> None:
    async with gateway(lambda _: pytest.fail("sent")) as found:
        with pytest.raises(ValidationError, match="at least one of edit and i2v"):
            await found.submit(images=[PNG])
        with pytest.raises(ValueError, match="at most 3"):
            await found.submit(images=[PNG] * 4, edit=EditParams(prompt="x"))
        with pytest.raises(ValidationError, match="exactly one image"):
            await found.submit(images=[PNG] * 2, i2v=I2VParams())


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_problem_document_becomes_an_error_with_its_fields() -> None:
    wrong = {"detail": "edit.prompt: too long", "code": "invalid_request"}
    wrong |= {"errors": [{"field": "edit.prompt", "message": "too long"}]}
    async with gateway(lambda _: problem(422, **wrong)) as found:
        with pytest.raises(GatewayError) as caught:
            await found.submit(REQUEST)
    assert (caught.value.status, caught.value.code, caught.value.message) == (422, "invalid_request", wrong["detail"])
    assert [error.field for error in caught.value.errors] == ["edit.prompt"]


async def test_an_answer_that_is_no_problem_document_is_still_an_error() -> None:
    async with gateway(lambda _: httpx.Response(502, text="<html>bad gateway</html>")) as found:
        told = "GET http://gateway/v1/jobs/j1 was answered with 502, and not in a gateway's words: is that its address?"
        with pytest.raises(GatewayError, match=re.escape(told)):
            await found.get("j1")


@pytest.mark.parametrize("job_id", ["", "..", "a/b", "j1\n", "\udcff", "x" * 65])
async def test_an_id_that_no_job_can_have_is_named_and_not_asked_for(job_id: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request.url)

    async with gateway(answer) as found:
        for call in (found.get(job_id), found.cancel(job_id), found.wait(job_id)):
            with pytest.raises(GatewayError, match="there is no job") as caught:
                await call
            assert (caught.value.code, caught.value.status) == ("job_not_found", 404)


async def test_retry_after_is_told() -> None:
    full = problem(503, detail="full", code="queue_full")
    full.headers["Retry-After"] = "5"
    async with gateway(lambda _: full) as found:
        with pytest.raises(GatewayError) as caught:
            await found.get("j1")
    assert caught.value.retry_after_s == 5.0


async def test_a_gateway_that_is_not_there_is_named_after_a_few_tries() -> None:
    tried = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal tried
        tried += 1
        raise httpx.ConnectError("refused", request=request)

    async with gateway(handler) as found:
        with pytest.raises(GatewayError, match="http://gateway does not answer") as caught:
            await found.get("j1")
    assert caught.value.code == "gateway_unreachable"
    assert tried == client.TRIES


@pytest.mark.parametrize(
    "call",
    [
        lambda found: found.retry("j1"), lambda found: found.approve("j1"), lambda found: found.dead_replay(1),
        lambda found: found.dead_drop(1),
    ],
)  # fmt: skip
async def test_what_is_not_safe_to_repeat_is_sent_once_only(call: Callable[[AsyncClient], Awaitable[object]]) -> None:
    tried = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal tried
        tried += 1
        raise httpx.ReadError("reset", request=request)

    async with gateway(handler) as found:
        with pytest.raises(GatewayError):
            await call(found)
    assert tried == 1


async def test_what_a_gateway_answered_is_told_and_not_asked_again() -> None:
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return problem(503, detail="the bus is away", code="bus_unavailable")

    async with gateway(handler) as found:
        with pytest.raises(GatewayError, match="the bus is away"):
            await found.submit(REQUEST)
    assert len(asked) == 1


async def test_another_server_is_not_taken_for_a_gateway() -> None:
    async with gateway(lambda _: httpx.Response(200, json={"hello": "world"})) as found:
        with pytest.raises(GatewayError, match="is it a vidgen gateway"):
            await found.get("j1")


# ── watch ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_watching_yields_events_then_progress_then_the_job() -> None:
    async with gateway(
        lambda _: events(b"retry: 2000\n\n", ACCEPTED, b": keep-alive\n\n", STARTED, STEP, DONE)
    ) as found:
        updates = await watched(found)
    assert [type(update) for update in updates] == [Accepted, StageStarted, Progress, Job]


async def test_events_cut_anywhere_are_put_together() -> None:
    body = ACCEPTED + STEP + DONE
    async with gateway(lambda _: events(*(body[at : at + 3] for at in range(0, len(body), 3)))) as found:
        assert [type(update) for update in await watched(found)] == [Accepted, Progress, Job]


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1e", "é", "😀"])
async def test_only_a_line_feed_ends_a_line_of_the_stream(char: str) -> None:
    # A prompt that was pasted from a word processor may hold U+2028: a line end to Python, a letter to JSON.
    told = REQUEST.model_copy(update={"edit": EditParams(prompt=f"a{char}hat")})
    body = frame("job", job(JobStatus.COMPLETED).model_copy(update={"request": told}).to_bytes())
    for size in (1, len(body)):
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        async with gateway(lambda _, pieces=pieces: events(*pieces)) as found:  # type: ignore[misc]
            done = await found.wait("j1")
        assert done.request == told


async def test_a_stream_with_carriage_returns_is_read_too() -> None:
    async with gateway(lambda _: events((ACCEPTED + DONE).replace(b"\n", b"\r\n"))) as found:
        assert [type(update) for update in await watched(found)] == [Accepted, Job]


async def test_a_broken_stream_is_taken_up_behind_the_last_event() -> None:
    asked: list[str | None] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("last-event-id"))
        if len(asked) == 1:
            return events(ACCEPTED, STARTED[:-10], breaks=True)
        return events(STARTED, DONE)

    async with gateway(handler) as found:
        assert [type(update) for update in await watched(found)] == [Accepted, StageStarted, Job]
    assert asked == [None, "7"]


async def test_a_stream_that_ends_without_the_job_is_taken_up_again() -> None:
    answers = [events(ACCEPTED), events(ACCEPTED, STARTED, DONE)]
    async with gateway(lambda _: answers.pop(0)) as found:
        # The second one repeats an event: it is not told twice.
        assert [type(update) for update in await watched(found)] == [Accepted, StageStarted, Job]


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_gateway_in_trouble_is_asked_again(status: int) -> None:
    answers = [problem(status, detail="later", code="later"), events(DONE)]
    async with gateway(lambda _: answers.pop(0)) as found:
        assert (await found.wait("j1")).status == JobStatus.COMPLETED


async def test_a_job_that_does_not_exist_ends_the_watch() -> None:
    async with gateway(lambda _: problem(404, detail="no such job", code="job_not_found")) as found:
        with pytest.raises(GatewayError, match="no such job"):
            await watched(found)


async def test_patience_with_a_gateway_that_is_gone_ends() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    async with gateway(handler) as found:
        with pytest.raises(GatewayError, match="does not answer"):
            _ = [update async for update in found.watch("j1", patience=-1)]


async def test_a_stream_is_not_waited_for_that_is_silent_for_longer_than_a_gateway_ever_is() -> None:
    waits = []

    def handler(request: httpx.Request) -> httpx.Response:
        waits.append(request.extensions["timeout"]["read"])
        return events(DONE)

    async with gateway(handler) as found:
        await watched(found)
    assert waits == [client.SILENCE_S]


async def test_patience_begins_anew_with_whatever_is_heard() -> None:
    clock, told = LoopClock(), iter((ACCEPTED, STARTED, STEP))

    def handler(request: httpx.Request) -> httpx.Response:
        clock.advance(70)
        return events(next(told, DONE))

    async with gateway(handler) as found:
        updates = [update async for update in found.watch("j1", patience=100)]
    assert [type(update) for update in updates] == [Accepted, StageStarted, Progress, Job]


async def test_a_job_that_waits_in_silence_takes_no_patience() -> None:
    """Patience ran from the last event: of a job that waited longer, the first connection that broke was the last."""
    clock, asked = LoopClock(), 0

    class Silence(Stream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            clock.advance(120)
            async for piece in super().__aiter__():
                yield piece

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked > 2:
            return events(DONE)
        return httpx.Response(200, stream=Silence(b": keep-alive\n\n", breaks=asked == 1))

    async with gateway(handler) as found:
        assert [type(update) async for update in found.watch("j1", patience=100)] == [Job]
    assert asked == 3


async def test_a_gateway_that_says_nothing_more_than_hello_takes_patience() -> None:
    async with gateway(lambda _: events(b"retry: 2000\n\n")) as found:
        with pytest.raises(GatewayError, match="keeps ending the events"):
            _ = [update async for update in found.watch("j1", patience=0.05)]


async def test_events_of_a_newer_gateway_are_passed_over() -> None:
    async with gateway(lambda _: events(frame("job_promoted", b'{"type":"job_promoted"}', 8), DONE)) as found:
        assert [type(update) for update in await watched(found)] == [Job]


# ── download and the rest ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_download_follows_the_link_to_the_store(tmp_path: Path) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host == "store":
            return httpx.Response(200, content=b"video")
        assert request.url.path == "/v1/jobs/j1/artifacts/video.mp4"
        return httpx.Response(307, headers={"location": "http://store/signed"})

    async with gateway(handler) as found:
        path = await found.download("j1", "video.mp4", tmp_path / "new" / "out.mp4")
    assert path.read_bytes() == b"video"
    assert names_in(path.parent) == ["out.mp4"]


async def test_a_store_out_of_reach_is_read_through_the_gateway(tmp_path: Path) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host == "store":
            raise httpx.ConnectError("no route", request=request)
        if request.url.params.get("proxy") == "1":
            return httpx.Response(200, content=b"video")
        return httpx.Response(307, headers={"location": "http://store/signed"})

    async with gateway(handler) as found:
        path = await found.download("j1", "video.mp4", tmp_path / "out.mp4")
    assert path.read_bytes() == b"video"


async def test_a_file_that_is_not_there_is_not_asked_for_by_another_way(tmp_path: Path) -> None:
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return problem(404, detail="no such artifact", code="artifact_not_found")

    async with gateway(handler) as found:
        with pytest.raises(GatewayError, match="no such artifact"):
            await found.download("j1", "video.mp4", tmp_path / "out.mp4")
    assert len(asked) == 1


async def test_a_download_is_tried_again_while_the_gateway_starts_anew(tmp_path: Path) -> None:
    """It was asked for once more at once, and a job that was done ended `vidgen run` without its video."""
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.query.decode())
        if len(asked) <= 2:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(200, content=b"film")

    async with gateway(handler) as found:
        path = await found.download("j1", "video.mp4", tmp_path / "out.mp4")
    assert (path.read_bytes(), asked) == (b"film", ["", "proxy=1", ""])


async def test_a_download_from_a_gateway_that_stays_away_ends(tmp_path: Path) -> None:
    asked = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        raise httpx.ConnectError("refused", request=request)

    async with gateway(handler) as found:
        with pytest.raises(GatewayError, match="does not answer"):
            await found.download("j1", "video.mp4", tmp_path / "out.mp4")
    assert asked == 2 * client.TRIES
    assert names_in(tmp_path) == []


async def test_a_download_that_breaks_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"old")

    def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Stream(b"ne", breaks=True))

    async with gateway(handler) as found:
        with pytest.raises(GatewayError):
            await found.download("j1", "video.mp4", tmp_path / "out.mp4")
    assert names_in(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old"


@pytest.mark.parametrize("place", ["file/out.mp4", "folder"])
async def test_a_place_that_cannot_be_written_is_named_as_it_was_given(tmp_path: Path, place: str) -> None:
    """It was named by the file that stands in for it: `.out.mp4.ef6e4646.part`."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    async with gateway(lambda _: httpx.Response(200, content=b"video")) as found:
        with pytest.raises(OSError) as caught:  # noqa: PT011  its name is what is asked for
            await found.download("j1", "video.mp4", tmp_path / place)
    assert caught.value.filename == str(tmp_path / place)
    assert sorted(names_in(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("kind", images.MEDIA_TYPES)
async def test_an_upload_puts_the_image_where_the_gateway_says_under_what_its_bytes_are(kind: str) -> None:
    image = picture(kind.removeprefix("image/"))

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host == "store":
            assert (request.method, request.content, request.headers["content-type"]) == ("PUT", image, kind)
            return httpx.Response(200)
        assert json.loads(request.content) == {"content_type": kind, "size": len(image)}
        slot = {"key": "uploads/k", "url": "http://store/put", "method": "PUT"}
        return httpx.Response(201, json=slot | {"headers": {"Content-Type": kind}, "expires_at": AT.isoformat()})

    async with gateway(handler) as found:
        assert await found.upload(image) == "uploads/k"


async def test_a_link_to_the_store_is_a_credential_and_not_repeated() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host == "store":
            return httpx.Response(403, content=b"<Error/>")
        slot = {"key": "uploads/k", "url": "http://store/put?X-Amz-Signature=secret", "method": "PUT"}
        return httpx.Response(201, json=slot | {"headers": {}, "expires_at": AT.isoformat()})

    async with gateway(handler) as found:
        with pytest.raises(GatewayError, match=re.escape("http://store/put was answered with 403")) as caught:
            await found.upload(picture())
    assert "secret" not in str(caught.value)


async def test_an_upload_whose_connection_breaks_is_sent_again() -> None:
    sent: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host != "store":
            slot = {"key": "uploads/k", "url": "http://store/put", "method": "PUT", "headers": {}}
            return httpx.Response(201, json=slot)
        sent.append(request.content)
        if len(sent) == 1:
            raise httpx.WriteError("reset", request=request)
        return httpx.Response(200)

    async with gateway(handler) as found:
        assert await found.upload(PNG) == "uploads/k"
    assert sent == [PNG, PNG]


@pytest.mark.parametrize("answer", [b"<html>sign in</html>", b'{"hello": "world"}', b"[]"])
async def test_an_upload_to_another_server_is_told_like_any_other_call(answer: bytes) -> None:
    async with gateway(lambda _: httpx.Response(200, content=answer)) as found:
        with pytest.raises(GatewayError, match="is it a vidgen gateway"):
            await found.upload(PNG)


async def test_a_page_of_jobs_has_its_cursor() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert dict(request.url.params) == {"status": "failed", "limit": "2"}
        return httpx.Response(200, content=b'{"jobs":[%b],"next_cursor":"5"}' % job().to_bytes())

    async with gateway(handler) as found:
        page = await found.list(status=JobStatus.FAILED, limit=2)
    assert ([one.id for one in page.jobs], page.next_cursor) == (["j1"], "5")


async def test_a_job_id_cannot_reach_another_address() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url.raw_path == b"/v1/jobs/..%2Fworkers"
        return problem(404, detail="no such job")

    async with gateway(handler) as found:
        with pytest.raises(GatewayError):
            await found.get("../workers")


async def test_dead_letters_are_listed_shown_replayed_and_dropped() -> None:
    letter = {"job_id": "j1", "stage": "edit", "subject": "vidgen.tasks.edit.batch.j1", "payload": "e30="}
    letter |= {"seq": 3, "at": AT.isoformat(), "error": {"code": "retries", "message": "three times"}}
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path}")
        if request.url.path == "/v1/dead":
            return httpx.Response(200, json={"dead": [letter], "next_cursor": None})
        if request.method == "POST":
            return answered(job(), 202)
        return httpx.Response(204) if request.method == "DELETE" else httpx.Response(200, json=letter)

    async with gateway(handler) as found:
        assert [one.seq for one in (await found.dead_list()).dead] == [3]
        assert (await found.dead_show(3)).error.code == "retries"
        assert (await found.dead_replay(3)).id == "j1"
        await found.dead_drop(3)
    assert asked == ["GET /v1/dead", "GET /v1/dead/3", "POST /v1/dead/3/replay", "DELETE /v1/dead/3"]


async def test_the_key_goes_to_the_gateway_and_to_no_other_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, str | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((f"{request.method} {request.url.host}", request.headers.get("Authorization")))
        if request.url.host == "store":
            return httpx.Response(200, content=b"bytes")
        if request.method == "POST":
            slot = {"key": "uploads/acme/1.png", "method": "PUT", "url": "http://store/1.png?signed", "headers": {}}
            return httpx.Response(201, json=slot)
        return httpx.Response(307, headers={"Location": "http://store/video.mp4?signed"})

    async with AsyncClient("http://gateway", api_key="vg_1_x", transport=httpx.MockTransport(answer)) as client:
        await client.upload(b"\x89PNG")
        await client.download("j1", "video.mp4", tmp_path / "video.mp4")
    monkeypatch.setenv("VIDGEN_API_KEY", "vg_2_y")
    async with AsyncClient("http://gateway", transport=httpx.MockTransport(answer)) as client:
        await client.upload(b"\x89PNG")

    assert sent == [
        ("POST gateway", "Bearer vg_1_x"), ("PUT store", None), ("GET gateway", "Bearer vg_1_x"), ("GET store", None),
        ("POST gateway", "Bearer vg_2_y"), ("PUT store", None),
    ]  # fmt: skip


async def test_a_key_may_have_a_line_end_and_one_that_is_none_is_not_repeated() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer vg_1_x"
        return answered(job())

    async with AsyncClient("http://gateway", api_key="vg_1_x\n", transport=httpx.MockTransport(answer)) as found:
        await found.get("j1")
    for key in ("vg_1\nsecret", "vg_1_sécret", "vg\x00secret"):
        with pytest.raises(GatewayError, match="copy it anew") as caught:
            AsyncClient("http://gateway", api_key=key)
        assert "cret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
async def test_a_gateway_on_this_machine_is_not_sought_through_a_proxy(
    host: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    async with AsyncClient(f"http://{host}:8080") as found:
        chosen = found._http._transport_for_url(httpx.URL(f"http://{host}:8080/v1/jobs"))
        assert chosen is found._http._transport
        if proxy.startswith("http:"):
            assert found._http._transport_for_url(httpx.URL("https://store.example.org/a")) is not chosen


def test_a_proxy_that_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(GatewayError, match=r"pip install 'httpx\[socks\]'"):
        AsyncClient("https://gateway.example.org")


@pytest.mark.parametrize(
    "url",
    [
        "gateway:8080", "http://h:99999", "ftp://h", "nats://u:secret@h:1", "http://[1", "", "http://256.1.1.1",
        "http://h:80\r", "http://\u2603", "http://\udcff", "http://xn--zz", "http://" + "a" * 70_000,
    ],
)  # fmt: skip
def test_a_url_that_no_gateway_can_have_is_said_and_not_repeated(url: str) -> None:
    with pytest.raises(GatewayError, match="write http://HOST:PORT") as caught:
        AsyncClient(url)
    assert "secret" not in str(caught.value)
