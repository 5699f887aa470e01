"""Who may come in: each request has a key, or the session that one opened, and stays within its tenant's limits."""

from __future__ import annotations

import contextlib
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import problems
from gateway.api.problems import HttpError
from gateway.keyring import OPERATOR, Caller, Keyring, UnknownKeyError
from gateway.quotas import Quotas
from vidgen import errors
from vidgen.settings import is_loopback

COOKIE = "vidgen_session"
OPEN = frozenset({"/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics"})
OPEN_FOLDER = "/web/"  # what the page is made of
READING = frozenset({"GET", "HEAD", "OPTIONS"})
SCHEMES = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key: `vidgen keys create`."},
    "session": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "What `POST /v1/session` opens."},
}


def is_open(path: str) -> bool:
    """Whether an address is there for everybody."""
    return path in OPEN or path.startswith(OPEN_FOLDER)


class Door:
    """Lets in who has a key. What is not open to everybody is closed: a new route, too."""

    def __init__(self, app: ASGIApp, keyring: Keyring, quotas: Quotas, wanted: bool) -> None:
        self._app, self._keyring, self._quotas, self._wanted = app, keyring, quotas, wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.ExitStack() as while_open:
            if scope["type"] == "http" and not is_open(scope["path"]):
                try:
                    caller = await self._caller(Headers(scope=scope), scope["method"])
                    await self._quotas.admit(caller.tenant)
                    while_open.enter_context(self._quotas.open(caller.tenant))
                except errors.VidgenError as exc:
                    await problems.of(exc)(scope, receive, send)
                    return
                scope.setdefault("state", {})["caller"] = caller
                send = _kept_by_nobody(send)
            await self._app(scope, receive, send)

    async def _caller(self, headers: Headers, method: str) -> Caller:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if self._wanted and scheme.lower() == "bearer":
            return await self._keyring.identify(key.strip())
        if not self._wanted and not _of_this_machine(headers):
            raise HttpError(
                403, "another_host",
                "without keys a gateway answers to names of its own machine alone (localhost): else set VIDGEN_AUTH=on",
            )  # fmt: skip
        # A browser sends a cookie along, or reaches this machine, whichever page told it to.
        session = cookie_parser(headers.get("cookie", "")).get(COOKIE)
        if self._wanted and session is None:
            raise UnknownKeyError("send an API key: Authorization: Bearer vg_… (`vidgen keys create`)", code="no_key")
        if method not in READING and not _of_our_page(headers, else_=not self._wanted):
            raise HttpError(
                403, "another_page", "only the gateway's own page may do this without a key in the Authorization header"
            )
        return await self._keyring.identify(session or "") if self._wanted else OPERATOR


def _kept_by_nobody(send: Send) -> Send:
    """What a caller is shown is in no cache, of a browser or on the way, unless the answer says otherwise."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault("Cache-Control", "no-store")
        await send(message)

    return sending


def _of_this_machine(headers: Headers) -> bool:
    """Whether a request names this machine: a page elsewhere may have its own name point here (DNS rebinding)."""
    try:
        name = (urlsplit(f"//{headers.get('host', '')}").hostname or "localhost").rstrip(".")
    except ValueError:  # an address in brackets that is none
        return False
    return is_loopback(name) or name.endswith(".localhost")


def _of_our_page(headers: Headers, else_: bool) -> bool:
    """Whether a page of this very address sent a request; `else_` where no browser says from where it comes."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = headers.get("origin")
    return else_ if origin is None else origin.partition("://")[2] == headers.get("host")
