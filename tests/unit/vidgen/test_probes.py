from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from vidgen import errors, probes

BOUND = 60.0  # seconds to wait for what must come


def fine() -> bool:
    return True


def ready() -> tuple[bool, str]:
    return True, ""


def figures() -> tuple[bytes, str]:
    return b"up 1\n", "text/plain; version=0.0.4; charset=utf-8"


async def test_a_healthy_worker_answers_on_a_port_that_the_os_chose() -> None:
    async with (
        probes.serve("127.0.0.1", 0, healthy=fine, ready=ready, metrics=figures) as url,
        httpx.AsyncClient(base_url=url, timeout=BOUND) as client,
    ):
        assert not url.endswith(":0")
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        scraped = await client.get("/metrics")
        assert scraped.content == b"up 1\n"
        assert scraped.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert (await client.get("/other")).status_code == 404


async def test_each_probe_says_why_not_and_follows_the_worker() -> None:
    states = [(False, (False, "loading the model"))]
    async with (
        probes.serve(
            "127.0.0.1", 0, healthy=lambda: states[-1][0], ready=lambda: states[-1][1], metrics=figures
        ) as url,
        httpx.AsyncClient(base_url=url, timeout=BOUND) as client,
    ):
        assert (await client.get("/healthz")).status_code == 503
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "loading the model")

        states.append((True, (True, "")))

        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


async def test_slow_metrics_do_not_hold_up_the_probes() -> None:
    entered, release = threading.Event(), threading.Event()

    def stuck() -> tuple[bytes, str]:
        entered.set()
        release.wait(BOUND)
        return figures()

    async with (
        probes.serve("127.0.0.1", 0, healthy=fine, ready=ready, metrics=stuck) as url,
        httpx.AsyncClient(base_url=url, timeout=BOUND) as client,
    ):
        scrape = asyncio.create_task(client.get("/metrics"))
        try:
            assert await asyncio.to_thread(entered.wait, BOUND)
            assert (await client.get("/healthz")).status_code == 200
        finally:
            release.set()
        assert (await scrape).status_code == 200


async def test_after_the_block_nothing_listens() -> None:
    async with probes.serve("127.0.0.1", 0, healthy=fine, ready=ready, metrics=figures) as url:
        pass

    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{url}/healthz")


async def test_a_taken_port_is_a_clear_error() -> None:
    async with probes.serve("127.0.0.1", 0, healthy=fine, ready=ready, metrics=figures) as url:
        port = httpx.URL(url).port
        assert port is not None
        with pytest.raises(errors.FatalError, match=f"cannot listen on 127.0.0.1:{port} .* set another host or port"):
            async with probes.serve("127.0.0.1", port, healthy=fine, ready=ready, metrics=figures):
                pass


async def test_a_wildcard_address_is_reported_as_one_that_can_be_reached() -> None:
    async with probes.run_app(Starlette(), "0.0.0.0", 0) as url:
        assert url.startswith("http://127.0.0.1:")


async def test_a_failing_block_still_ends_the_server() -> None:
    urls = []

    async def work() -> None:
        async with probes.run_app(Starlette(), "127.0.0.1", 0) as url:
            urls.append(url)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await work()

    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(urls[0])


async def test_the_lifespan_of_the_app_spans_the_block() -> None:
    seen = []

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        seen.append("start")
        yield
        seen.append("stop")

    async with probes.run_app(Starlette(lifespan=lifespan), "127.0.0.1", 0):
        assert seen == ["start"]
    assert seen == ["start", "stop"]


async def test_a_lifespan_that_fails_is_an_error_and_does_not_end_the_process() -> None:
    async def connect() -> None:
        raise RuntimeError("no bus")

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await connect()
        yield

    ran: list[str] = []
    with pytest.raises(errors.FatalError, match="failed to start"):
        async with probes.run_app(Starlette(lifespan=lifespan), "127.0.0.1", 0) as url:
            ran.append(url)
    assert ran == []


async def test_signals_stay_with_main() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    async with probes.run_app(Starlette(), "127.0.0.1", 0):
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


async def test_a_response_without_end_does_not_keep_the_server() -> None:
    async def endless(_request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"data: hello\n\n"
            await asyncio.Event().wait()

        return StreamingResponse(body(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/events", endless), Route("/", lambda _request: PlainTextResponse("hi"))])
    async with asyncio.timeout(BOUND), httpx.AsyncClient(timeout=BOUND) as client:
        async with probes.run_app(app, "127.0.0.1", 0, grace=1) as url:
            request = client.build_request("GET", f"{url}/events")
            response = await client.send(request, stream=True)
            assert await anext(response.aiter_raw()) == b"data: hello\n\n"
        await response.aclose()


def test_the_ready_file_holds_the_url_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "gateway.url"
    path.write_text("http://127.0.0.1:1")

    probes.write_ready_file(path, "http://127.0.0.1:4711")

    assert path.read_text() == "http://127.0.0.1:4711"
    assert list(tmp_path.iterdir()) == [path]


def test_a_ready_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "url"
    with pytest.raises(errors.FatalError, match=f"VIDGEN_READY_FILE={path} cannot be written: No such file") as caught:
        probes.write_ready_file(path, "http://127.0.0.1:4711")
    assert caught.value.code == "settings"


def test_without_a_ready_file_nobody_is_told() -> None:
    probes.write_ready_file(None, "http://127.0.0.1:4711")


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(BOUND):
        return await reader.read()


async def one_answer(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(BOUND):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return head + await reader.readexactly(length)


REQUEST = b"GET /healthz HTTP/1.1\r\nhost: a\r\n"


def served() -> contextlib.AbstractAsyncContextManager[str]:
    return probes.serve("127.0.0.1", 0, healthy=fine, ready=ready, metrics=figures)


@pytest.mark.parametrize("before", [b"", REQUEST + b"\r\n"], ids=["first", "behind another"])
@pytest.mark.parametrize("head", [REQUEST + b"x: ", b"GET /"], ids=["a header", "a path"])
async def test_a_head_without_an_end_is_refused_before_it_fills_the_memory(before: bytes, head: bytes) -> None:
    """200 MB of one header made a gateway 400 MB larger, and no key was asked for."""
    async with served() as url, connected(url) as (reader, writer):
        writer.write(before)
        if before:
            assert b" 200 " in await one_answer(reader)
        writer.write(head)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                writer.write(b"a" * (1 << 16))
                await writer.drain()
                sent += 1 << 16
        assert sent < 32 << 20  # what the system keeps on its way

    async with served() as url, connected(url) as (reader, writer):
        writer.write(head + b"a" * (probes.HEAD_BYTES + 1))
        assert (await rest_of(reader)).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("endless", [b"x: a\r\n", b"x"], ids=["fields behind a body", "a field behind a body"])
async def test_what_comes_behind_a_body_has_an_end_too(endless: bytes) -> None:
    async def read(request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"40000\r\n" + b"b" * 0x40000 + b"\r\n"
    app = Starlette(routes=[Route("/", read, methods=["POST"])])
    async with probes.run_app(app, "127.0.0.1", 0) as url:
        async with connected(url) as (reader, writer):
            for part in (head, body, body, b"0\r\nx: a\r\n\r\n"):
                writer.write(part)
            assert (await one_answer(reader)).endswith(b"524288")
        async with connected(url) as (reader, writer):
            writer.write(head + b"1\r\nb\r\n0\r\n")
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 64 << 20:
                    writer.write(endless * ((1 << 16) // len(endless)))
                    await writer.drain()
                    sent += 1 << 16
            assert sent < 32 << 20


async def test_a_long_head_and_requests_behind_one_another_are_answered() -> None:
    async with served() as url, connected(url) as (reader, writer):
        long = REQUEST + b"x: " + b"a" * (probes.HEAD_BYTES // 2) + b"\r\n\r\n"
        for _ in range(3):
            writer.write(long)
            assert b" 200 " in await one_answer(reader)
        writer.write(long * 4)
        for _ in range(4):
            assert b" 200 " in await one_answer(reader)


@pytest.mark.parametrize("before", [b"", REQUEST + b"\r\n"], ids=["first", "behind another"])
@pytest.mark.parametrize("slow", [b"", b"\r", b"GET /hea"], ids=["nothing", "a line's end", "a part"])
async def test_who_never_ends_a_head_is_given_up(monkeypatch: pytest.MonkeyPatch, before: bytes, slow: bytes) -> None:
    monkeypatch.setattr(probes, "HEAD_S", 0.1)
    async with served() as url, connected(url) as (reader, writer):
        writer.write(before)
        if before:
            assert b" 200 " in await one_answer(reader)
        writer.write(slow)
        said = await rest_of(reader)
        assert said.startswith(b"HTTP/1.1 408 ") if slow or not before else said == b""  # silent: as after any answer


async def test_an_answer_that_takes_long_is_not_cut_off_by_what_comes_behind_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "HEAD_S", 0.05)
    began, go_on = asyncio.Event(), asyncio.Event()

    async def long(_request: Request) -> Response:
        began.set()
        await go_on.wait()
        return PlainTextResponse("at last")

    app = Starlette(routes=[Route("/", long)])
    async with probes.run_app(app, "127.0.0.1", 0) as url, connected(url) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET /hea")
        await began.wait()
        late = asyncio.Event()
        asyncio.get_running_loop().call_later(0.3, late.set)  # several times what a head may take
        await late.wait()
        go_on.set()
        assert (await rest_of(reader)).endswith(
            b"at lastHTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )


async def test_what_comes_behind_a_request_has_an_end_however_long_its_answer_and_no_answer_in_its_middle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What had come was forgotten each time that a head would have been given up."""
    monkeypatch.setattr(probes, "HEAD_S", 0.01)

    async def endless(_request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"data: hello\n\n"
            await asyncio.Event().wait()

        return StreamingResponse(body(), media_type="text/event-stream")

    said = bytearray()

    async def hear(reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while some := await reader.read(1 << 16):
                said.extend(some)

    app = Starlette(routes=[Route("/", endless)])
    async with probes.run_app(app, "127.0.0.1", 0, grace=1) as url, connected(url) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        async with asyncio.timeout(BOUND):
            await reader.readuntil(b"hello\n\n")
        hearing = asyncio.create_task(hear(reader))
        writer.write(b"GET /")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not hearing.done() and sent < 4 * probes.HEAD_BYTES:
                writer.write(b"a" * 1024)
                await writer.drain()
                sent += 1024
                await asyncio.wait([hearing], timeout=0.002)
        hearing.cancel()
        assert probes.HEAD_BYTES <= sent < 2 * probes.HEAD_BYTES
        assert b"HTTP/" not in said
