"""How much of a body is read: no more than a request can need, however it is sent."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import problems
from gateway.api.bodies import FORM
from gateway.intake import MAX_REQUEST_BYTES
from vidgen.contracts import MAX_REFERENCES

FORM_OVERHEAD = 1 << 20
SMALL = 256 << 10  # what is left of a body up to this size is read and dropped; the connection stays
LINGER_BYTES = 64 << 20
LINGER_S = 5.0


def form_bytes(max_image_bytes: int) -> int:
    """How long a form may be."""
    return MAX_REFERENCES * max_image_bytes + FORM_OVERHEAD


def declared(headers: Headers) -> int | None:
    """How long a body is said to be; None where nothing is said."""
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


class BodyLimit:
    """Whoever reads a body that is too large gets 413: at once where the length is declared, else at the limit."""

    def __init__(self, app: ASGIApp, max_image_bytes: int) -> None:
        self._app = app
        self._form_limit = form_bytes(max_image_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_form = headers.get("content-type", "").lower().startswith(FORM)
        body = _Body(headers, self._form_limit if is_form else MAX_REQUEST_BYTES, receive, send)
        await self._app(scope, body.receive, body.send)


class _Body:
    """A request's body as it comes. Where it is left unread, the connection ends with the response."""

    def __init__(self, headers: Headers, limit: int, receive: Receive, send: Send) -> None:
        self._limit = limit
        self._declared = declared(headers)
        self._expected = self._declared is not None or "transfer-encoding" in headers
        self._receive, self._send = receive, send
        self._read = 0
        self._complete = False
        self._closing = False

    async def receive(self) -> Message:
        if not self._read and (self._declared or 0) > self._limit:
            raise self._too_large()  # not a byte is asked for, nor is `Expect: 100-continue` answered
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._read > self._limit:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._much_is_unread():
            self._closing = True
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        elif message["type"] == "http.response.body" and self._closing and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    def _too_large(self) -> problems.HttpError:
        return problems.HttpError(413, "too_large", f"the body is larger than the {self._limit:,} bytes allowed here")

    def _much_is_unread(self) -> bool:
        if self._complete or not self._expected:
            return False
        return self._declared is None or self._declared - self._read > SMALL

    async def _linger(self) -> None:
        # The answer is out, whole. Closing now would reset the connection, and many clients that are still sending
        # would lose the answer and see a broken connection: so what comes is dropped for a moment, as nginx does.
        budget = LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while budget > 0:
                    message = await self._receive()
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
                    budget -= len(message.get("body", b""))
