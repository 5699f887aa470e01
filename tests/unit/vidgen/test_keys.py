"""Keys: random, recognised by their form, compared as hashes, and never to be had back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from vidgen import errors, keys, tenants, topology
from vidgen.testing import MemoryBus

AT = datetime(2026, 11, 1, tzinfo=UTC)


def test_a_key_has_256_random_bits_and_says_which_it_is() -> None:
    made = [keys.issue("acme", AT) for _ in range(50)]
    assert len({text for _, text in made}) == len({key.id for key, _ in made}) == 50
    for key, text in made:
        assert keys.id_of(text) == key.id
        assert len(text.split("_", 2)[2]) == 43
        assert keys.opens(key, text)


def test_no_other_text_is_the_key() -> None:
    key, text = keys.issue("acme", AT)
    other = keys.issue("acme", AT)[1]
    for wrong in (other, text[:-1], text + "A", text.upper(), "", f"vg_{key.id}_{other.split('_', 2)[2]}"):
        assert not keys.opens(key, wrong)
    assert not keys.opens(None, text)


@pytest.mark.parametrize("text", ["", "vg_", "vg_0123456789ab_", "sk_0123456789ab_" + "a" * 43, "vg_*_" + "a" * 43])
def test_what_has_not_the_form_of_a_key_names_none(text: str) -> None:
    assert keys.id_of(text) is None


def test_what_is_stored_does_not_tell_the_key() -> None:
    key, text = keys.issue("acme", AT, name="for the shop")
    assert text.split("_", 2)[2] not in key.to_bytes().decode()
    assert text not in repr(key)


def test_a_key_ends_when_it_says_or_when_it_is_revoked() -> None:
    key, _ = keys.issue("acme", AT, expires_at=AT + timedelta(days=1))
    assert key.state(AT) == "active"
    assert key.state(AT + timedelta(days=1)) == "expired"
    assert key.model_copy(update={"revoked_at": AT}).state(AT) == "revoked"


def test_an_operators_key_belongs_to_no_other_tenant() -> None:
    with pytest.raises(errors.RejectedError, match="default"):
        keys.issue("acme", AT, admin=True)


async def test_a_key_is_revoked_once_whoever_writes_meanwhile() -> None:
    bus = MemoryBus()
    records = bus.records(topology.KEYS_BUCKET)
    key, _ = keys.issue("acme", AT)
    await records.put(key.id, key.to_bytes(), revision=0)
    bus.fail_next("records.put", errors.ConflictError())
    first = await keys.revoke(records, key.id, AT)
    again = await keys.revoke(records, key.id, AT + timedelta(hours=1))
    assert first.revoked_at == again.revoked_at == AT
    with pytest.raises(errors.NotFoundError, match="keys list"):
        await keys.revoke(records, "0" * 12, AT)


async def test_limits_are_changed_one_by_one_and_heard_of_soon() -> None:
    bus, at = MemoryBus(), 0.0
    records, known = bus.records(topology.TENANTS_BUCKET), tenants.Tenants(bus, clock=lambda: at)
    assert not await known.several()
    bus.fail_next("records.put", errors.ConflictError())
    await tenants.change(records, "acme", {"jobs": 5})
    await tenants.change(records, "acme", {"rate": 2.0})
    assert not await known.several()
    at += tenants.KEEP_S
    assert await known.get("acme") == tenants.Tenant(id="acme", jobs=5, rate=2.0)
    assert await known.get("umbrella") == tenants.Tenant(id="umbrella")
    assert await known.several()


async def test_while_the_bus_is_away_what_was_heard_holds_and_one_asks_for_all() -> None:
    bus, at = MemoryBus(), 0.0
    known = tenants.Tenants(bus, clock=lambda: at)
    bus.down = True
    with pytest.raises(errors.BusError):
        await known.all()
    bus.down = False
    await tenants.change(bus.records(topology.TENANTS_BUCKET), "acme", {})
    assert await known.several()
    bus.down, at = True, tenants.KEEP_S
    before = bus.calls["records.all"]
    assert [await known.several() for _ in range(5)] == [True] * 5
    assert bus.calls["records.all"] == before + 1


async def test_a_tenant_that_is_met_is_known_everywhere() -> None:
    bus = MemoryBus()
    one, other = tenants.Tenants(bus), tenants.Tenants(bus)
    await one.meet("acme")
    await one.meet("default")
    assert set(await one.all()) == set(await other.all()) == {"acme"}


async def test_a_tenant_of_another_version_has_the_usual_limits_and_is_told_of_once() -> None:
    bus, at = MemoryBus(), 0.0
    records, known = bus.records(topology.TENANTS_BUCKET), tenants.Tenants(bus, clock=lambda: at)
    await tenants.change(records, "umbrella", {"jobs": 5})
    await records.put("acme", b'{"id":"acme","jobs":7,"colour":"red"}')
    await records.put("No_Tenant", b"{}")
    with capture_logs() as logs:
        for _ in range(3):
            assert set(await known.all()) == {"acme", "umbrella"}
            await known.meet("acme")
            at += tenants.KEEP_S
    assert await known.get("acme") == tenants.Tenant(id="acme")
    assert (await known.get("umbrella")).jobs == 5
    assert sorted((entry["_event"], entry["tenant"]) for entry in logs) == [
        ("tenant_unreadable", "No_Tenant"), ("tenant_unreadable", "acme"),
    ]  # fmt: skip
    assert await records.get("acme") == (b'{"id":"acme","jobs":7,"colour":"red"}', 2)  # as it was written
