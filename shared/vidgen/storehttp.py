"""HTTP for the `minio` client, with few calls of the system: a request goes out in one, a short answer comes in one.

Each of them lets go of the interpreter and has to win it back, in a process where others work. urllib3 takes three
times as many, and as long again to read the headers.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httptools
import urllib3
from urllib3 import exceptions
from urllib3.util import wait_for_read

FIRST, MANY = 1 << 16, 1 << 18  # what is read at once: of what may be short, and of what goes on
TOGETHER = 1 << 18  # a body up to this goes out with its headers
IDLE_S = 60.0  # a connection that nobody used for so long is not used again
BODILESS = (204, 304)


class _Connection:
    """One connection: a request and its answer at a time."""

    def __init__(self, url: SplitResult, connect_s: float, read_s: float, context: ssl.SSLContext | None) -> None:
        host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
        try:
            self._socket = socket.create_connection((host, port), connect_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                self._socket = context.wrap_socket(self._socket, server_hostname=host)
            if context is not None or os.name != "posix":
                self._socket.settimeout(read_s)
            else:  # the kernel's own clock: Python's takes another call before each
                limit = struct.pack("ll", int(read_s), int(read_s % 1 * 1e6))
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
                self._socket.settimeout(None)
        except TimeoutError as exc:
            raise exceptions.TimeoutError(f"no connection to {host}:{port} in time") from exc
        except (OSError, UnicodeError) as exc:
            raise exceptions.ProtocolError(f"no connection to {host}:{port}: {exc}") from exc
        self.idle_since = time.monotonic()

    def send(self, head: bytes, body: bytes) -> None:
        with _network():
            if len(body) <= TOGETHER:
                self._socket.sendall(head + body)
            else:
                self._socket.sendall(head)
                self._socket.sendall(body)

    def receive(self, size: int) -> bytes:
        with _network():
            return self._socket.recv(size)

    def is_usable(self) -> bool:
        """Whether the server has neither closed it nor said something that nobody asked for."""
        if time.monotonic() - self.idle_since > IDLE_S:
            return False
        return not wait_for_read(self._socket, 0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


@contextlib.contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except (TimeoutError, BlockingIOError) as exc:
        raise exceptions.TimeoutError("the server was silent for too long") from exc
    except OSError as exc:
        raise exceptions.ProtocolError(f"the connection broke: {exc}") from exc


class Answer:
    """What of urllib3's response `minio` and the store use; its body is read from the connection as it is asked for."""

    def __init__(self, pool: Pool, key: tuple[str, str], connection: _Connection, method: str) -> None:
        self._pool, self._key, self._connection = pool, key, connection
        self._bodiless = method == "HEAD"
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers = urllib3.HTTPHeaderDict()
        self._headed = self._stays = self._complete = self._over = False
        self._parts: list[bytes] = []
        self._held = 0  # bytes in them
        self._data: bytes | None = None
        while not self._headed:
            self._more(FIRST)

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.add(name.decode("latin-1"), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # "go on": the answer is still to come
            self.headers = urllib3.HTTPHeaderDict()
            return
        self._headed, self._stays = True, self._parser.should_keep_alive()
        if self._bodiless or self.status in BODILESS:
            self._complete = True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._held += len(body)

    def on_message_complete(self) -> None:
        self._complete = self._complete or self._headed

    # What is asked of it.

    @property
    def reason(self) -> str | None:
        return None

    @property
    def data(self) -> bytes:
        """All of the body."""
        if self._data is None:
            self._data = self.read()
        return self._data

    def read(self, amt: int | None = None, cache_content: bool = False) -> bytes:
        """Up to `amt` bytes of the body, b"" at its end; without `amt` all that is left."""
        while not self._complete and (amt is None or self._held < amt):
            self._more(MANY)
        if self._complete:
            self.release_conn()
        taken = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        rest = b"" if amt is None else taken[amt:]
        self._parts, self._held = [rest] if rest else [], len(rest)
        if rest:
            taken = taken[:amt]
        if cache_content and self._data is None:
            self._data = taken
        return taken

    def stream(self, amt: int = MANY) -> Iterator[bytes]:
        """The body in pieces of up to `amt` bytes."""
        while piece := self.read(amt):
            yield piece

    def release_conn(self) -> None:
        """Let another request have the connection, if all of this answer was read."""
        if not self._over:
            self._over = True
            self._pool.take_back(self._key, self._connection, self._complete and self._stays)

    def close(self) -> None:
        """Let go of the connection, whatever of the answer is still to come."""
        self.release_conn()

    def _is_framed(self) -> bool:
        return "content-length" in self.headers or "transfer-encoding" in self.headers

    def _more(self, size: int) -> None:
        try:
            received = self._connection.receive(size)
            if received:
                self._parser.feed_data(received)
            elif self._headed and not self._is_framed():
                self._complete = True
            else:
                raise exceptions.ProtocolError("the connection was closed in the middle of an answer")
        except httptools.HttpParserError as exc:
            self._fail()
            raise exceptions.ProtocolError(f"the answer is not HTTP: {exc}") from exc
        except exceptions.HTTPError:
            self._fail()
            raise

    def _fail(self) -> None:
        self._complete = False
        self.release_conn()


class Pool(urllib3.PoolManager):
    """What `minio` takes for urllib3's pool: connections that are kept, used by many threads, one at a time."""

    def __init__(self, connect_s: float, read_s: float, kept: int) -> None:
        super().__init__()
        self._limits = connect_s, read_s
        self._kept = kept
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], list[_Connection]] = {}
        self._context: ssl.SSLContext | None = None

    def urlopen(  # type: ignore[override]
        self, method: str, url: str, redirect: bool = True, *, body: bytes | None = None,
        headers: Mapping[str, str] | None = None, preload_content: bool = True, **_: Any,
    ) -> Answer:  # fmt: skip
        """Ask once; redirects are not followed. Raises urllib3's HTTPError where there is no answer."""
        parts = urlsplit(url)
        key = parts.scheme, parts.netloc
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        lines = [f"{method} {target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if not body and method in ("PUT", "POST"):
            lines.append("Content-Length: 0")
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if head.count(b"\n") != len(lines) + 1:
            raise exceptions.LocationValueError("a line break in a header or an address")
        connection = self._take(key) or _Connection(parts, *self._limits, self._context_for(parts.scheme))
        try:
            connection.send(head, body or b"")
            answer = Answer(self, key, connection, method)
        except BaseException:
            connection.close()
            raise
        if preload_content:
            answer.data  # noqa: B018
        return answer

    def take_back(self, key: tuple[str, str], connection: _Connection, usable: bool) -> None:
        """Keep a connection for the next request, where it can be used again."""
        if usable:
            connection.idle_since = time.monotonic()
            with self._lock:
                idle = self._idle.setdefault(key, [])
                if len(idle) < self._kept:
                    idle.append(connection)
                    return
        connection.close()

    def clear(self) -> None:
        with self._lock:
            kept, self._idle = self._idle, {}
        for connections in kept.values():
            for connection in connections:
                connection.close()

    def _take(self, key: tuple[str, str]) -> _Connection | None:
        while True:
            with self._lock:
                idle = self._idle.get(key)
                if not idle:
                    return None
                connection = idle.pop()
            if connection.is_usable():
                return connection
            connection.close()

    def _context_for(self, scheme: str) -> ssl.SSLContext | None:
        if scheme != "https":
            return None
        if self._context is None:
            self._context = ssl.create_default_context()
            self._context.set_alpn_protocols(["http/1.1"])
        return self._context
