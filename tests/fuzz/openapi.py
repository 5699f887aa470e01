"""The whole OpenAPI against the real app: no 5xx, no status that is not documented, whatever is sent."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance
from tests.gateways import KEY, Gateway, completed, failed, picture, put

from vidgen import contracts, dead, probes, topology
from vidgen.testing import MemoryStore

TIMEOUT_S = 30.0
ENDED = ("done", "rejected")  # and never again under way: the feeds of others are open for as long as their job runs
JOBS = (*ENDED, "failed", "cancelled", "queued", "reviewed")
KEYS = (KEY, "uploads/text.png", "uploads/none.png", "jobs/done/edit-0.png", "uploads/../x", "uploads//x")
LETTERS = 3
CHECKED = [not_a_server_error, status_code_conformance, content_type_conformance]


class Target:
    """The app on the doubles of bus and store, listening, with jobs of every kind."""

    def __init__(self) -> None:
        self.url = ""
        self._listening = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="target")

    def __enter__(self) -> Target:
        self._thread.start()
        assert self._listening.wait(TIMEOUT_S)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        store = MemoryStore()
        gateway = await Gateway.open(store=store)
        await put(store, KEY, picture())
        await put(store, "uploads/text.png", b"no image", "text/plain")
        await _fill(gateway, store)
        async with probes.run_app(gateway.app, "127.0.0.1", 0, grace=1) as self.url:
            self._listening.set()
            await self._stop.wait()
        await gateway.client.aclose()


async def _fill(gateway: Gateway, store: MemoryStore) -> None:
    done, lost, gone, _, reviewed = [
        await gateway.submit(name, **asked)
        for name, asked in (
            ("done", {}), ("failed", {}), ("cancelled", {}), ("queued", {"lane": "batch"}),
            ("reviewed", {"review": True, "i2v": {"prompt": "p"}}),
        )
    ]  # fmt: skip
    store.add("jobs/done/edit-0.png", picture(), "image/png")
    await gateway.tell(completed(done, body=picture()))
    await gateway.tell(completed(reviewed))
    await gateway.tell(failed(lost))
    await gateway.parts.jobs.cancel(gone.id)
    turned_away = await gateway.parts.bus.publish(topology.SUBJECT_REQUESTS, b'{"job_id":"rejected"}', message_id="r")
    assert turned_away
    delivery = await gateway.parts.bus.pull(topology.Consumer(topology.REQUESTS, topology.GATEWAY), 0)
    while delivery is not None:
        await gateway.parts.intake.handle(delivery)
        await delivery.ack()
        delivery = await gateway.parts.bus.pull(topology.Consumer(topology.REQUESTS, topology.GATEWAY), 0)
    for number in range(LETTERS):
        letter = dead.letter(b"[%d]" % number, "elsewhere", contracts.JobError(code="c", message="m"), job_id=None)
        await dead.publish(gateway.parts.bus, letter, message_id=f"letter-{number}")


def fuzz(examples: int, seed: int | None) -> Counter[str]:
    """Try each operation with `examples` calls of each mode; how many calls ended in which status, by operation.

    Without a seed the calls are the same each time.
    """
    counts: Counter[str] = Counter()
    broken: list[BaseException] = []  # as schemathesis' own group of failures is one, and no Exception
    with Target() as target:
        schema = schemathesis.openapi.from_url(f"{target.url}/openapi.json")
        schema.config.update(base_url=target.url)
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                try:
                    _try(operation, mode, examples, seed, counts)
                except hypothesis.errors.Unsatisfiable:  # nothing to be wrong about
                    continue
                except (FailureGroup, httpx.HTTPError, OSError) as exc:
                    broken.append(exc)
    if broken:
        raise BaseExceptionGroup(f"{len(broken)} kinds of calls are answered wrongly", broken)
    return counts


def _try(operation: Any, mode: GenerationMode, examples: int, seed: int | None, counts: Counter[str]) -> None:
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )  # fmt: skip
    @hypothesis.given(operation.as_strategy(generation_mode=mode), st.data())
    def one(case: Case, data: st.DataObject) -> None:
        _aim(case, data)
        response = case.call(timeout=TIMEOUT_S)
        counts[f"{operation.method.upper()} {operation.path} {response.status_code}"] += 1
        case.validate_response(response, checks=CHECKED)

    if seed is not None:
        one = hypothesis.seed(seed)(one)
    one()


def _aim(case: Case, data: st.DataObject) -> None:
    """Names of things that are there, for what is made up is seldom one; an open feed only of what has ended."""
    path = case.path_parameters or {}
    if "job_id" in path:
        jobs = ENDED if case.operation.path.endswith("/events") else JOBS
        if case.operation.path.endswith("/events") or data.draw(st.booleans()):
            case.path_parameters["job_id"] = data.draw(st.sampled_from(jobs))
    if "name" in path and data.draw(st.booleans()):
        case.path_parameters["name"] = "edit-0.png"
    if "seq" in path and data.draw(st.booleans()):
        case.path_parameters["seq"] = data.draw(st.integers(1, LETTERS + 1))
    if isinstance(case.body, dict) and isinstance(case.body.get("references"), list) and data.draw(st.booleans()):
        case.body["references"] = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3))


def table(counts: Counter[str]) -> str:
    return json.dumps(dict(sorted(counts.items())), indent=1)


def statuses(counts: Counter[str]) -> Iterator[int]:
    return (int(name.rsplit(" ", 1)[1]) for name in counts)
