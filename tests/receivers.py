"""A receiver of webhooks over real TLS, with a certificate of its own making, that answers as a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.certificates import Certificate, signed_by_itself

NAME = "hooks.example.test"
BOUND_S = 60.0


def make_certificate(folder: Path) -> Certificate:
    """A certificate for `NAME` and for loopback."""
    return signed_by_itself(folder, f"DNS:{NAME},DNS:localhost,IP:127.0.0.1")


@dataclass(frozen=True)
class Post:
    """What was posted."""

    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        return json.loads(self.body)


Answer = Callable[[Post], Awaitable[bytes]]


def status(code: int, *headers: str, body: str = "") -> bytes:
    """An answer as it goes over the wire."""
    return "\r\n".join([f"HTTP/1.1 {code} X", f"content-length: {len(body)}", *headers, "", body]).encode()


class Receiver:
    """Every post that came is in `posts`, also those that were never answered."""

    def __init__(self, answer: Answer | None = None) -> None:
        self._answer = answer
        self.posts: asyncio.Queue[Post] = asyncio.Queue()
        self.connections = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def listening(self, certificate: Certificate) -> AsyncIterator[Receiver]:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate.file, certificate.key)
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    def url(self, host: str = "127.0.0.1") -> str:
        return f"https://{host}:{self.port}/hooks/vidgen"

    async def next(self) -> Post:
        async with asyncio.timeout(BOUND_S):
            return await self.posts.get()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (one.partition(":") for one in head[1:] if one)
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            post = Post(head[0].split(" ")[1], headers, body)
            self.posts.put_nowait(post)
            writer.write(await self._answer(post) if self._answer is not None else status(204))
            await writer.drain()
        writer.close()
