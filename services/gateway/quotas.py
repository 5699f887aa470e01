"""How much a tenant may ask for: requests a second, and jobs that are not done.

Each replica counts by itself and tells the others a moment later, so no request waits for anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated

import pydantic
from pydantic import Field

from gateway.line import Line
from vidgen import errors, topology
from vidgen.bus import Bus, Feed
from vidgen.contracts import DEFAULT_TENANT, Message
from vidgen.settings import GatewaySettings
from vidgen.tenants import Tenant, Tenants

RETRY_JOBS_S = 10
RETRY_OPEN_S = 5
TELL_S = 0.5
PAGES = 4  # of the list that are looked for at once: through 2,000 jobs each takes half a second of this process
FORM_BYTES = 384 << 20  # of a tenant's forms under way: their images lie on a disk of which k8s/base gives 2 GiB


class Usage(Message):
    """HTTP requests that a gateway let in since it told last, by tenant; between gateways alone."""

    gateway: str
    requests: dict[str, Annotated[int, Field(ge=0)]]


class LimitError(errors.VidgenError):
    """A tenant asks for more than it may; after `retry_after_s` it may try again."""

    def __init__(self, message: str, retry_after_s: int, *, code: str) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class Quotas:
    """What each tenant has left. The operator's own tenant has no limits but those that were set for it."""

    def __init__(
        self, bus: Bus, tenants: Tenants, settings: GatewaySettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bus, self._tenants, self._clock = bus, tenants, clock
        self._usual = {
            "rate": settings.tenant_rate, "burst": settings.tenant_burst, "jobs": settings.tenant_jobs
        }  # fmt: skip
        self._id = secrets.token_hex(4)
        self._left: dict[str, tuple[float, float]] = {}  # requests that a tenant has left, and when that was so
        self._used: Counter[str] = Counter()  # requests that were let in here, and that nobody was told of yet
        self.pages = Line(PAGES)  # by turns of tenants
        self._entering: Counter[str] = Counter()  # jobs that are being let in here
        self._most_open = settings.tenant_open
        self._open: Counter[str] = Counter()  # requests that are not answered to their end here
        self._form_bytes: Counter[str] = Counter()  # and of those that are forms

    async def admit(self, tenant: str) -> None:
        """Count an HTTP request; raises LimitError `rate_limited` where it is one too many, and BusError."""
        rate, left = await self._left_of(tenant)
        if left < 1:
            raise LimitError(
                f"more than {rate:g} requests a second: send fewer, or ask the operator for a higher limit",
                math.ceil((1 - left) / rate), code="rate_limited",
            )  # fmt: skip
        if rate:
            self._take(tenant, 1)
            self._used[tenant] += 1

    async def charge(self, tenant: str, requests: int) -> None:
        """Count a request that was let in for so many more: it took that much. Raises BusError."""
        rate, _ = await self._left_of(tenant)
        if rate and requests:
            self._take(tenant, requests)
            self._used[tenant] += requests

    async def _left_of(self, tenant: str) -> tuple[float, float]:
        """A tenant's rate, 0 for none, and how many requests it has left."""
        told = await self._tenants.get(tenant)
        rate = self._limit(told, "rate")
        if not rate:
            return 0.0, math.inf
        most = max(1.0, self._limit(told, "burst"))
        now = self._clock()
        left, at = self._left.get(tenant, (most, now))
        left = min(most, left + (now - at) * rate)
        self._left[tenant] = left, now
        return rate, left

    def _take(self, tenant: str, requests: int) -> None:
        left, at = self._left[tenant]
        self._left[tenant] = left - requests, at  # below nothing where others let more in than there was

    async def run(self, stop: asyncio.Event) -> None:
        """Tell the other replicas what was let in here, and count what was let in there, until `stop`.

        A tenant that comes by several of them has its burst at each, and then its rate over all together. What cannot
        be told for want of the bus is not told later: the rate is exceeded for as long.
        """
        while not stop.is_set():
            try:
                feed = await self._bus.listen(topology.SUBJECT_USAGE)
                try:
                    while not stop.is_set():
                        await self._hear(feed)
                        await self._tell()
                finally:
                    await feed.close()
            except errors.BusError:  # whoever needs the bus says so aloud
                self._used.clear()
                await asyncio.sleep(TELL_S)

    async def _hear(self, feed: Feed) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + TELL_S
        while (left_s := until - loop.time()) > 0 and (stored := await feed.next(left_s)) is not None:
            with contextlib.suppress(pydantic.ValidationError):  # of a gateway of another version
                await self._hear_of(Usage.model_validate_json(stored.body))

    async def _hear_of(self, usage: Usage) -> None:
        for tenant, requests in usage.requests.items() if usage.gateway != self._id else ():
            rate, _ = await self._left_of(tenant)
            if rate:
                self._take(tenant, requests)

    async def _tell(self) -> None:
        if used := dict(self._used):
            self._used.clear()
            await self._bus.signal(topology.SUBJECT_USAGE, Usage(gateway=self._id, requests=used).to_bytes())

    @contextlib.contextmanager
    def open(self, tenant: str) -> Iterator[None]:
        """Count a request for as long as it is open; raises LimitError `too_many_open`.

        A feed of events, or a download that nobody reads, takes a connection of all that this gateway may have.
        """
        most = 0 if tenant == DEFAULT_TENANT else self._most_open
        if most and self._open[tenant] >= most:
            raise LimitError(
                f"{most} requests are open, feeds of events among them, which is as many as may be: close one",
                RETRY_OPEN_S, code="too_many_open",
            )  # fmt: skip
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]

    @contextlib.contextmanager
    def form(self, tenant: str, size: int, largest: int) -> Iterator[None]:
        """Count a form's bytes for as long as it is read and looked at; raises LimitError `too_many_open`.

        One that never comes to its end stays on this gateway's disk, which is everybody's. There is room for one of the
        `largest` in any case.
        """
        most = 0 if tenant == DEFAULT_TENANT else max(FORM_BYTES, largest)
        if most and self._form_bytes[tenant] + size > most:
            raise LimitError(
                f"forms of {self._form_bytes[tenant]:,} bytes are under way, and {most:,} may be: send fewer at once",
                RETRY_OPEN_S, code="too_many_open",
            )  # fmt: skip
        self._form_bytes[tenant] += size
        try:
            yield
        finally:
            self._form_bytes[tenant] -= size
            if not self._form_bytes[tenant]:
                del self._form_bytes[tenant]

    @contextlib.asynccontextmanager
    async def room(self, tenant: str) -> AsyncIterator[None]:
        """Let a job in within; raises LimitError `too_many_jobs` where the tenant has as many as it may, and BusError.

        What has no task that waits or runs, such as a job that waits for a review, does not count. Of what comes at the
        same moment through several gateways each may let in one too many.
        """
        await self._tenants.meet(tenant)
        most = int(self._limit(await self._tenants.get(tenant), "jobs"))
        self._entering[tenant] += 1
        try:
            if most and await self._unfinished(tenant) + self._entering[tenant] > most:
                raise LimitError(
                    f"{most} jobs are not done yet, which is as many as may be: wait for one, or cancel one",
                    RETRY_JOBS_S, code="too_many_jobs",
                )  # fmt: skip
            yield
        finally:
            self._entering[tenant] -= 1
            if not self._entering[tenant]:
                del self._entering[tenant]

    async def _unfinished(self, tenant: str) -> int:
        return sum(await asyncio.gather(*(self._bus.count(*place) for place in topology.tasks_of(tenant))))

    def _limit(self, tenant: Tenant, name: str) -> float:
        own: float | None = getattr(tenant, name)
        if own is not None:
            return own
        return 0.0 if tenant.id == DEFAULT_TENANT else self._usual[name]
