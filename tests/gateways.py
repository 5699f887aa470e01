"""A gateway on the doubles of bus and store, called without a network; and what workers would tell it."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from PIL import Image

from gateway.api.app import create_app
from gateway.api.parts import Parts
from gateway.decoding import Decoders
from gateway.fleet import Fleet
from gateway.forecast import Forecast
from gateway.intake import Intake
from gateway.jobs import Jobs
from gateway.keyring import Keyring
from gateway.quotas import Quotas
from gateway.share import FairShare
from vidgen import contracts, topology
from vidgen.artifacts import ArtifactStore, artifact_key
from vidgen.contracts import Job
from vidgen.metrics import GatewayMetrics
from vidgen.settings import GatewaySettings
from vidgen.tenants import Tenants
from vidgen.testing import MemoryBus, MemoryStore

BOUND = 60.0  # how long to wait for what must come
KEY = "uploads/photo.png"
EDIT = {"prompt": "at the beach"}
DECODERS = Decoders()  # of all gateways of this process: each is a process of its own, once it is wanted


def now() -> datetime:
    return datetime.now(UTC)


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: Any) -> bytes:
    """An image file."""
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **options)
    return out.getvalue()


async def put(store: ArtifactStore, key: str, body: bytes, content_type: str = "image/png") -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(body)
        await store.put(key, path, content_type)


@dataclass
class Gateway:
    """One gateway; `client` calls it."""

    parts: Parts
    app: FastAPI
    client: httpx.AsyncClient

    @classmethod
    async def open(
        cls, bus: MemoryBus | None = None, store: ArtifactStore | None = None, decoders: Decoders | None = None,
        **settings: Any,
    ) -> Gateway:  # fmt: skip
        bus = bus or MemoryBus()
        if store is None:
            store = MemoryStore()
            await put(store, KEY, picture())
        own = GatewaySettings(**settings)
        tenants = Tenants(bus)
        jobs = Jobs(bus, FairShare(bus, tenants, own.tenant_waiting))
        quotas = Quotas(bus, tenants, own)
        intake = Intake(bus, store, jobs, quotas, own.max_upload_bytes, decoders=decoders or DECODERS)
        fleet = Fleet(bus)
        forecast = Forecast(bus, jobs, fleet)
        parts = Parts(own, bus, store, jobs, intake, fleet, forecast, GatewayMetrics(), Keyring(bus), quotas)
        app = create_app(parts)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return cls(parts, app, httpx.AsyncClient(transport=transport, base_url="http://gateway.localhost"))

    async def submit(self, job_id: str | None = None, **request: Any) -> Job:
        """A job, let in by HTTP."""
        body = {"references": [KEY], "edit": EDIT} | ({"job_id": job_id} if job_id else {}) | request
        answer = await self.client.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return Job.model_validate_json(answer.content)

    async def post_form(self, images: Iterable[bytes], request: Any, **headers: str) -> httpx.Response:
        files = [("image", (f"{n}.png", body, "image/png")) for n, body in enumerate(images)]
        sent = request if isinstance(request, bytes) else json.dumps(request).encode()
        return await self.client.post(
            "/v1/jobs", files=[*files, ("request", (None, sent, "application/json"))], headers=headers
        )

    async def tell(self, event: contracts.AnyEvent) -> int:
        """Log an event as a worker does, and apply it as a gateway does; its place in the log."""
        message_id = f"{event.job_id}:{event.run}:{event.type}:{getattr(event, 'stage', '')}"
        seq = await self.parts.bus.publish(
            topology.subject_of_events(event.job_id), event.to_bytes(), message_id=message_id
        )
        await self.parts.jobs.apply(event)
        return seq

    async def count(self, stream: str) -> int:
        return len(await self.parts.bus.tail(stream, None, 100))


def started(job: Job, stage: contracts.Stage = "edit", attempt: int = 1) -> contracts.StageStarted:
    return contracts.StageStarted(
        job_id=job.id, run=job.run, at=now(), stage=stage, attempt=attempt, tries=1, worker="w1", engine="preview",
        model="none",
    )  # fmt: skip


def completed(
    job: Job, stage: contracts.Stage = "edit", attempt: int = 1, names: Iterable[str] = ("edit-0.png",),
    body: bytes = b"", content_type: str = "image/png",
) -> contracts.StageCompleted:  # fmt: skip
    artifacts = tuple(
        contracts.Artifact(
            name=name, key=artifact_key(job.id, name), content_type=content_type, size=len(body), sha256="ab" * 32
        )
        for name in names
    )
    return contracts.StageCompleted(
        job_id=job.id, run=job.run, at=now(), stage=stage, attempt=attempt, tries=1, worker="w1", engine="preview",
        model="none", seed=1, artifacts=artifacts,
    )  # fmt: skip


def failed(job: Job, stage: contracts.Stage = "edit", attempt: int = 1) -> contracts.StageFailed:
    return contracts.StageFailed(
        job_id=job.id, run=job.run, at=now(), stage=stage, attempt=attempt, tries=1, worker="w1", final=True,
        error=contracts.JobError(code="bad_image", message="it cannot be read", stage=stage),
    )  # fmt: skip


def progress(job: Job, step: int, stage: contracts.Stage = "edit") -> contracts.Progress:
    return contracts.Progress(job_id=job.id, stage=stage, run=job.run, step=step, steps=8, at=now())


@dataclass
class Call:
    """One request, seen as the server sees it: what is sent, message by message, while the body is still coming."""

    app: FastAPI
    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    body: AsyncIterator[bytes] | None = None
    received: int = 0
    query: str = ""

    def __post_init__(self) -> None:
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._left = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": self.method, "scheme": "http", "path": self.path, "raw_path": self.path.encode(),
            "query_string": self.query.encode(), "root_path": "", "server": ("gateway", 80), "client": ("test", 1),
            "headers": [(name.lower().encode(), value.encode()) for name, value in self.headers.items()],
        }  # fmt: skip
        await self.app(scope, self._receive, self._send)

    async def _send(self, message: dict[str, Any]) -> None:
        await self.sent.put(message | {"read so far": self.received})

    async def _receive(self) -> dict[str, Any]:
        if self.body is not None:
            async for chunk in self.body:
                self.received += len(chunk)
                return {"type": "http.request", "body": chunk, "more_body": True}
            self.body = None
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def next(self) -> dict[str, Any]:
        """The next message that the app sends."""
        async with asyncio.timeout(BOUND):
            return await self.sent.get()

    async def frames(self, count: int) -> list[tuple[str, str | None, Any]]:
        """The next `count` server-sent events: type, id, data."""
        found: list[tuple[str, str | None, Any]] = []
        while len(found) < count:
            message = await self.next()
            if message["type"] == "http.response.body":
                assert message.get("more_body"), f"the stream ended after {found}"
                found += parse_frames(message["body"].decode())
        assert len(found) == count
        return found

    async def ended(self) -> None:
        """Wait until the app is done with this request."""
        async with asyncio.timeout(BOUND):
            await self._task

    async def leave(self) -> None:
        """The client goes."""
        self._left.set()
        await self.ended()


def parse_frames(text: str) -> list[tuple[str, str | None, Any]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if "data" in fields:
            found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found
