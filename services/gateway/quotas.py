"""How much a tenant may ask for: requests a second at this gateway, and jobs that are not done."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

from vidgen import errors, topology
from vidgen.bus import Bus
from vidgen.contracts import DEFAULT_TENANT
from vidgen.settings import GatewaySettings
from vidgen.tenants import Tenant, Tenants

RETRY_JOBS_S = 10


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
        self._left: dict[str, tuple[float, float]] = {}  # requests that a tenant has left, and when that was so
        self._entering: Counter[str] = Counter()  # jobs that are being let in here

    async def admit(self, tenant: str) -> None:
        """Count an HTTP request; raises LimitError `rate_limited` where it is one too many, and BusError."""
        told = await self._tenants.get(tenant)
        rate = self._limit(told, "rate")
        if not rate:
            return
        most = max(1.0, self._limit(told, "burst"))
        now = self._clock()
        left, at = self._left.get(tenant, (most, now))
        left = min(most, left + (now - at) * rate)
        if left < 1:
            self._left[tenant] = left, now
            raise LimitError(
                f"more than {rate:g} requests a second: send fewer, or ask the operator for a higher limit",
                math.ceil((1 - left) / rate), code="rate_limited",
            )  # fmt: skip
        self._left[tenant] = left - 1, now

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
