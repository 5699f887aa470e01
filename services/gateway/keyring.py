"""Who calls: a key's tenant and scope, read from the bus and kept for a moment."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from gateway.jobs import now
from vidgen import errors, keys, topology
from vidgen.bus import Bus
from vidgen.contracts import DEFAULT_TENANT
from vidgen.keys import Key

log = structlog.get_logger(__name__)

KEEP_S = 2.0  # that long a revoked key may still open this replica
LOOK_S = 3.0
KEPT = 4096  # keys; whoever tries many pushes out no more than what can be read again


class UnknownKeyError(errors.VidgenError):
    """The key opens nothing."""

    code = "unknown_key"


@dataclass(frozen=True)
class Caller:
    """Whoever calls: a tenant, or the operator, who sees them all."""

    tenant: str = DEFAULT_TENANT
    admin: bool = False
    name: str = ""
    key_id: str | None = None

    def sees(self, tenant: str) -> bool:
        """Whether what belongs to a tenant is shown."""
        return self.admin or tenant == self.tenant


OPERATOR = Caller(admin=True)


class Keyring:
    """The keys, as one gateway knows them."""

    def __init__(self, bus: Bus, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._records = bus.records(topology.KEYS_BUCKET)
        self._clock = clock
        self._kept: OrderedDict[str, tuple[Key | None, float]] = OrderedDict()
        self._unreadable: set[str] = set()

    async def identify(self, text: str) -> Caller:
        """Whose key this is; raises UnknownKeyError and BusError."""
        key_id = keys.id_of(text)
        key = await self._find(key_id) if key_id is not None else None
        if not keys.opens(key, text) or key is None:
            raise UnknownKeyError("this key is not known: ask the operator for one (`vidgen keys create`)")
        match key.state(now()):
            case "revoked":
                raise UnknownKeyError("this key is revoked: ask the operator for another one", code="key_revoked")
            case "expired":
                raise UnknownKeyError("this key has expired: ask the operator for another one", code="key_expired")
        return Caller(key.tenant, key.admin, key.name, key.id)

    async def ended(self, caller: Caller) -> None:
        """Wait until the caller's key opens nothing any more: for answers that go on for long."""
        while True:
            await asyncio.sleep(LOOK_S)
            if caller.key_id is None:
                continue
            with contextlib.suppress(errors.BusError):
                key = await self._find(caller.key_id)
                if key is None or key.state(now()) != "active":
                    return

    async def _find(self, key_id: str) -> Key | None:
        kept = self._kept.get(key_id)
        if kept is None or self._clock() >= kept[1]:
            kept = await self._read(key_id), self._clock() + KEEP_S
            self._kept[key_id] = kept
            self._kept.move_to_end(key_id)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return kept[0]

    async def _read(self, key_id: str) -> Key | None:
        try:
            return await keys.find(self._records, key_id)
        except keys.UnreadableError as exc:  # it opens nothing here, and those of others all the same
            if key_id not in self._unreadable:
                log.warning(exc.message, _event="key_unreadable", key=key_id)
            self._unreadable.add(key_id)
            return None
