"""The outermost layer: each request is measured, and whatever went wrong inside is still answered."""

from __future__ import annotations

import re
import time
from contextlib import AbstractContextManager, nullcontext

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import problems
from vidgen import tracing
from vidgen.metrics import GatewayMetrics

log = structlog.get_logger(__name__)

MOVING = re.compile(r"/v1/(?:jobs|dead)(?:/|$)")
CLIENT_LEFT = 499  # as nginx logs it; nobody is there to read it


class Edge:
    """Measures requests by route template, and answers for what nobody caught.

    The time is that to the beginning of the response: a feed of events is open for as long as its job runs.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with _span(scope) if tracing.on() else nullcontext():
            await self._measured(scope, receive, send)

    async def _measured(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.perf_counter()
        status = CLIENT_LEFT
        seconds: float | None = None

        async def watched(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.perf_counter() - begun
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            log.info("a client left in the middle of its request", _event="client_left", path=scope["path"])
        except Exception as exc:
            if seconds is not None:
                raise  # too late for another answer: the server cuts the connection
            await problems.internal(exc)(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", None)
            elapsed = time.perf_counter() - begun if seconds is None else seconds
            self._metrics.http_request(route, scope["method"], status, elapsed)
            if tracing.on():
                _tell_span(scope, route, status)


def _span(scope: Scope) -> AbstractContextManager[None]:
    """A span for what begins a job or moves it on; who only looks leaves no trace."""
    if scope["method"] != "POST" or not MOVING.match(scope["path"]):
        return nullcontext()
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return tracing.span("POST", of=headers, kind="server", **{"http.request.method": "POST"})


def _tell_span(scope: Scope, route: str | None, status: int) -> None:
    if route is not None:  # not known before, and a path would be as many names as there are jobs
        tracing.rename(f"POST {route}")
    told: dict[str, tracing.Value] = {"http.route": route, "http.response.status_code": status}
    tracing.about(job_id=scope.get("path_params", {}).get("job_id"), **told)
    if status >= 500:
        tracing.failed(str(status))
