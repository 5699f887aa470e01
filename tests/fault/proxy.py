"""Stands between two processes and does to their connections what networks do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter
from typing import Literal, Self

LENGTH = re.compile(rb"(?im)^content-length: *(\d+)")
CONNECTION = re.compile(rb"(?im)^connection:.*\r\n")
CHUNK = 1 << 16


class Proxy:
    """A TCP proxy on loopback: late, slow, silent (`hole`), or cut off (`reset`), from one moment to the next."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self.latency_s, self.bytes_per_s, self.hole = 0.0, 0.0, False
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.heal()
        self.reset()
        if self._server is not None:
            self._server.close()
        while self._writers:
            await asyncio.sleep(0.01)

    def cut(self) -> None:
        """From now on nothing arrives, in either direction, and nobody is told."""
        self._open.clear()

    def heal(self) -> None:
        """Let through again what waits, and what comes."""
        self._open.set()

    def reset(self) -> None:
        """End every connection with an RST."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._open.wait()
            back, forth = await asyncio.open_connection(*self._target)
            self._writers.add(forth)
            try:
                await self._carry(reader, writer, back, forth)
            finally:
                forth.transport.abort()
                self._writers.discard(forth)
        except OSError:
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        back: asyncio.StreamReader, forth: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        both = [asyncio.ensure_future(self._pump(reader, forth)), asyncio.ensure_future(self._pump(back, writer))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(CHUNK):
            await self._open.wait()
            await asyncio.sleep(self.latency_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0))
            target.write(data)
            await target.drain()


class HttpProxy(Proxy):
    """One request a connection, so that single calls can go wrong: answered 503, cut in their body, or dropped.

    It counts the uploads by their path: those that were stored and said so, and those whose answer it dropped.
    """

    def __init__(self, host: str, port: int, seed: int) -> None:
        super().__init__(host, port)
        self._chance = random.Random(seed)
        self.failing = 0.0  # the share of calls that fail, in one of the three ways
        self.failed = {"refused": 0, "truncated": 0, "dropped": 0}
        self.stored, self.unheard = Counter[str](), Counter[str]()
        self.ways: tuple[Literal["refused", "truncated", "dropped"], ...] = ("refused", "truncated", "dropped")

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        back: asyncio.StreamReader, forth: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        found = LENGTH.search(head)
        size = int(found[1]) if found else 0
        way = self._chance.choice(self.ways) if self._chance.random() < self.failing else None
        if way == "truncated" and size == 0:
            way = "dropped"
        if way is not None:
            self.failed[way] += 1
        if way == "refused":
            await reader.readexactly(size)
            writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return
        first, rest = CONNECTION.sub(b"", head).split(b"\r\n", 1)
        forth.write(first + b"\r\nConnection: close\r\n" + rest)
        left = size // 2 if way == "truncated" else size
        while left and (data := await reader.read(min(CHUNK, left))):
            await asyncio.sleep(self.latency_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0))
            forth.write(data)
            await forth.drain()
            left -= len(data)
        verb, path, _ = first.decode().split(" ", 2)
        if way == "dropped" and verb == "PUT":
            self.unheard[path] += 1
        if way is None:
            answer = await back.read(CHUNK)
            if verb == "PUT" and answer.split(b" ", 2)[1:2] == [b"200"]:
                self.stored[path] += 1
            writer.write(answer)
            await self._pump(back, writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
