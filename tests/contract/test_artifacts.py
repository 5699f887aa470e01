"""What every ArtifactStore promises: one suite for the double and for S3."""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs
from tests import engines
from tests.receivers import Receiver, make_certificate

from vidgen import errors, presign, service
from vidgen.artifacts import CHUNK, ArtifactStore, S3Store, Shown, artifact_key, check_key, job_prefix, upload_headers
from vidgen.local import S3Server
from vidgen.settings import WorkerSettings
from vidgen.testing import MemoryStore

BOUND = 60.0
LONG_AGO = (timedelta(minutes=15), datetime.now(UTC) - timedelta(hours=1))


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> ArtifactStore:
    if request.param == "memory":
        return MemoryStore()
    found: S3Store = request.getfixturevalue("s3_store")
    return found


@pytest.fixture
def key() -> str:
    return artifact_key(secrets.token_hex(8), "edit-0.png")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "source.png"
    path.write_bytes(b"0123456789" * 10)
    return path


async def whole(store: ArtifactStore, key: str, start: int = 0, length: int = 0) -> bytes:
    return b"".join([chunk async for chunk in store.read(key, start, length)])


async def test_what_is_put_is_fetched(store: ArtifactStore, key: str, file: Path, tmp_path: Path) -> None:
    await store.put(key, file, "image/png")
    await store.fetch(key, tmp_path / "copy.png")

    assert (tmp_path / "copy.png").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 7 * CHUNK + 3], ids=["empty", "one byte", "many chunks"])
async def test_files_of_any_size_survive(store: ArtifactStore, key: str, tmp_path: Path, size: int) -> None:
    data = secrets.token_bytes(size)
    (tmp_path / "source").write_bytes(data)

    await store.put(key, tmp_path / "source", "video/mp4")
    assert await store.fetch(key, tmp_path / "copy") == size

    assert (tmp_path / "copy").read_bytes() == data
    assert await whole(store, key) == data


async def test_a_second_put_replaces_the_first(store: ArtifactStore, key: str, file: Path) -> None:
    await store.put(key, file, "image/png")
    file.write_bytes(b"new")
    await store.put(key, file, "image/png")

    assert await whole(store, key) == b"new"


async def test_fetch_refuses_what_is_larger_than_the_limit(
    store: ArtifactStore, key: str, file: Path, tmp_path: Path
) -> None:
    await store.put(key, file, "image/png")

    with pytest.raises(errors.RejectedError) as caught:
        await store.fetch(key, tmp_path / "copy", limit=99)
    assert caught.value.code == "too_large"
    assert "99" in caught.value.message
    assert not (tmp_path / "copy").exists()
    await store.fetch(key, tmp_path / "copy", limit=100)


async def test_what_is_not_there_is_not_found(store: ArtifactStore, key: str, tmp_path: Path) -> None:
    assert await store.stat(key) is None
    with pytest.raises(errors.NotFoundError) as caught:
        await store.fetch(key, tmp_path / "copy")
    assert key in caught.value.message
    with pytest.raises(errors.NotFoundError):
        await whole(store, key)
    assert not (tmp_path / "copy").exists()


async def test_stat_tells_size_type_time_and_metadata(store: ArtifactStore, key: str, file: Path) -> None:
    await store.put(key, file, "image/png", {"engine": "preview", "sha256": "ab" * 32})

    found = await store.stat(key)

    assert found is not None
    assert (found.key, found.size, found.content_type) == (key, 100, "image/png")
    assert found.metadata == {"engine": "preview", "sha256": "ab" * 32}
    assert found.modified is not None
    assert found.modified.tzinfo is not None


async def test_other_content_has_another_tag(store: ArtifactStore, key: str, file: Path) -> None:
    await store.put(key, file, "image/png")
    first = await store.stat(key)
    file.write_bytes(b"9876543210" * 10)
    await store.put(key, file, "image/png")
    second = await store.stat(key)

    assert first is not None
    assert second is not None
    assert first.tag
    assert second.tag not in ("", first.tag)


async def test_an_object_without_metadata_has_none(store: ArtifactStore, key: str, file: Path) -> None:
    await store.put(key, file, "image/png")

    found = await store.stat(key)

    assert found is not None
    assert found.metadata == {}


@pytest.mark.parametrize(
    ("start", "length", "wanted"),
    [(0, 0, slice(None)), (7, 0, slice(7, None)), (0, 5, slice(5)), (95, 20, slice(95, None)), (30, 1, slice(30, 31))],
)
async def test_ranges_are_read(
    store: ArtifactStore, key: str, file: Path, start: int, length: int, wanted: slice
) -> None:
    await store.put(key, file, "image/png")

    assert await whole(store, key, start, length) == file.read_bytes()[wanted]


async def test_nothing_is_read_past_the_end(store: ArtifactStore, key: str, file: Path) -> None:
    await store.put(key, file, "image/png")

    assert await whole(store, key, 100) == b""


async def test_a_reader_may_stop_early(store: ArtifactStore, key: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(5 * CHUNK))
    await store.put(key, tmp_path / "source", "video/mp4")

    chunks = store.read(key)
    first = await anext(chunks)
    await chunks.aclose()  # type: ignore[attr-defined]

    assert 0 < len(first) <= CHUNK
    assert await store.stat(key) is not None


async def test_a_local_file_that_is_not_there_is_told_from_an_outage(
    store: ArtifactStore, key: str, tmp_path: Path
) -> None:
    with pytest.raises(errors.StoreError, match="local file"):
        await store.put(key, tmp_path / "missing", "image/png")
    assert await store.stat(key) is None


async def test_many_files_at_once(store: ArtifactStore, key: str, file: Path) -> None:
    keys = [f"{key}-{n}" for n in range(16)]

    await asyncio.gather(*(store.put(each, file, "image/png") for each in keys))

    assert all(await asyncio.gather(*(store.stat(each) for each in keys)))


async def test_objects_are_listed_by_key_a_page_at_a_time(store: ArtifactStore, file: Path) -> None:
    prefix = f"jobs/{secrets.token_hex(8)}/"
    for name in ("c.png", "a/deep.png", "b.png"):
        await store.put(f"{prefix}{name}", file, "image/png")

    first = await store.page(prefix, limit=2)
    rest = await store.page(prefix, after=first[-1].key, limit=2)

    assert [(one.key.removeprefix(prefix), one.size) for one in first] == [("a/deep.png", 100), ("b.png", 100)]
    assert [one.key.removeprefix(prefix) for one in rest] == ["c.png"]
    assert await store.page(prefix, after=rest[-1].key) == []
    assert all(one.modified is not None for one in first)


async def test_what_is_removed_is_gone_and_may_be_removed_again(store: ArtifactStore, key: str, file: Path) -> None:
    await store.put(key, file, "image/png")

    await store.remove([key, f"{key}-never-was"])
    await store.remove([key])

    assert await store.stat(key) is None


async def test_ready_while_it_answers(store: ArtifactStore) -> None:
    assert await store.ready()


# ── S3 alone ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_presigned_get_works_over_plain_http(s3_store: S3Store, key: str, file: Path) -> None:
    await s3_store.put(key, file, "image/png")
    url = await s3_store.url(key, expires=timedelta(minutes=1))

    async with httpx.AsyncClient(timeout=BOUND) as client:
        signed = await client.get(url)
        ranged = await client.get(url, headers={"Range": "bytes=10-19"})
        unsigned = await client.get(url.split("?")[0])

    assert (signed.status_code, signed.content) == (200, file.read_bytes())
    assert signed.headers["content-type"] == "image/png"
    assert (ranged.status_code, ranged.content) == (206, b"0123456789")
    assert unsigned.status_code == 403


async def test_a_presigned_get_shows_a_file_as_the_gateway_says_and_not_as_it_was_stored(
    s3_store: S3Store, key: str, file: Path
) -> None:
    await s3_store.put(key, file, "text/html")
    url = await s3_store.url(key, shown=Shown("image/png", "attachment; filename*=UTF-8''a%20b.png"))

    async with httpx.AsyncClient(timeout=BOUND) as client:
        signed = await client.get(url)
        changed = await client.get(url.replace("image%2Fpng", "text%2Fhtml"))
        as_stored = await client.get(re.sub(r"response-content-\w+=[^&]*&", "", url))

    assert signed.headers["content-type"] == "image/png"
    assert signed.headers["content-disposition"] == "attachment; filename*=UTF-8''a%20b.png"
    assert (changed.status_code, as_stored.status_code) == (403, 403)


async def test_a_presigned_get_is_good_for_nothing_but_to_get_that_file_for_a_while(
    s3_store: S3Store, key: str, file: Path
) -> None:
    await s3_store.put(key, file, "image/png")
    url = await s3_store.url(key)
    expired = presign.url_with_headers("GET", url.partition("?")[0], {}, s3_store._keys, "us-east-1", *LONG_AGO)

    async with httpx.AsyncClient(timeout=BOUND) as client:
        others = [await client.request(method, url, content=b"x") for method in ("PUT", "DELETE", "POST")]
        elsewhere = await client.get(url.replace("edit-0.png?", "other.png?"))
        too_late = await client.get(expired)

    assert {answer.status_code for answer in others} <= {403, 405}
    assert (elsewhere.status_code, too_late.status_code) == (403, 403)
    assert await s3_store.stat(key) is not None


async def chunked(body: bytes) -> AsyncIterator[bytes]:
    yield body


SIZED = b"uploaded"
UPLOAD_REFUSED: dict[str, tuple[str, bytes | None, dict[str, str]]] = {
    "a larger body": ("PUT", SIZED + b"!", {}),
    "a much larger body": ("PUT", SIZED * 100_000, {}),
    "a smaller body": ("PUT", SIZED[:-1], {}),
    "an empty body": ("PUT", b"", {}),
    "a body of no said length": ("PUT", None, {}),
    "another type": ("PUT", SIZED, {"Content-Type": "text/html"}),
    "a length beside the length": ("PUT", SIZED, {"x-amz-decoded-content-length": "99"}),
    "metadata, such as a manifest": ("PUT", SIZED, {"x-amz-meta-manifest": "forged"}),
    "a copy of another file": ("PUT", SIZED, {"x-amz-copy-source": "/vidgen/jobs/another/video.mp4"}),
    "a file that may be replaced": ("PUT", SIZED, {"If-None-Match": "nothing"}),
    "a get": ("GET", b"", {}),
    "a delete": ("DELETE", b"", {}),
    "a post": ("POST", SIZED, {}),
}


@pytest.mark.parametrize("what", UPLOAD_REFUSED)
async def test_a_presigned_upload_is_refused_for(s3_store: S3Store, key: str, what: str) -> None:
    method, body, headers = UPLOAD_REFUSED[what]
    url = await s3_store.upload_url(key, "image/png", len(SIZED))

    async with httpx.AsyncClient(timeout=BOUND) as client:
        content = chunked(SIZED) if body is None else body
        sent = {"Content-Type": "image/png", "If-None-Match": "*", **headers}
        answer = await client.request(method, url, content=content, headers=sent)

    assert answer.status_code in (403, 405)
    assert await s3_store.stat(key) is None


async def test_a_presigned_upload_is_good_for_one_key_and_a_while(s3_store: S3Store, key: str) -> None:
    url = await s3_store.upload_url(key, "image/png", len(SIZED))
    headers = upload_headers("image/png", len(SIZED))
    address, keys = url.partition("?")[0], s3_store._keys
    expired = presign.url_with_headers("PUT", address, headers, keys, "us-east-1", *LONG_AGO)

    async with httpx.AsyncClient(timeout=BOUND) as client:
        elsewhere = await client.put(url.replace("edit-0.png", "other.png"), content=SIZED, headers=headers)
        too_late = await client.put(expired, content=SIZED, headers=headers)
        missed = await s3_store.stat(key)
        stored = await client.put(url, content=SIZED, headers=headers)
        again = await client.put(url, content=SIZED[::-1], headers=headers)

    assert (elsewhere.status_code, too_late.status_code, missed) == (403, 403, None)
    assert (stored.status_code, again.status_code) == (200, 412)  # what was looked at stays what it was
    found = await s3_store.stat(key)
    assert found is not None
    assert (found.size, found.content_type) == (len(SIZED), "image/png")
    assert await whole(s3_store, key) == SIZED


async def test_links_are_signed_for_the_public_name(s3_server: S3Server) -> None:
    store = S3Store(
        "http://internal:1", s3_server.access_key, s3_server.secret_key, "vidgen", public_endpoint="https://s3.test"
    )

    assert (await store.url("uploads/a.png")).startswith("https://s3.test/vidgen/uploads/a.png?")


async def test_a_bucket_that_is_not_there_is_not_ready_until_it_is_made(
    s3_server: S3Server, key: str, tmp_path: Path
) -> None:
    store = S3Store(s3_server.endpoint, s3_server.access_key, s3_server.secret_key, f"b{secrets.token_hex(6)}")

    assert not await store.ready()
    with pytest.raises(errors.StoreRefusedError, match="no such bucket: correct VIDGEN_S3_BUCKET"):
        await store.require()
    # Not the key's fault: a task that asks for it is not to be turned away for good.
    with pytest.raises(errors.StoreRefusedError, match="no such bucket"):
        await store.fetch(key, tmp_path / "copy")
    await asyncio.gather(store.ensure_bucket(), store.ensure_bucket())
    assert await store.ready()
    await store.require()


async def test_wrong_credentials_are_refused_and_not_shown(s3_server: S3Server, key: str, tmp_path: Path) -> None:
    store = S3Store(s3_server.endpoint, s3_server.access_key, "not-the-secret", s3_server.bucket)

    with pytest.raises(errors.StoreRefusedError, match=r"refused: .*correct VIDGEN_S3_ACCESS_KEY") as caught:
        await store.fetch(key, tmp_path / "copy")
    assert "not-the-secret" not in str(caught.value)
    assert not await store.ready()
    with pytest.raises(errors.StoreRefusedError, match="correct VIDGEN_S3_ACCESS_KEY"):
        await store.require()


@pytest.mark.parametrize(
    ("minutes", "told"),
    [(20, "is 20 minutes ahead of this machine's"), (-60, "is 60 minutes behind this machine's"), (14, "AccessDenied")],
)
async def test_a_store_that_refuses_for_its_clock_is_said_to_do_so(
    key: str, tmp_path: Path, minutes: int, told: str
) -> None:
    """To a HEAD it gives no reason, and by its answer's date we know it all the same."""
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=minutes), usegmt=True)

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        why = b"" if asked.startswith(b"HEAD") else b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
        head = f"Date: {date}\r\nContent-Type: application/xml\r\nContent-Length: {len(why)}\r\nConnection: close"
        writer.write(f"HTTP/1.1 403 Forbidden\r\n{head}\r\n\r\n".encode() + why)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        store = S3Store(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "key", "secret", "vidgen")
        for call in (store.stat(key), store.fetch(key, tmp_path / "copy")):
            with pytest.raises(errors.StoreError, match=told) as caught:
                await call
            assert caught.value.code == ("store_refused" if minutes == 14 else "store_clock")


async def test_an_answer_that_comes_late_makes_nothing_for_whoever_is_gone(key: str, tmp_path: Path) -> None:
    """The folder of a task that had left was made anew, and nobody emptied it."""
    asked, goes_on = asyncio.Event(), asyncio.Event()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await goes_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(late, "127.0.0.1", 0) as server:
        store = S3Store(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "key", "secret", "vidgen")
        fetching = asyncio.create_task(store.fetch(key, tmp_path / "room" / "copy"))
        await asyncio.wait_for(asked.wait(), BOUND)
        (tmp_path / "room").rmdir()
        goes_on.set()
        with pytest.raises(errors.StoreError, match="No such file or directory"):
            await asyncio.wait_for(fetching, BOUND)
    assert list(tmp_path.iterdir()) == []


async def test_a_server_that_is_gone_fails_soon(key: str, file: Path, tmp_path: Path) -> None:
    with socket.socket() as held:  # bound and not listening: nobody answers
        held.bind(("127.0.0.1", 0))
        store = S3Store(f"http://127.0.0.1:{held.getsockname()[1]}", "key", "secret", "vidgen")

        async with asyncio.timeout(BOUND):
            assert not await store.ready()
            for call in (store.put(key, file, "a/b"), store.fetch(key, tmp_path / "copy"), store.stat(key)):
                with pytest.raises(errors.StoreError, match="did not answer"):
                    await call
            with pytest.raises(errors.StoreError, match="did not answer"):
                await whole(store, key)


async def test_a_server_whose_certificate_nobody_knows_is_told_nothing(key: str, file: Path, tmp_path: Path) -> None:
    async with Receiver().listening(make_certificate(tmp_path)) as server:
        store = S3Store(f"https://127.0.0.1:{server.port}", "key", "secret", "vidgen")
        with pytest.raises(errors.StoreError, match="did not answer"):
            await store.put(key, file, "image/png")
        assert not await store.ready()
        assert server.posts.empty()


async def test_a_server_that_accepts_and_says_nothing_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = S3Store(f"http://127.0.0.1:{silent.getsockname()[1]}", "key", "secret", "vidgen")

        with pytest.raises(errors.StoreError, match="did not answer in time"):
            await asyncio.wait_for(store.require(), BOUND)


# ── a worker that starts ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wrong", ["bucket", "key"])
async def test_a_worker_that_the_store_refuses_is_never_ready_and_says_why(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """It was free at once for each task, and failed them all."""
    settings = WorkerSettings(
        s3_endpoint=s3_server.endpoint, s3_access_key=s3_server.access_key, device="cpu",
        s3_secret_key="another-one" if wrong == "key" else s3_server.secret_key,
        s3_bucket=s3_server.bucket if wrong == "key" else f"b{secrets.token_hex(6)}",
    )  # fmt: skip
    made = service._Service({"edit": lambda settings, chosen: engines.Instant()}, settings)
    store, looks = S3Store.from_settings(settings), 0
    require = store.require

    async def counted() -> None:
        nonlocal looks
        looks += 1
        await require()

    monkeypatch.setattr(store, "require", counted)
    told = "VIDGEN_S3_ACCESS_KEY" if wrong == "key" else "VIDGEN_S3_BUCKET"
    with capture_logs() as logs:
        waiting = asyncio.create_task(made._wait_for_store(store))
        async with asyncio.timeout(BOUND):
            while looks < 3:
                await asyncio.sleep(0.01)
        ready, reason = made._ready()
        assert (ready, told in reason) == (False, True)
        if wrong == "bucket":
            await store.ensure_bucket()
            await asyncio.wait_for(waiting, BOUND)
        else:
            monkeypatch.setattr(service, "START_PATIENCE_S", 0.0)
            waiting.cancel()
            with pytest.raises(errors.FatalError, match=told) as caught:
                await made._wait_for_store(store)
            assert caught.value.code == "store_refused"
    assert [entry["_event"] for entry in logs] == ["not_there_yet"]  # once, however often it looks


async def test_a_worker_waits_for_a_store_that_is_away_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker that a queue had started loaded its model, left, and began again."""
    monkeypatch.setattr(service, "START_PATIENCE_S", 0.0)
    settings = WorkerSettings(s3_endpoint="http://127.0.0.1:1", device="cpu")
    made = service._Service({"edit": lambda settings, chosen: engines.Instant()}, settings)
    store, looks = S3Store.from_settings(settings), 0

    async def away() -> None:
        nonlocal looks
        looks += 1
        if looks < 4:
            raise errors.StoreError("the object store did not answer")

    monkeypatch.setattr(store, "require", away)
    await asyncio.wait_for(made._wait_for_store(store), BOUND)
    assert looks == 4


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "key", ["uploads/a.png", "uploads/2026/a-b_c.png", "jobs/j1/input-0.png", "uploads/..a", "uploads/a..b"]
)
def test_keys_of_uploads_and_of_the_own_job_are_allowed(key: str) -> None:
    check_key(key, "j1")


@pytest.mark.parametrize(
    "key",
    [
        "", "uploads", "uploads/", "/uploads/a", "jobs/j2/edit-0.png", "jobs/j1", "jobs/j1/", "jobs/j11/a", "secrets/a",
        "uploads/../jobs/j2/a", "uploads/..", "uploads/./a", "uploads//a", "uploads/a/", "uploads/a/../../b",
        "jobs/j1/../j2/a", "uploads\\a", "uploads/..\\a", "uploads/%2e%2e/a", "uploads/a b", "uploads/a\n",
        "uploads/a\0", "uploads/é", "UPLOADS/a", "uploads/" + "a" * 600,
    ],
)  # fmt: skip
def test_every_other_key_is_refused_and_the_remedy_named(key: str) -> None:
    with pytest.raises(errors.RejectedError) as caught:
        check_key(key, "j1")
    assert caught.value.code == "key_not_allowed"
    assert "uploads/" in caught.value.message


def test_without_a_job_only_uploads_are_allowed() -> None:
    check_key("uploads/a", None)
    with pytest.raises(errors.RejectedError):
        check_key("jobs/j1/a", None)


def test_the_prefix_of_a_job_is_not_the_prefix_of_another() -> None:
    assert not job_prefix("j11").startswith(job_prefix("j1"))
