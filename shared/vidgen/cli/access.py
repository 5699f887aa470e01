"""`vidgen keys` and `vidgen tenants`: who may call the gateway, and how much each tenant may ask for."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen.cli import options, output
from vidgen.cli.options import wrong
from vidgen.cli.output import Output, WrongUsageError

if TYPE_CHECKING:
    from vidgen.bus import Bus
    from vidgen.keys import Key
    from vidgen.tenants import Tenant

keys_app = typer.Typer(
    no_args_is_help=True, help="API keys: who may call the gateway. Needs the bus (VIDGEN_NATS_URL)."
)
tenants_app = typer.Typer(no_args_is_help=True, help="Limits of each tenant. Needs the bus (VIDGEN_NATS_URL).")

UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1)}

TenantId = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's id: lower case letters, digits and -.")]
Limit = Annotated[str | None, typer.Option(metavar="N|usual", help="0: no limit; usual: what the settings say.")]
Share = Annotated[str | None, typer.Option(metavar="N|usual", help="1 to 1000; usual: what the settings say.")]


def _with_bus(as_json: bool, act: Callable[[Output, Bus], Awaitable[None]]) -> None:
    async def acting(out_put: Output) -> None:
        from vidgen import jetstream, settings

        own = settings.read(settings.Settings)
        connection: dict[str, Any] = dict(own.nats_options())
        async with jetstream.connect(own.nats_url, "vidgen-cli", **connection) as bus:
            await act(out_put, bus)

    with output.speaking(as_json) as out_put:
        output.run_async(lambda: acting(out_put))


@keys_app.command("create")
def create(
    tenant: Annotated[str, typer.Option(metavar="TENANT", help="Whose key it is.")] = "default",
    name: Annotated[str, typer.Option(help="What it is for, to know it again.")] = "",
    expires: Annotated[
        str | None, typer.Option(metavar="90d|12h|DATE", help="When it ends; without, when it is revoked.")
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="An operator's key: sees every tenant, and the dead letters.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Make a key, and print it: it is shown this once, and stored as a hash."""

    async def act(out_put: Output, bus: Bus) -> None:
        from pydantic import ValidationError

        from vidgen import errors, keys, tenants, topology
        from vidgen.contracts import field_errors

        _check_tenant("--tenant", tenant)
        now = datetime.now(UTC)
        try:
            key, text = keys.issue(tenant, now, name=name, admin=admin, expires_at=_end_of(expires, now))
        except ValidationError as exc:
            raise WrongUsageError([wrong(f"--{one.field}", one.message) for one in field_errors(exc)]) from None
        except errors.RejectedError as exc:
            raise WrongUsageError([wrong(f"--{exc.field}", exc.message)]) from None
        if tenant != "default":  # gateways learn that there are several; first, for the key is shown behind all else
            await tenants.change(bus.records(topology.TENANTS_BUCKET), tenant, {})
        await bus.records(topology.KEYS_BUCKET).put(key.id, key.to_bytes(), revision=0)
        out_put.emit("key", {**_shown(key), "key": text})
        out_put.note(f"{_whose(key)}; this is the only time that it is shown:")
        out_put.say(text)

    _with_bus(as_json, act)


@keys_app.command("list")
def list_keys(as_json: options.Json = False) -> None:
    """List the keys, without their secrets."""

    async def act(out_put: Output, bus: Bus) -> None:
        from vidgen import keys, topology

        stored = await bus.records(topology.KEYS_BUCKET).all()
        if not stored:
            out_put.note("no keys: make one with `vidgen keys create`")
            return
        found = []
        for key_id, record in stored.items():
            try:
                found.append(keys.read(key_id, record))
            except keys.UnreadableError as exc:
                out_put.note(exc.message)
        found.sort(key=lambda key: key.created_at)
        for key in found:
            out_put.emit("key", _shown(key))
        rows = [
            (key.id, key.tenant, "operator" if key.admin else "", key.state(datetime.now(UTC)), _day(key.created_at),
             _day(key.expires_at), key.name) for key in found
        ]  # fmt: skip
        out_put.table(("key", "tenant", "scope", "state", "made", "ends", "name"), rows)

    _with_bus(as_json, act)


@keys_app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="The id that `keys list` shows, or the key itself.")],
    as_json: options.Json = False,
) -> None:
    """End a key: every gateway refuses it within seconds."""

    async def act(out_put: Output, bus: Bus) -> None:
        from vidgen import keys, topology

        key = await keys.revoke(
            bus.records(topology.KEYS_BUCKET), keys.id_of(key_id) or _checked_id(key_id), datetime.now(UTC)
        )
        out_put.emit("key", _shown(key))
        out_put.say(f"{key.id} revoked")

    _with_bus(as_json, act)


@tenants_app.command("set")
def set_limits(
    tenant: TenantId, rate: Limit = None, burst: Limit = None, jobs: Limit = None, share: Share = None,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Set how much a tenant may ask for; what is not named stays as it is.

    --rate: HTTP requests a second. --burst: how many at once, at each gateway. --jobs: jobs with a task that waits or
    runs. --share: tasks that may wait in one lane's queue; twice the share is twice the turns.
    """

    async def act(out_put: Output, bus: Bus) -> None:
        from vidgen import tenants, topology

        _check_tenant("TENANT", tenant)
        limits = _limits(rate=rate, burst=burst, jobs=jobs, share=share)
        _show(out_put, [await tenants.change(bus.records(topology.TENANTS_BUCKET), tenant, limits)])

    _with_bus(as_json, act)


@tenants_app.command("list")
def list_tenants(as_json: options.Json = False) -> None:
    """List the tenants, with what was set for each."""

    async def act(out_put: Output, bus: Bus) -> None:
        from vidgen.tenants import Tenants

        found = await Tenants(bus).all()
        if not found:
            out_put.note("no tenants beside `default`: `vidgen keys create --tenant NAME` makes one")
            return
        _show(out_put, [found[name] for name in sorted(found)])

    _with_bus(as_json, act)


def _show(out_put: Output, found: list[Tenant]) -> None:
    for tenant in found:
        out_put.emit_model("tenant", tenant)
    told = [(tenant.id, tenant.rate, tenant.burst, tenant.jobs, tenant.share) for tenant in found]
    rows = [
        [part if isinstance(part, str) else "usual" if part is None else f"{part:g}" for part in row] for row in told
    ]
    out_put.table(("tenant", "rate", "burst", "jobs", "share"), rows)


def _check_tenant(option: str, tenant: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from vidgen.contracts import TenantId as Contract

    try:
        TypeAdapter(Contract).validate_python(tenant)
    except ValidationError:
        remedy = f"{tenant!r} is none: use lower case letters, digits and -, at most 32"
        raise WrongUsageError([wrong(option, remedy)]) from None


def _limits(**given: str | None) -> dict[str, Any]:
    from pydantic import ValidationError

    from vidgen.contracts import field_errors
    from vidgen.tenants import Tenant

    told = {name: None if value == "usual" else value for name, value in given.items() if value is not None}
    try:
        checked = Tenant.model_validate({"id": "default", **told})
    except ValidationError as exc:
        raise WrongUsageError([wrong(f"--{one.field}", one.message) for one in field_errors(exc)]) from None
    return {name: getattr(checked, name) for name in told}


def _end_of(told: str | None, now: datetime) -> datetime | None:
    if told is None:
        return None
    if (match := re.fullmatch(r"([1-9]\d{0,4})([hd])", told)) is not None:
        return now + int(match[1]) * UNITS[match[2]]
    try:
        ends = datetime.fromisoformat(told)
    except ValueError:
        raise WrongUsageError([wrong("--expires", f"{told!r} is none: write 90d, 12h or 2027-01-31")]) from None
    ends = ends if ends.tzinfo is not None else ends.replace(tzinfo=UTC)
    if ends <= now:
        raise WrongUsageError([wrong("--expires", f"{told} is over")])
    return ends


def _checked_id(key_id: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{12}", key_id):
        raise WrongUsageError([wrong("KEY", "an id has 12 digits: `vidgen keys list` shows them")])
    return key_id


def _shown(key: Key) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude_none=True, exclude={"hash", "schema_version"})


def _whose(key: Key) -> str:
    return "an operator's key" if key.admin else f"a key of the tenant {key.tenant}"


def _day(at: datetime | None) -> str:
    return "" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"
