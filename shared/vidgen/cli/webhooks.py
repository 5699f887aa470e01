"""`vidgen webhooks`: what the receivers of webhooks need to know."""

from __future__ import annotations

from typing import Annotated

import typer

from vidgen.cli import options, output
from vidgen.cli.options import wrong
from vidgen.cli.output import WrongUsageError

app = typer.Typer(no_args_is_help=True, help="Webhooks: what their receivers need to know.")


@app.callback()
def _group() -> None: ...


@app.command("secret")
def secret(
    tenant: Annotated[str, typer.Option(metavar="TENANT", help="Whose webhooks it signs.")] = "default",
    as_json: options.Json = False,
) -> None:
    """Print the secret with which a tenant verifies signatures; needs the gateway's VIDGEN_WEBHOOK_SECRET."""
    with output.speaking(as_json) as out_put:
        from pydantic import TypeAdapter, ValidationError

        from vidgen import errors, settings, webhooks
        from vidgen.contracts import TenantId

        try:
            TypeAdapter(TenantId).validate_python(tenant)
        except ValidationError:
            message = "a tenant's name has lower-case letters, digits and -, at most 32"
            raise WrongUsageError([wrong("--tenant", message)]) from None
        given = settings.read(settings.GatewaySettings).webhook_secret
        if not given:
            raise WrongUsageError([wrong("VIDGEN_WEBHOOK_SECRET", "is not set: set it to what the gateway has")])
        try:
            found = webhooks.Secret.parse(given.get_secret_value()).of_tenant(tenant).reveal()
        except errors.FatalError as exc:
            message = exc.message.removeprefix("VIDGEN_WEBHOOK_SECRET: ")
            raise WrongUsageError([wrong("VIDGEN_WEBHOOK_SECRET", message)]) from None
        out_put.emit("webhook_secret", {"tenant": tenant, "secret": found})
        out_put.say(found)
