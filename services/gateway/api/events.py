"""A job's log and progress as server-sent events: from the start or where the client left off, until the job ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.api import problems
from gateway.api.feed import JobFeed
from gateway.api.parts import CallerHere, JobIdHere, PartsHere, seen
from vidgen.contracts import Job

router = APIRouter(prefix="/v1/jobs/{job_id}/events", tags=["events"])

MEDIA_TYPE = "text/event-stream"
EVENTS_DOC: dict[int | str, dict[str, object]] = {
    200: {
        "description": "One event per entry of the job's log, named by its type, with an id for `Last-Event-ID`; "
        "`progress`, and with `place` `queue`, in between, without an id; at the end `job` with the record.",
        "content": {MEDIA_TYPE: {}},
    }
}


class EventStream(Response):
    """Sends a feed until it ends, the client leaves, `over` is, or the process is about to; then the feed is closed."""

    media_type = MEDIA_TYPE

    def __init__(self, feed: JobFeed, over: Coroutine[Any, Any, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._feed, self._over = feed, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        ending = (asyncio.create_task(_gone(receive)), asyncio.create_task(self._over))
        try:
            await asyncio.wait((sending, *ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ending:
                task.cancel()
            if not sending.done():
                sending.cancel()
            await asyncio.gather(sending, *ending, return_exceptions=True)
            await self._feed.close()
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for frame in self._feed.frames():
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@router.get("", response_class=Response, responses=EVENTS_DOC | problems.responses(404, 422, 503))
async def events(
    job_id: JobIdHere,
    parts: PartsHere,
    caller: CallerHere,
    place: Annotated[bool, Query(description="While the job waits, tell its place in the queue, as `queue`.")] = False,
    last_event_id: Annotated[str, Header(description="The id of the last event that was seen.")] = "",
) -> Response:
    """Everything that happened to a job, and what happens, as server-sent events."""
    after = int(last_event_id) if last_event_id.isdecimal() and len(last_event_id) <= 18 else 0
    forecast = parts.forecast if place else None

    async def look() -> Job:
        return await seen(job_id, parts.jobs, caller)

    feed = await JobFeed.open(parts.bus, parts.jobs, job_id, after, parts.stopping, forecast, look)
    return EventStream(feed, parts.keyring.ended(caller))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
