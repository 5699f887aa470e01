"""Whose jobs there are, and what limits were set for each; what was not set follows from the settings."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import structlog
from pydantic import Field, ValidationError

from vidgen import errors, topology
from vidgen.bus import Bus, Records
from vidgen.contracts import DEFAULT_TENANT, Message, TenantId

log = structlog.get_logger(__name__)

KEEP_S = 3.0  # that long a change may take to be heard of

Rate = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]


class Tenant(Message):
    """One tenant, with what was set for it alone; None: as the settings say, 0: no limit."""

    schema_version: Literal[1] = 1
    id: TenantId
    rate: Rate | None = Field(None, description="HTTP requests a second.")
    burst: Count | None = Field(None, description="HTTP requests at once.")
    jobs: Count | None = Field(None, description="Jobs with a task that waits or runs.")
    share: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Tasks that may wait in one lane's queue; the others are held back."
    )


class UnreadableError(errors.VidgenError):
    """What was set for a tenant is of another version."""

    code = "tenant_unreadable"


async def change(records: Records, tenant: str, limits: dict[str, Any]) -> Tenant:
    """Set limits of a tenant, known or new; those that are not named stay. Raises BusError.

    Of an entry of another version none can be set: UnreadableError; that there is such a tenant is known by it.
    """
    while True:
        found = await records.get(tenant)
        try:
            before = Tenant.model_validate_json(found[0]) if found else Tenant(id=tenant)
        except ValidationError as exc:
            if not limits:
                return Tenant(id=tenant)
            raise UnreadableError(
                f"what was set for the tenant {tenant} cannot be read: use the version of vidgen that set it"
            ) from exc
        after = Tenant.model_validate(before.model_dump() | limits)
        if found is not None and after == before:
            return before
        try:
            await records.put(tenant, after.to_bytes(), revision=found[1] if found else 0)
        except errors.ConflictError:
            continue
        return after


class Tenants:
    """All tenants, as one process knows them: read anew every few seconds."""

    def __init__(self, bus: Bus, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._records = bus.records(topology.TENANTS_BUCKET)
        self._clock = clock
        self._lock = asyncio.Lock()
        self._known: dict[str, Tenant] | None = None
        self._unreadable: set[str] = set()
        self._until = float("-inf")

    async def all(self) -> dict[str, Tenant]:
        """The tenants by id, as they were last heard of; raises BusError where they never were.

        Of one whose entry is of another version only that there is such a tenant is known.
        """
        if self._clock() >= self._until:
            async with self._lock:
                if self._clock() >= self._until:
                    await self._read()
        return self._known or {}

    async def _read(self) -> None:
        try:
            entries = await self._records.all()
        except errors.BusError:
            if self._known is None:
                raise
        else:
            read = {name: self._parse(name, value) for name, value in entries.items()}
            self._known = {name: tenant for name, tenant in read.items() if tenant is not None}
        self._until = self._clock() + KEEP_S  # while the bus is away one asks, and not each caller in turn

    def _parse(self, name: str, value: bytes) -> Tenant | None:
        try:
            tenant = Tenant.model_validate_json(value)
        except ValidationError:
            if name not in self._unreadable:
                log.warning(
                    "a tenant's limits cannot be read, the usual ones hold: are they of another version?",
                    _event="tenant_unreadable", tenant=name,
                )  # fmt: skip
            self._unreadable.add(name)
            with contextlib.suppress(ValidationError):  # no such name can be a tenant's
                return Tenant(id=name)
            return None
        self._unreadable.discard(name)
        return tenant

    async def get(self, tenant: str) -> Tenant:
        """What was set for a tenant; raises BusError."""
        return (await self.all()).get(tenant) or Tenant(id=tenant)

    async def meet(self, tenant: str) -> None:
        """Know of a tenant from now on; raises BusError."""
        if tenant != DEFAULT_TENANT and tenant not in (known := await self.all()):
            self._known = known | {tenant: await change(self._records, tenant, {})}

    async def several(self) -> bool:
        """Whether there is anybody beside the operator; raises BusError."""
        return any(tenant != DEFAULT_TENANT for tenant in await self.all())
