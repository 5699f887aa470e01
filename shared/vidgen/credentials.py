"""What a process shows the bus: an nkey, and what it asks of the bus's certificate. Seeds never leave the process."""

from __future__ import annotations

import re
import secrets
import ssl
from pathlib import Path
from typing import Any

from vidgen import errors, permissions

SEED_BYTES = 32
SEED = re.compile(r"SU[A-Z2-7]{56}")
VARIABLE = "VIDGEN_NATS_NKEY_SEED="


def nkey(told: str, inbox_prefix: str | None = None) -> dict[str, Any]:
    """The options of a user with this seed, or with that of the file which is named; its inbox is its own.

    Raises FatalError `settings`.
    """
    seed = told.strip() if SEED.fullmatch(told.strip()) else _read(Path(told.strip()))
    return {"nkeys_seed_str": seed} | inbox(inbox_prefix or permissions.inbox_of(public_key(seed)))


def inbox(prefix: str | None) -> dict[str, Any]:
    """The option for where answers are heard."""
    return {} if prefix is None else {"inbox_prefix": prefix.encode()}


def tls(ca: Path | None, cert: Path | None, key: Path | None) -> dict[str, Any]:
    """The option that takes TLS alone, from a server that this authority signed; raises FatalError `settings`."""
    if ca is None and cert is None:
        return {}
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
        if cert is not None:
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as exc:
        raise errors.FatalError(
            f"the certificates of the bus cannot be read ({exc.strerror or exc}): correct VIDGEN_NATS_TLS_CA, "
            "VIDGEN_NATS_TLS_CERT and VIDGEN_NATS_TLS_KEY",
            code="settings",
        ) from exc
    return {"tls": context}


def make_seed() -> str:
    """A new user's seed."""
    import nkeys

    return str(nkeys.encode_seed(secrets.token_bytes(SEED_BYTES), nkeys.PREFIX_BYTE_USER).decode())


def public_key(seed: str) -> str:
    """What the server knows of a seed; raises FatalError `settings` for what is none."""
    import nkeys

    try:
        return str(nkeys.from_seed(seed.encode()).public_key.decode())
    except (nkeys.NkeysError, ValueError) as exc:
        raise errors.FatalError(
            "VIDGEN_NATS_NKEY_SEED is no seed, nor a file with one: `vidgen identities` makes them", code="settings"
        ) from exc


def _read(path: Path) -> str:
    """The seed in a file: alone, or as a line of an identity's file."""
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as exc:
        raise errors.FatalError(
            "VIDGEN_NATS_NKEY_SEED is neither a seed nor a file that can be read", code="settings"
        ) from exc
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    named = [line.removeprefix(VARIABLE) for line in lines if line.startswith(VARIABLE)]
    return (named or lines or [""])[0]
