"""An HTTP client that costs next to nothing, so that what is measured is the server: keep-alive, JSON, no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Self
from urllib.parse import urlsplit


class Connection:
    """One connection, one request at a time; opened anew where the server has closed it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body; asked once more where the server has closed an idle connection just now."""
        try:
            reader, headers = await self._send(method, path, body)
        except (OSError, asyncio.IncompleteReadError):
            self._close()
            reader, headers = await self._send(method, path, body)
        content = await reader.readexactly(int(headers.get(b"content-length", b"0")))
        if headers.get(b"connection") == b"close":
            self._close()
        return int(headers[b":status"]), content

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        """The lines of a response that may go on for long; the connection is not used again."""
        reader, headers = await self._send("GET", path, b"")
        try:
            assert headers[b":status"] == b"200", headers
            while line := await reader.readline():
                yield line
        finally:
            self._close()

    async def _send(self, method: str, path: str, body: bytes) -> tuple[asyncio.StreamReader, dict[bytes, bytes]]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in head[1:])}
        return reader, headers | {b":status": head[0].split()[1]}
