"""Serving HTTP beside other work: a worker's own probes and metrics, and the one way that any app is run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vidgen import errors

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  read, not bound
GRACE = 5.0
HEAD_BYTES = 64 << 10
HEAD_S = 30.0


class _Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds on the head of a request: `HEAD_BYTES`, and `HEAD_S` for it to be whole.

    What may come behind a body is bound as a head is. uvicorn itself keeps however many bytes of either come, and waits
    for ever for the first one.
    """

    _due: asyncio.TimerHandle | None = None  # while a head is waited for
    _bytes = 0  # since a head or a part of a body was whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if not self._answering():
            self._await_head()
        self._bytes += len(data)
        super().data_received(data)
        if self._bytes > HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._leave_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bytes = 0
        super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave_head()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._due is None:
            self._bytes = 0
            self._due = self.loop.call_later(HEAD_S, self._on_late)

    def _leave_head(self) -> None:
        self._bytes = 0
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _on_late(self) -> None:
        self._due = None
        if self._answering():  # what came behind a request whose answer is a long one; its bytes count on
            self._due = self.loop.call_later(HEAD_S, self._on_late)
        else:
            self._refuse(b"408 Request Timeout")

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: bytes) -> None:
        self._leave_head()
        if not self._answering():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn as a guest: signals belong to `main`, a failed start is an exception, and readiness is an event."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets=sockets)
        except SystemExit as exc:
            raise errors.FatalError("the HTTP app failed to start: the log says why", code="http") from exc
        self.listening.set()


@contextlib.asynccontextmanager
async def run_app(app: Any, host: str, port: int, *, grace: float = GRACE) -> AsyncIterator[str]:
    """Serve an ASGI app while the block runs, and yield the base URL at which this machine reaches it.

    Port 0 is one that the OS chooses. At the end open responses have `grace` seconds to finish. Raises FatalError if
    the address is taken or the app's lifespan fails.
    """
    listener = _bound(host, port)
    try:
        config = uvicorn.Config(
            app, http=_Connection, log_config=None, access_log=False, ws="none", server_header=False,
            timeout_graceful_shutdown=max(1, round(grace)),
        )  # fmt: skip
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
        listening = asyncio.create_task(server.listening.wait(), name="http-listening")
        try:
            await asyncio.wait((serving, listening), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
            yield _base_url(listener, host)
        finally:
            listening.cancel()
            server.should_exit = True
            await serving
    finally:
        listener.close()


def serve(
    host: str,
    port: int,
    *,
    healthy: Callable[[], bool],
    ready: Callable[[], tuple[bool, str]],
    metrics: Callable[[], tuple[bytes, str]],
) -> contextlib.AbstractAsyncContextManager[str]:
    """Serve `/healthz`, `/readyz` and `/metrics` while the block runs, and yield the base URL.

    `ready` says whether, and why not; `metrics` gives the exposition and its type, and runs in a thread.
    """

    async def healthz(_request: Request) -> Response:
        return _verdict(healthy(), "this worker can no longer work and is about to leave")

    async def readyz(_request: Request) -> Response:
        return _verdict(*ready())

    async def exposition(_request: Request) -> Response:
        body, content_type = await asyncio.to_thread(metrics)
        return Response(body, headers={"content-type": content_type})

    routes = [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", exposition)]
    return run_app(Starlette(routes=routes), host, port)


def write_ready_file(path: Path | None, url: str) -> None:
    """Tell whoever started this process where it listens: `path` appears whole or not at all; None is nobody."""
    if path is None:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(url, encoding="utf-8")
        part.replace(path)
    except OSError as exc:
        raise errors.FatalError(
            f"VIDGEN_READY_FILE={path} cannot be written: {exc.strerror or exc}", code="settings"
        ) from exc


def _verdict(good: bool, reason: str) -> Response:
    if good:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as exc:
        raise errors.FatalError(
            f"cannot listen on {host}:{port} ({exc.strerror or exc}): set another host or port, or 0 for a free port",
            code="address_taken",
        ) from exc


def _base_url(listener: socket.socket, host: str) -> str:
    name = WILDCARDS.get(host, host)
    port = listener.getsockname()[1]
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
