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


def fine() -> bool:
    return True


def ready() -> tuple[bool, str]:
    return True, ""


def figures() -> tuple[bytes, str]:
    return b"up 1\n", "text/plain; version=0.0.4; charset=utf-8"


async def test_a_healthy_worker_answers_on_a_port_that_the_os_chose() -> None:
    async with (
        probes.serve("127.0.0.1", 0, healthy=fine, ready=ready, metrics=figures) as url,
        httpx.AsyncClient(base_url=url) as client,
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
        httpx.AsyncClient(base_url=url) as client,
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
        release.wait(30)
        return figures()

    async with (
        probes.serve("127.0.0.1", 0, healthy=fine, ready=ready, metrics=stuck) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        scrape = asyncio.create_task(client.get("/metrics"))
        try:
            assert await asyncio.to_thread(entered.wait, 30)
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

    with pytest.raises(errors.FatalError, match="failed to start"):
        async with probes.run_app(Starlette(lifespan=lifespan), "127.0.0.1", 0):
            pass


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
    async with asyncio.timeout(60), httpx.AsyncClient(timeout=60) as client:
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


def test_without_a_ready_file_nobody_is_told() -> None:
    probes.write_ready_file(None, "http://127.0.0.1:4711")
