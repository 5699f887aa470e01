"""`vidgen keys` and `vidgen tenants`, on the double of the bus."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from vidgen import jetstream, keys, topology
from vidgen.cli import app
from vidgen.testing import MemoryBus


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> MemoryBus:
    bus = MemoryBus()

    @contextlib.asynccontextmanager
    async def connect(url: str, name: str, **options: object) -> AsyncIterator[MemoryBus]:
        yield bus

    monkeypatch.setattr(jetstream, "connect", connect)
    return bus


def vidgen(*arguments: str, code: int = 0) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == code, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def stored(bus: MemoryBus, bucket: str = topology.KEYS_BUCKET) -> dict[str, bytes]:
    return asyncio.run(bus.records(bucket).all())


def test_a_key_is_printed_once_and_stored_as_its_hash(bus: MemoryBus) -> None:
    [made] = vidgen("keys", "create", "--tenant", "acme", "--name", "shop")
    [(key_id, record)] = stored(bus).items()
    key = keys.Key.model_validate_json(record)
    assert (key.id, key.tenant, key.name, key.admin) == (key_id, "acme", "shop", False)
    assert keys.opens(key, made["key"])
    assert made["key"].split("_", 2)[2] not in record.decode()
    assert "hash" not in made
    assert set(stored(bus, topology.TENANTS_BUCKET)) == {"acme"}
    [listed] = vidgen("keys", "list")
    assert "key" not in listed
    assert "hash" not in listed


def test_for_people_the_key_alone_is_on_standard_output(bus: MemoryBus) -> None:
    result = CliRunner().invoke(app, ["keys", "create", "--admin"])
    assert keys.id_of(result.stdout.strip()) is not None
    assert "an operator's key" in result.stderr
    shown = CliRunner().invoke(app, ["keys", "list"]).stdout
    assert "operator" in shown
    assert result.stdout.strip() not in shown


@pytest.mark.parametrize(("told", "days"), [("90d", 90.0), ("12h", 0.5), ("2999-01-01", None)])
def test_a_key_may_end_by_itself(bus: MemoryBus, told: str, days: float | None) -> None:
    [made] = vidgen("keys", "create", "--expires", told)
    ends = datetime.fromisoformat(made["expires_at"])
    wanted = datetime(2999, 1, 1, tzinfo=UTC) if days is None else datetime.now(UTC) + timedelta(days=days)
    assert abs(ends - wanted) < timedelta(minutes=10)


def test_a_key_is_revoked_by_its_id_or_by_itself(bus: MemoryBus) -> None:
    made = [vidgen("keys", "create")[0] for _ in range(2)]
    vidgen("keys", "revoke", made[0]["id"])
    vidgen("keys", "revoke", made[1]["key"])
    assert all(one["revoked_at"] for one in vidgen("keys", "list"))


@pytest.mark.parametrize(
    ("arguments", "option", "code"),
    [
        (("keys", "create", "--tenant", "ACME"), "--tenant", 2), (("keys", "create", "--tenant", ""), "--tenant", 2),
        (("keys", "create", "--expires", "soon"), "--expires", 2),
        (("keys", "create", "--expires", "2020-01-01"), "--expires", 2), (("keys", "revoke", "x"), "KEY", 2),
        (("keys", "create", "--name", "x" * 101), "--name", 2), (("keys", "create", "--name", "\udcff"), "--name", 2),
        (("tenants", "set", "a b"), "TENANT", 2), (("tenants", "set", "acme", "--jobs", "many"), "--jobs", 2),
        (("tenants", "set", "acme", "--share", "0"), "--share", 2),
        (("tenants", "set", "acme", "--rate", "-1"), "--rate", 2),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_and_nothing_is_stored(
    bus: MemoryBus, arguments: tuple[str, ...], option: str, code: int
) -> None:
    [error] = vidgen(*arguments, code=code)
    assert [one["field"] for one in error["errors"]] == [option]
    assert not stored(bus)
    assert not stored(bus, topology.TENANTS_BUCKET)


def test_an_operators_key_of_another_tenant_and_a_key_that_is_not_there_are_refused(bus: MemoryBus) -> None:
    [told] = vidgen("keys", "create", "--admin", "--tenant", "acme", code=2)
    assert [error["field"] for error in told["errors"]] == ["--tenant"]
    assert vidgen("keys", "revoke", "0" * 12, code=1)[0]["code"] == "not_found"


def test_limits_are_set_one_by_one_and_given_back(bus: MemoryBus) -> None:
    vidgen("tenants", "set", "acme", "--rate", "2.5", "--jobs", "0")
    vidgen("tenants", "set", "acme", "--share", "16", "--rate", "usual")
    [told] = vidgen("tenants", "list")
    assert told == {"type": "tenant", "schema_version": 1, "id": "acme", "jobs": 0, "share": 16}
    shown = CliRunner().invoke(app, ["tenants", "list"]).stdout.split()
    assert shown[-5:] == ["acme", "usual", "usual", "0", "16"]


OF_TOMORROW = b'{"schema_version": 2, "colour": "red"}'


def test_a_key_of_another_version_hides_no_other_and_says_that_it_cannot_be_read(bus: MemoryBus) -> None:
    asyncio.run(bus.records(topology.KEYS_BUCKET).put("0123456789ab", OF_TOMORROW))
    [made] = vidgen("keys", "create")

    result = CliRunner().invoke(app, ["keys", "list"])

    assert result.exit_code == 0
    assert made["id"] in result.stdout
    assert "0123456789ab cannot be read" in result.stderr
    [told] = vidgen("keys", "revoke", "0123456789ab", code=1)
    assert told["code"] == "key_unreadable"
    assert stored(bus)["0123456789ab"] == OF_TOMORROW


def test_a_tenant_of_another_version_keeps_its_limits_and_may_have_keys(bus: MemoryBus) -> None:
    asyncio.run(bus.records(topology.TENANTS_BUCKET).put("acme", OF_TOMORROW))

    [made] = vidgen("keys", "create", "--tenant", "acme")

    assert made["tenant"] == "acme"
    [told] = vidgen("tenants", "set", "acme", "--jobs", "5", code=1)
    assert told["code"] == "tenant_unreadable"
    assert stored(bus, topology.TENANTS_BUCKET)["acme"] == OF_TOMORROW


def test_a_key_that_could_not_be_shown_is_not_stored(bus: MemoryBus) -> None:
    """Its text was gone, and it opened the gateway all the same."""
    bus.fail_next("records.get")  # of the tenant
    vidgen("keys", "create", "--tenant", "acme", code=1)
    assert stored(bus) == {}
