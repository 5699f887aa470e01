"""Keys for tests, in the bus of a gateway as `vidgen keys` puts them there."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from vidgen import keys, tenants, topology
from vidgen.bus import Bus
from vidgen.contracts import DEFAULT_TENANT


async def key_for(bus: Bus, tenant: str = DEFAULT_TENANT, *, admin: bool = False, expired: bool = False) -> str:
    """A new key, as it would be shown."""
    now = datetime.now(UTC)
    key, text = keys.issue(tenant, now, admin=admin, expires_at=now - timedelta(seconds=1) if expired else None)
    await bus.records(topology.KEYS_BUCKET).put(key.id, key.to_bytes(), revision=0)
    if tenant != DEFAULT_TENANT:
        await tenants.change(bus.records(topology.TENANTS_BUCKET), tenant, {})
    return text


async def revoke(bus: Bus, text: str) -> None:
    await keys.revoke(bus.records(topology.KEYS_BUCKET), keys.id_of(text) or "", datetime.now(UTC))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
